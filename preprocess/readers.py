"""Documents out of files: .json.gz, .jsonl, .jsonl.gz, .jsonl.zst and .parquet, a block of them at a time.

A row that cannot be used is not lost silently: it is counted under its reason, so that rows in = texts + dropped holds for every
block. Whether a row is accepted depends on its own bytes alone: blocks are a matter of speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec

from mates.preprocess.inputs import SUFFIXES, DamageError, InputError, InputFile, RawFile, find_inputs
from mates.preprocess.lines import JsonParser, LineBlocks, line_place
from mates.preprocess.parquet import open_parquet, read_batches, resized, row_place
from mates.preprocess.rows import EXCERPT_CHARACTERS, Bad, Block, ReadOptions, Reason, Reject, as_texts
from mates.preprocess.streams import GzipStream, PlainPart, Stream, ZstdStream

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

BLOCK_BYTES = 4 << 20  # of JSON, or of text out of Parquet
REJECTS_KEPT = 10  # of each reason in a part
COMPRESSED = (".gz", ".zst")


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
        digest: BLAKE3, after the iteration, of the raw bytes covered; None for Parquet, or where reading stopped before the part's end.
        lines: lines or rows passed, blank ones too.
        damage: under "skip", what stopped the file before its end.
    """

    def __init__(self, file: InputFile, options: ReadOptions, part: int = 0, parts: int = 1) -> None:
        assert 0 <= part < parts, f"part {part} of {parts}"
        assert parts == 1 or not file.name.endswith(COMPRESSED), f"{file.name}: a compressed stream has one part, not {parts}"
        self._file, self._options, self._part, self._parts = file, options, part, parts
        self._reset()

    def _reset(self) -> None:
        self.digest: str | None = None
        self.lines = 0
        self.damage: str | None = None
        self._documents = 0
        self._rejects_kept: Counter[Reason] = Counter()

    def __iter__(self) -> Iterator[Block]:
        """The blocks, in order.

        Raises:
            InputError: the file cannot be read; under "fail", also at damage (a Parquet file without the text column is such) and at
                the first bad row.
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
                file = open_parquet(raw)
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
        parser = JsonParser(self._options)
        for buffer, end in LineBlocks(stream, BLOCK_BYTES, self._options.max_document_bytes):
            rows, starts, lines = parser.parse(buffer, end)
            metadata = [list(map(value_of, rows)) for value_of in parser.metadata_of]
            block = self._block(list(map(parser.text_of, rows)), metadata, partial(line_place, buffer, end, starts))
            self.lines += lines
            rows = metadata = []  # a block's worth of memory, not to be held while the next one is parsed
            yield block
        self.digest = stream.digest

    # --- Parquet

    def _parquet(self, raw: RawFile) -> Iterator[Block]:
        file = open_parquet(raw)
        columns = self._columns(file)
        batches = (batch for group in self._groups(file)[1] for batch in read_batches(file, group, columns, BLOCK_BYTES))
        for values in resized(batches, len(columns), BLOCK_BYTES):
            by_name = dict(zip(columns, values, strict=True))
            nothing = [None] * len(values[0])
            metadata = [by_name.get(name, nothing) for name in self._options.metadata_fields]
            block = self._block(values[0], metadata, partial(row_place, values[0]))
            self.lines += len(values[0])
            yield block

    def _columns(self, file: Any) -> list[str]:
        """The text column's name, and those of the metadata columns that the file has."""
        names = file.schema_arrow.names
        text = self._options.text_field
        if names.count(text) != 1:
            raise DamageError(f"{names.count(text) or 'no'} column {text!r}; found {', '.join(names)}. See corpus.text_field")
        return [text, *(name for name in dict.fromkeys(self._options.metadata_fields) if name != text and names.count(name) == 1)]

    def _groups(self, file: Any) -> tuple[range, range]:
        """Row groups before this part, and of it."""
        bounds = [file.metadata.num_row_groups * part // self._parts for part in (self._part, self._part + 1)]
        return range(bounds[0]), range(*bounds)

    # --- rows

    def _block(self, texts: list[Any], metadata: list[list[Any]], place: Callable[[int], tuple[int, str]]) -> Block:
        """The block of rows with these texts, or what stands there instead; ``place`` tells a row's line and how it begins."""
        bad = {index: reason for index in self._suspects(texts) if (reason := self._reason(texts[index]))}
        block = Block(texts, [as_texts(column) for column in metadata])
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

    def _suspects(self, texts: list[Any]) -> list[int]:
        """Rows that may have to be dropped. Most blocks have none, which is told without a look at each row in turn."""
        quarter = self._options.max_document_bytes // 4  # the longest character has four bytes
        if set(map(type, texts)) == {str} and all(texts) and not any(map(str.isspace, texts)) and max(map(len, texts)) <= quarter:
            return []
        return [i for i, text in enumerate(texts) if type(text) is not str or not text or text.isspace() or len(text) > quarter]

    def _reason(self, text: object) -> Reason | None:
        if isinstance(text, str):
            if len(text.encode()) > self._options.max_document_bytes:
                return "too long"
            return None if self._options.keep_empty or (text and not text.isspace()) else "empty text"
        if isinstance(text, Bad):
            return text.reason
        return "no text field" if text is msgspec.UNSET else "text is not a string"
