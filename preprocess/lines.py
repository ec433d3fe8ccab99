"""JSON lines: whole lines out of a stream, a block of them at a time, and rows out of lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import msgspec

from mates.preprocess.inputs import DamageError, InputError
from mates.preprocess.rows import EXCERPT_CHARACTERS, Bad, ReadOptions
from mates.preprocess.streams import Stream

_BOM = b"\xef\xbb\xbf"  # what Windows tools put first
_NEWLINE, _RETURN, _OPEN, _CLOSE = b"\n\r{}"


class LineBlocks:
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


class JsonParser:
    """Rows out of lines: a whole block at once where every line looks like one object, and line by line where one does not."""

    def __init__(self, options: ReadOptions) -> None:
        self._max_line = options.max_document_bytes
        self._names = list(dict.fromkeys((options.text_field, *options.metadata_fields)))
        # Any and UNSET, so that a value of another type or a missing one does not fail its whole block
        absent = [msgspec.UNSET, *[None] * (len(self._names) - 1)]
        fields = [(f"f{i}", Any, msgspec.field(default=absent[i], name=name)) for i, name in enumerate(self._names)]
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
            row = Bad("too long") if stop - at > self._max_line else self._row(bytes(memoryview(buffer)[at:stop]))
            if row is not None:
                rows.append(self._row_type(row) if isinstance(row, Bad) else row)
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
            return Bad("invalid UTF-8")
        except (ValueError, RecursionError):
            return Bad("malformed JSON")
        if not isinstance(row, dict):
            return Bad("not an object")
        text = row.get(self._names[0])
        if isinstance(text, str):
            try:
                text.encode()
            except UnicodeEncodeError:
                return Bad("invalid unicode")
        return self._row_type(**{f"f{i}": row[name] for i, name in enumerate(self._names) if name in row})


def line_place(buffer: bytearray, end: int, starts: list[int], index: int) -> tuple[int, str]:
    """How many lines of a block are before that of a row, and how its own begins."""
    start = starts[index]
    line = buffer[start : min(end, start + 4 * EXCERPT_CHARACTERS)].partition(b"\n")[0]
    return buffer.count(b"\n", 0, start), line.decode(errors="replace")
