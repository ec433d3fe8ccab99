"""Documents out of files: .json.gz, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, a block of them at a time.

A row that cannot be used is not lost silently: it is counted under its reason, so that rows in = texts + dropped holds for every
block. Whether a row is accepted depends on its own bytes alone: blocks are a matter of speed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, Literal

import msgspec

from mates.preprocess.inputs import (
    RAW_BYTES,
    SUFFIXES,
    DamageError,
    GzipStream,
    InputError,
    InputFile,
    PlainPart,
    RawFile,
    Stream,
    ZstdStream,
    find_inputs,
)

__all__ = [
    "SUFFIXES",
    "Block",
    "InputError",
    "InputFile",
    "PartReader",
    "ReadOptions",
    "Reason",
    "Reject",
    "find_inputs",
    "parts_of",
    "read_texts",
]

Reason = Literal[
    "malformed JSON",
    "not an object",
    "no text field",
    "text is not a string",
    "empty text",
    "invalid unicode",  # lone surrogates: JSON can spell them, UTF-8 and the tokenizers cannot
    "invalid UTF-8",
    "too long",
]

BLOCK_BYTES = 4 << 20  # of JSON, or of text out of Parquet
BATCH_ROWS = 1024  # of Parquet, at most
DICTIONARY_ROWS = 128  # the same where a column chunk has a dictionary, whose statistics hide how long the texts are
REJECTS_KEPT = 10  # of each reason in a part
EXCERPT_CHARACTERS = 200
COMPRESSED = (".gz", ".zst")
_BOM = b"\xef\xbb\xbf"  # what Windows tools put first
_NEWLINE, _RETURN, _OPEN, _CLOSE = b"\n\r{}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How documents are read.

    Attributes:
        text_field: field or column of the text.
        metadata_fields: fields or columns kept beside the text, as text.
        on_bad_input: skip and count what cannot be used, or raise at the first of it.
        keep_empty: whether documents of no text, or of white space only, are kept.
        max_document_bytes: longer lines and texts are dropped.
        max_expansion: decompressed bytes for a compressed one, beyond which a stream of over 64 MiB is taken for a bomb.
    """

    text_field: str = "text"
    metadata_fields: tuple[str, ...] = ("url", "timestamp", "source")
    on_bad_input: Literal["skip", "fail"] = "skip"
    keep_empty: bool = False
    max_document_bytes: int = 32 << 20
    max_expansion: int = 200


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be used: its line (row in Parquet), from 1 at the part's first; why; and how it begins."""

    line: int
    reason: Reason
    excerpt: str


@dataclass(slots=True)
class Block:
    """Documents in order: their texts, a list of values for each metadata field, and what was dropped between them."""

    texts: list[str]
    metadata: list[list[str | None]]
    dropped: Counter[Reason] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Bad:
    """Stands where a row's text would be."""

    reason: Reason
    excerpt: str = ""


def parts_of(file: InputFile, part_bytes: int) -> int:
    """How many parts of about ``part_bytes`` a file can be read in; 1 for compressed streams."""
    return 1 if file.name.endswith(COMPRESSED) else max(1, -(-file.bytes // part_bytes))


def read_texts(file: InputFile, options: ReadOptions) -> Iterator[str]:
    """The texts of a file's documents, in order."""
    for block in PartReader(file, options):
        yield from block.texts


class PartReader:
    """Reads one part of one file, block after block. The parts' documents, one part after another, are the whole file's.

    A part of plain JSON lines holds the lines whose first byte lies in its share of the file's bytes; of Parquet, its share of the
    row groups. Compressed streams have one part.

    Attributes:
        sha256: after the iteration, of the raw bytes covered; None for Parquet, or where reading stopped before the part's end.
        lines: lines or rows passed, blank ones too.
        damage: under "skip", what stopped the file before its end.
    """

    def __init__(self, file: InputFile, options: ReadOptions, part: int = 0, parts: int = 1) -> None:
        assert 0 <= part < parts, f"part {part} of {parts}"
        assert parts == 1 or not file.name.endswith(COMPRESSED), f"{file.name}: a compressed stream has one part, not {parts}"
        self._file, self._options, self._part, self._parts = file, options, part, parts
        self._reset()

    def _reset(self) -> None:
        self.sha256: str | None = None
        self.lines = 0
        self.damage: str | None = None
        self._documents = 0
        self._rejects_kept: Counter[Reason] = Counter()

    def __iter__(self) -> Iterator[Block]:
        """The blocks, in order.

        Raises:
            InputError: the file cannot be read, or has no text column; under "fail", also at damage and at the first bad row.
        """
        self._reset()
        with RawFile(self._file) as raw:
            try:
                for block in self._parquet(raw) if self._file.name.endswith(".parquet") else self._json(raw):
                    if self._options.on_bad_input == "fail":
                        self._refuse(block)
                    self._documents += len(block.texts)
                    yield block
            except DamageError as error:
                self.damage = f"damaged after {self._documents:,} documents, {self.lines:,} lines: {error}"
        if self.damage and self._options.on_bad_input == "fail":
            where = f" of part {self._part + 1} of {self._parts}" if self._parts > 1 else ""
            raise InputError(f"{self._file.name}: {self.damage}{where}. Fetch it again, leave it out, or set corpus.on_bad_input to skip")

    def _refuse(self, block: Block) -> None:
        bad = next((reject for reject in block.rejects if reject.reason != "empty text"), None)
        if bad is None:
            return
        kind = "row" if self._file.name.endswith(".parquet") else "line"
        raise InputError(
            f"{self._file.name}: {kind} {self._lines_before() + bad.line}: {bad.reason}: {bad.excerpt!r}. "
            f"Mend or remove the {kind}, or set corpus.on_bad_input to skip"
        )

    def _lines_before(self) -> int:
        """Lines before the part's first, counted only when an error needs them."""
        if self._part == 0:
            return 0
        with RawFile(self._file) as raw:
            if self._file.name.endswith(".parquet"):
                file = _open_parquet(raw)
                return sum(file.metadata.row_group(group).num_rows for group in self._groups(file)[0])
            rest, lines = PlainPart(raw, self._part, self._parts).start, 0
            raw.seek(0)
            while rest and (piece := raw.read(min(BLOCK_BYTES, rest))):
                rest, lines = rest - len(piece), lines + piece.count(b"\n")
            return lines

    # --- JSON lines

    def _json(self, raw: RawFile) -> Iterator[Block]:
        stream: Stream
        if self._file.name.endswith(".gz"):
            stream = GzipStream(raw, self._options.max_expansion)
        elif self._file.name.endswith(".zst"):
            stream = ZstdStream(raw, self._options.max_expansion)
        else:
            stream = PlainPart(raw, self._part, self._parts)
        parser = _JsonParser(self._options)
        for buffer, end in _LineBlocks(stream, BLOCK_BYTES, self._options.max_document_bytes):
            rows, starts, lines = parser.parse(buffer, end)
            metadata = [list(map(value_of, rows)) for value_of in parser.metadata_of]
            block = self._block(list(map(parser.text_of, rows)), metadata, partial(_place, buffer, end, starts))
            self.lines += lines
            rows = metadata = []  # a block's worth of memory, not to be held while the next one is parsed
            yield block
        self.sha256 = stream.sha256

    # --- Parquet

    def _parquet(self, raw: RawFile) -> Iterator[Block]:
        file = _open_parquet(raw)
        columns = self._columns(file)
        batches = (batch for group in self._groups(file)[1] for batch in _batches(file, group, columns))
        for values in _resized(batches, len(columns)):
            by_name = dict(zip(columns, values, strict=True))
            nothing = [None] * len(values[0])
            metadata = [by_name.get(name, nothing) for name in self._options.metadata_fields]
            block = self._block(values[0], metadata, partial(_row_place, values[0]))
            self.lines += len(values[0])
            yield block

    def _columns(self, file: Any) -> list[str]:
        """The text column's name, and those of the metadata columns that the file has."""
        names = file.schema_arrow.names
        text = self._options.text_field
        if names.count(text) != 1:
            raise InputError(
                f"{self._file.name}: {names.count(text) or 'no'} column {text!r}; found {', '.join(names)}. Set corpus.text_field"
            )
        return [text, *(name for name in dict.fromkeys(self._options.metadata_fields) if name != text and names.count(name) == 1)]

    def _groups(self, file: Any) -> tuple[range, range]:
        """Row groups before this part, and of it."""
        bounds = [file.metadata.num_row_groups * part // self._parts for part in (self._part, self._part + 1)]
        return range(bounds[0]), range(*bounds)

    # --- rows

    def _block(self, texts: list[Any], metadata: list[list[Any]], place: Callable[[int], tuple[int, str]]) -> Block:
        """The block of rows with these texts, or what stands there instead; ``place`` tells a row's line and how it begins."""
        quarter = self._options.max_document_bytes // 4  # the longest character has four bytes
        suspects = [i for i, text in enumerate(texts) if type(text) is not str or not text or text.isspace() or len(text) > quarter]
        bad = {index: reason for index in suspects if (reason := self._reason(texts[index]))}
        block = Block(texts, [_as_texts(column) for column in metadata])
        if bad:
            block.texts = [text for index, text in enumerate(texts) if index not in bad]
            block.metadata = [[value for index, value in enumerate(column) if index not in bad] for column in block.metadata]
        for index, reason in bad.items():
            block.dropped[reason] += 1
            if self._rejects_kept[reason] < REJECTS_KEPT:
                self._rejects_kept[reason] += 1
                line, excerpt = place(index)
                block.rejects.append(Reject(self.lines + line + 1, reason, excerpt[:EXCERPT_CHARACTERS]))
        return block

    def _reason(self, text: object) -> Reason | None:
        if isinstance(text, str):
            if len(text.encode()) > self._options.max_document_bytes:
                return "too long"
            return None if self._options.keep_empty or (text and not text.isspace()) else "empty text"
        if isinstance(text, _Bad):
            return text.reason
        return "no text field" if text is msgspec.UNSET else "text is not a string"


def _as_texts(values: list[Any]) -> list[str | None]:
    return [value if value is None or (type(value) is str and value.isascii()) else _as_text(value) for value in values]


def _as_text(value: object) -> str | None:
    """A metadata value; numbers and nested ones as JSON spells them."""
    if value is msgspec.UNSET:
        return None
    if not isinstance(value, str):
        try:
            is_json = isinstance(value, bool | int | float | list | dict)
            value = json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)
        except RecursionError:  # nested as deep as could just be read
            return None
    return value.encode(errors="replace").decode()  # lone surrogates cannot be written anywhere


# --- JSON lines ----------------------------------------------------------------------------------------------------


class _LineBlocks:
    """Whole lines of a stream: a buffer, which is used again, and where they end in it.

    A line longer than a block comes alone. Of one of more than ``max_line`` bytes come so many and one, without its end; the rest
    is passed over.
    """

    def __init__(self, stream: Stream, block_bytes: int, max_line: int) -> None:
        self._stream, self._block_bytes, self._max_line = stream, block_bytes, max_line
        self._buffer, self._filled, self._is_ended = bytearray(block_bytes), 0, False
        self._damage: DamageError | None = None

    def __iter__(self) -> Iterator[tuple[bytearray, int]]:
        """The blocks. At damage, raises DamageError after the lines before it."""
        while True:
            while not self._is_ended and self._filled < len(self._buffer):
                self._read()
            find = self._buffer.find if len(self._buffer) > self._block_bytes else self._buffer.rfind
            cut = find(b"\n", 0, self._filled) + 1
            if cut:
                yield self._buffer, cut
                self._pass(cut)
            elif self._filled > self._max_line:
                yield self._buffer, self._max_line + 1
                self._pass_line()
            elif self._is_ended:
                break
            else:
                self._buffer.extend(bytes(min(self._block_bytes, self._max_line + 1 - self._filled)))
        if self._damage:
            raise self._damage
        if self._filled:
            yield self._buffer, self._filled

    def _read(self) -> None:
        count = 0
        try:
            count = self._stream.readinto(memoryview(self._buffer)[self._filled :])
        except DamageError as error:
            self._damage = error
        self._filled += count
        self._is_ended = count == 0

    def _pass(self, cut: int) -> None:
        rest = bytes(memoryview(self._buffer)[cut : self._filled])
        if len(self._buffer) > self._block_bytes:
            self._buffer = bytearray(self._block_bytes)
        self._buffer[: len(rest)] = rest
        self._filled = len(rest)

    def _pass_line(self) -> None:
        """Read on behind the end of a line of which none is in the buffer."""
        self._pass(self._filled)
        while not self._is_ended:
            self._filled = 0
            self._read()
            newline = self._buffer.find(b"\n", 0, self._filled)
            if newline >= 0:
                self._pass(newline + 1)
                return


class _JsonParser:
    """Rows out of lines: a whole block at once where every line looks like one object, and line by line where one does not."""

    def __init__(self, options: ReadOptions) -> None:
        self._max_line = options.max_document_bytes
        self._names = list(dict.fromkeys((options.text_field, *options.metadata_fields)))
        # Any and UNSET, so that a value of another type or a missing one does not fail its whole block
        fields = [(f"f{i}", Any, msgspec.field(default=msgspec.UNSET, name=name)) for i, name in enumerate(self._names)]
        try:
            self._row_type: Any = msgspec.defstruct("Row", fields, gc=False)
        except ValueError as error:
            raise InputError(f"text_field and metadata_fields {self._names}: {error}") from error
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(self._row_type)
        self.text_of = attrgetter("f0")
        self.metadata_of = [attrgetter(f"f{self._names.index(name)}") for name in options.metadata_fields]

    def parse(self, buffer: bytearray, end: int) -> tuple[list[Any], list[int], int]:
        """The rows of ``buffer[:end]``, where each begins, and the number of lines, blank ones too."""
        starts, lines = self._objects(buffer, end)
        if starts is not None:
            try:
                rows = self._decoder.decode_lines(memoryview(buffer)[:end])
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                rows = []
            if len(rows) == len(starts):
                return rows, starts, lines
        return self._line_by_line(buffer, end)

    def _objects(self, buffer: bytearray, end: int) -> tuple[list[int] | None, int]:
        """Where each line that is not blank begins, if all of them begin with { and end with }; and the number of lines.

        The parser takes objects wherever they end. But in what it takes, a line's end between } and { is between two objects, so
        that with as many objects as lines each line is one object.
        """
        starts: list[int] = []
        find, add, max_line = buffer.find, starts.append, self._max_line  # this loop is a cost of every line
        at = blank = 0
        while at < end:
            stop = find(_NEWLINE, at, end)
            if stop < 0:
                stop = end
            last = buffer[stop - 1]
            if buffer[at] == _OPEN and stop - at <= max_line and (last == _CLOSE or (last == _RETURN and buffer[stop - 2] == _CLOSE)):
                add(at)
            elif stop - at > max_line or buffer[at:stop].strip():
                return None, 0
            else:
                blank += 1
            at = stop + 1
        return starts, len(starts) + blank

    def _line_by_line(self, buffer: bytearray, end: int) -> tuple[list[Any], list[int], int]:
        rows, starts = [], []
        at = lines = 0
        while at < end:
            stop = buffer.find(_NEWLINE, at, end)
            if stop < 0:
                stop = end
            row = _Bad("too long") if stop - at > self._max_line else self._row(bytes(memoryview(buffer)[at:stop]))
            if row is not None:
                rows.append(self._row_type(row) if isinstance(row, _Bad) else row)
                starts.append(at)
            at = stop + 1
            lines += 1
        return rows, starts, lines

    def _row(self, line: bytes) -> Any:
        """The row of a line; None for a blank one."""
        line = line.removeprefix(_BOM)  # also inside a file, where several were joined
        if not line or line.isspace():
            return None
        try:
            return self._decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return self._second_opinion(line)

    def _second_opinion(self, line: bytes) -> Any:
        """The row by Python's parser, which takes NaN and lone surrogates and can tell what is wrong."""
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            return _Bad("invalid UTF-8")
        except (ValueError, RecursionError):
            return _Bad("malformed JSON")
        if not isinstance(row, dict):
            return _Bad("not an object")
        text = row.get(self._names[0])
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError:
                return _Bad("invalid unicode")
        return self._row_type(*(row.get(name, msgspec.UNSET) for name in self._names))


def _place(buffer: bytearray, end: int, starts: list[int], index: int) -> tuple[int, str]:
    start = starts[index]
    line = buffer[start : min(end, start + 4 * EXCERPT_CHARACTERS)].partition(b"\n")[0]
    return buffer.count(b"\n", 0, start), line.decode(errors="replace")


# --- Parquet -------------------------------------------------------------------------------------------------------


def _open_parquet(raw: RawFile) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(raw, pre_buffer=False, buffer_size=RAW_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DamageError(f"not a Parquet file ({error})") from error


def _batches(file: Any, group: int, columns: list[str]) -> Iterator[list[list[Any]]]:
    """Values of the columns, the text's first, in batches of a row group."""
    import pyarrow as pa

    rows = 0
    try:
        size = _batch_rows(file.metadata.row_group(group), columns)
        for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False):
            rows += batch.num_rows
            text, *others = (batch.column(name) for name in columns)
            yield [_texts(text), *map(_metadata, others)]
        expected = file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamageError(f"row group {group} cannot be read ({error})") from error
    if rows != expected:
        raise DamageError(f"row group {group} gave {rows:,} rows; expected {expected:,}")


def _batch_rows(group: Any, columns: list[str]) -> int:
    """Rows that hold about a block, by the file's own statistics."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    needed = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    size = sum(chunk.total_uncompressed_size for chunk in needed)
    has_dictionary = any(chunk.has_dictionary_page for chunk in needed)
    rows: int = min(BLOCK_BYTES * group.num_rows // max(1, size), DICTIONARY_ROWS if has_dictionary else BATCH_ROWS)
    return max(1, rows)


def _resized(batches: Iterator[list[list[Any]]], columns: int) -> Iterator[list[list[Any]]]:
    """The same rows in batches of about a block of text."""
    pending: list[list[Any]] = [[] for _ in range(columns)]
    size = 0
    try:
        for batch in batches:
            lengths = [len(text) if isinstance(text, str) else 0 for text in batch[0]]
            if size + sum(lengths) <= BLOCK_BYTES:
                size += sum(lengths)
                pending = [column + values for column, values in zip(pending, batch, strict=True)]
                continue
            for row, length in zip(zip(*batch, strict=True), lengths, strict=True):
                if size + length > BLOCK_BYTES and pending[0]:
                    yield pending
                    pending, size = [[] for _ in range(columns)], 0
                for column, value in zip(pending, row, strict=True):
                    column.append(value)
                size += length
    except DamageError:
        if pending[0]:
            yield pending
        raise
    if pending[0]:
        yield pending


def _texts(column: Any) -> list[Any]:
    """A text column's values: str, None, or _Bad."""
    column = _plain(column)
    if not _is_string(column.type):
        return [_Bad("text is not a string", f"a column of type {column.type}")] * len(column)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet does not check
        return [value if value is None else _decoded(value) for value in _as_bytes(column)]


def _decoded(value: bytes) -> str | _Bad:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _Bad("invalid UTF-8", value[: 4 * EXCERPT_CHARACTERS].decode(errors="replace"))


def _metadata(column: Any) -> list[Any]:
    import pyarrow as pa

    column = _plain(column)
    if _is_string(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        try:
            return [value if value is None or isinstance(value, str) else value.decode() for value in column.to_pylist()]
        except UnicodeDecodeError:
            return [value if value is None else value.decode(errors="replace") for value in _as_bytes(column)]
    if pa.types.is_temporal(column.type):  # Python has no nanoseconds
        column = column.cast(pa.string())
    return list(column.to_pylist())


def _plain(column: Any) -> Any:
    """The column without the wrappers of a dictionary or an extension type."""
    import pyarrow as pa

    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column


def _as_bytes(column: Any) -> list[bytes | None]:
    import pyarrow as pa

    return list(column.cast(pa.large_binary()).to_pylist())


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _row_place(texts: list[Any], index: int) -> tuple[int, str]:
    text = texts[index]
    return index, text.excerpt if isinstance(text, _Bad) else "null" if text is None else text
