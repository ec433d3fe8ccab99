"""Documents out of files: .json.gz, .jsonl, .jsonl.gz, .jsonl.zst and .parquet.

A document that cannot be used is not lost silently: it comes out as a :class:`Dropped` with its reason, so that documents in =
written + dropped holds for every file. A file that is damaged as a whole (a cut gzip stream, say) raises.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zstandard

SUFFIXES = (".json.gz", ".jsonl.gz", ".jsonl.zst", ".json.zst", ".jsonl", ".json", ".parquet")

Reason = Literal["malformed JSON", "not an object", "no text field", "text is not a string", "empty text", "invalid unicode"]


class InputError(ValueError):
    """An input file cannot be found or read. The message names it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text and what is known of its source."""

    text: str
    url: str | None = None
    timestamp: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A document that cannot be used, with the reason."""

    reason: Reason


def find_inputs(patterns: list[str]) -> list[Path]:
    """Files named by files, folders and globs, in the order given (sorted inside a folder or glob).

    Raises:
        InputError: a pattern that matches nothing, a file of an unknown form, or the same file twice.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES))
            if not matches:
                raise InputError(f"{path}: no file ending in {', '.join(SUFFIXES)} below this folder")
        else:
            matches = [path] if path.is_file() else sorted(Path(item) for item in glob.glob(pattern, recursive=True))  # noqa: PTH207 - the pattern may be absolute
        if not matches:
            raise InputError(f"{pattern}: no such file, folder or match")
        found.extend(matches)
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"{path}: unknown form; expected a name ending in {', '.join(SUFFIXES)}")
    if len({path.resolve() for path in found}) != len(found):
        twice = next(path for path in found if [item.resolve() for item in found].count(path.resolve()) > 1)
        raise InputError(f"{twice}: named more than once; its documents would be repeated")
    return found


def read_documents(path: Path, text_field: str = "text") -> Iterator[Document | Dropped]:
    """The documents of one file, in order.

    Raises:
        InputError: the file cannot be read to its end (the message says after how many documents).
    """
    rows = _parquet(path, text_field) if path.name.endswith(".parquet") else _json_lines(path, text_field)
    count = 0
    try:
        for row in rows:
            count += 1
            yield row
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path}: damaged after {count} documents ({error}); fetch it again or leave it out") from error


def _lines(path: Path) -> Iterator[bytes]:
    if path.name.endswith((".zst", ".gz")) and path.stat().st_size == 0:
        raise EOFError("0 bytes, which is no compressed stream; one of nothing has some")
    if path.name.endswith(".zst"):
        yield from _zstd_lines(path)
    elif path.name.endswith(".gz"):
        with gzip.open(path, "rb") as handle:
            yield from handle
    else:
        with path.open("rb") as handle:
            yield from handle


def _zstd_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file of one or more zstandard frames. The library's stream reader ends quietly where a frame is cut; this raises."""
    decompressor, rest, inside = zstandard.ZstdDecompressor().decompressobj(), b"", False
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            while block:
                inside = True
                *lines, rest = (rest + decompressor.decompress(block)).split(b"\n")
                yield from lines
                block = b""
                if decompressor.eof:
                    block, inside = decompressor.unused_data, False
                    decompressor = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise EOFError("the zstandard stream is cut")
    if rest:
        yield rest


def _json_lines(path: Path, text_field: str) -> Iterator[Document | Dropped]:
    for line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            yield Dropped("malformed JSON")
            continue
        if not isinstance(row, dict):
            yield Dropped("not an object")
        elif text_field not in row:
            yield Dropped("no text field")
        else:
            yield _document(row[text_field], row.get("url"), row.get("timestamp"), row.get("source"))


def _parquet(path: Path, text_field: str) -> Iterator[Document | Dropped]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a Parquet file ({error})") from error
    names = file.schema_arrow.names
    if text_field not in names:
        raise InputError(f"{path}: no column {text_field!r}; found {', '.join(names)}. Set corpus.text_field")
    columns = [name for name in (text_field, "url", "timestamp", "source") if name in names]
    try:
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            for values in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                row = dict(zip(columns, values, strict=True))
                yield _document(row[text_field], row.get("url"), row.get("timestamp"), row.get("source"))
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _values(column: Any) -> list[object]:
    """A column as Python objects; bytes that are no UTF-8, which Parquet does not check, become a lone surrogate."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _value(item: Any) -> object:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return "\ud800"


def _document(text: object, url: object, timestamp: object, source: object) -> Document | Dropped:
    if not isinstance(text, str):
        return Dropped("text is not a string")
    if not text.strip():
        return Dropped("empty text")
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates: JSON can spell them, UTF-8 and the tokenizers cannot
        return Dropped("invalid unicode")
    known = (None if value is None else str(value).encode(errors="replace").decode() for value in (url, timestamp, source))
    return Document(text, *known)
