"""Parquet: the values of a file's columns, row group after row group, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mates.preprocess.inputs import RAW_BYTES, DamageError, RawFile
from mates.preprocess.rows import EXCERPT_CHARACTERS, Bad

BATCH_ROWS = 1024  # read at once, at most
DICTIONARY_ROWS = 128  # the same where a column chunk has a dictionary, whose statistics hide how long the texts are


def open_parquet(raw: RawFile) -> Any:
    """The file as PyArrow has it. Raises DamageError where it is none of Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(raw, pre_buffer=False, buffer_size=RAW_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise DamageError(f"not a Parquet file ({error})") from error


def read_batches(file: Any, group: int, columns: list[str], block_bytes: int) -> Iterator[list[list[Any]]]:
    """Values of the columns, the text's first, in batches of a row group, each of about a block at most."""
    import pyarrow as pa

    rows = 0
    try:
        size = _batch_rows(file.metadata.row_group(group), columns, block_bytes)
        for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=columns, use_threads=False):
            rows += batch.num_rows
            text, *others = (batch.column(name) for name in columns)
            yield [_texts(text), *map(_metadata, others)]
        expected = file.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamageError(f"row group {group} cannot be read ({error})") from error
    if rows != expected:
        raise DamageError(f"row group {group} gave {rows:,} rows; expected {expected:,}")


def _batch_rows(group: Any, columns: list[str], block_bytes: int) -> int:
    """Rows that hold about a block, by the file's own statistics."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    wanted = set(columns)
    needed = [chunk for chunk in chunks if wanted & {chunk.path_in_schema, chunk.path_in_schema.partition(".")[0]}]
    size = sum(chunk.total_uncompressed_size for chunk in needed)
    has_dictionary = any(chunk.has_dictionary_page for chunk in needed)
    rows: int = min(block_bytes * group.num_rows // max(1, size), DICTIONARY_ROWS if has_dictionary else BATCH_ROWS)
    return max(1, rows)


def resized(batches: Iterator[list[list[Any]]], columns: int, block_bytes: int) -> Iterator[list[list[Any]]]:
    """The same rows in batches of about a block of text."""
    pending: list[list[Any]] = [[] for _ in range(columns)]
    size = 0
    try:
        for batch in batches:
            lengths = [len(text) if isinstance(text, str) else 0 for text in batch[0]]
            if size + sum(lengths) <= block_bytes:
                size += sum(lengths)
                pending = [column + values for column, values in zip(pending, batch, strict=True)]
                continue
            for row, length in zip(zip(*batch, strict=True), lengths, strict=True):
                if size + length > block_bytes and pending[0]:
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
    """A text column's values: str, None, or Bad."""
    column = _plain(column)
    if not _is_string(column.type):
        return [Bad("text is not a string", f"a column of type {column.type}")] * len(column)
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # Parquet does not check
        return [value if value is None else _decoded(value) for value in _as_bytes(column)]


def _decoded(value: bytes) -> str | Bad:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return Bad("invalid UTF-8", value[: 4 * EXCERPT_CHARACTERS].decode(errors="replace"))


def _metadata(column: Any) -> list[Any]:
    """A metadata column's values. One that Python cannot hold is None: it must not cost the document its text."""
    import pyarrow as pa

    column = _plain(column)
    try:
        if pa.types.is_temporal(column.type):  # Python has no nanoseconds
            column = column.cast(pa.string())
        values = column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):  # UnicodeDecodeError is a ValueError
        binary = _as_bytes(column) if _is_string(column.type) else [None] * len(column)
        values = [_value(item) if raw is None else raw for item, raw in zip(column, binary, strict=True)]
    return [value.decode(errors="replace") if isinstance(value, bytes) else value for value in values]


def _value(item: Any) -> Any:
    import pyarrow as pa

    try:
        return item.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return None


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


def row_place(texts: list[Any], index: int) -> tuple[int, str]:
    """How many rows of a batch are before a row, and how its text begins."""
    text = texts[index]
    return index, text.excerpt if isinstance(text, Bad) else "null" if text is None else text
