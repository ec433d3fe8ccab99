"""The ``.bin``/``.idx`` pair, byte for byte as Megatron-LM writes and reads it.

``.bin`` is the concatenated token ids. ``.idx`` is, little-endian, for n sequences and D documents::

    9 bytes     magic  b"MMIDIDX\\0\\0"
    uint64      version, 1
    uint8       dtype code (DTYPE_CODES: Megatron's, which DeepSpeed numbers otherwise from 6 on)
    uint64      n
    uint64      D + 1
    int32[n]    tokens of each sequence
    int64[n]    byte offset of each sequence in .bin
    int64[D+1]  boundaries: document d is sequences [boundaries[d], boundaries[d + 1]); from 0 to n

What is written here has one sequence for a document with tokens and none for an empty one, whose boundary repeats, as
Megatron's preprocessing writes both. Documents of several sequences (its sentence splitting) are read as well; multimodal pairs,
which add int8[n] modes at the end, are not.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.preprocess.artifact import ArtifactError, atomic_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[np.dtype[Any], int] = {
    np.dtype(np.uint8): 1,
    np.dtype(np.int8): 2,
    np.dtype(np.int16): 3,
    np.dtype(np.int32): 4,
    np.dtype(np.int64): 5,
    np.dtype(np.float64): 6,
    np.dtype(np.float32): 7,
    np.dtype(np.uint16): 8,
}
UINT16_VOCABULARY = 65_500  # Megatron stores ids as uint16 below this many vocabulary entries
LONGEST = np.iinfo(np.int32).max  # tokens of a sequence
CHUNK = 1 << 18  # entries handled at a time: the arrays of one chunk stay in cache

Tokens = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that ids of a vocabulary are stored in: uint16 below 65,500 entries as Megatron does, else int32."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCABULARY else np.dtype(np.int32)


# --- the bytes -----------------------------------------------------------------------------------------------------


def token_bytes(ids: npt.NDArray[Any], dtype: np.dtype[Any]) -> bytes:
    """What ``.bin`` holds for token ids [N], without ever wrapping or rounding one.

    Raises:
        ValueError: ids that are not one row of numbers; for an integer ``dtype`` floats, negative ids and ids beyond its range;
            for a float ``dtype`` values that it does not hold exactly (of integers: beyond ± 2**24 in float32, 2**53 in float64).
    """
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in ("iuf" if dtype.kind == "f" else "iu")):
        wanted = "numbers" if dtype.kind == "f" else "integers"
        raise ValueError(f"token ids of dtype {ids.dtype} and shape {ids.shape}; {wanted} in one dimension are stored as {dtype}")
    if len(ids) == 0:
        return b""
    low, high = ids.min(), ids.max()
    if dtype.kind != "f":
        fits = int(low) >= 0 and int(high) <= np.iinfo(dtype).max
    elif ids.dtype.kind != "f":
        exact = 2 ** (np.finfo(dtype).nmant + 1)
        fits = int(low) >= -exact and int(high) <= exact
    else:
        with np.errstate(over="ignore"):
            fits = np.array_equal(ids.astype(dtype), ids, equal_nan=True)
    if not fits:
        raise ValueError(f"token ids {low} to {high} do not fit {dtype}")
    return ids.astype(dtype, copy=False).tobytes()


@dataclass(frozen=True)
class IndexLayout:
    """Where everything lies in the ``.idx`` of so many sequences and documents, all in Python's unbounded integers.

    It lets several processes write one pair, each its own run of documents by offset: :meth:`header` at 0, each of :meth:`pieces`
    at its offset, and :func:`token_bytes` at ``first_token * dtype.itemsize`` of ``.bin``.
    """

    dtype: np.dtype[Any]
    sequences: int
    """n; for what is written here, the documents that hold tokens."""
    documents: int
    """D, empty documents included."""

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)

    @property
    def lengths_at(self) -> int:
        """Byte offset of the lengths, int32 [n]."""
        return HEADER.size

    @property
    def pointers_at(self) -> int:
        """Byte offset of the pointers, int64 [n]."""
        return self.lengths_at + 4 * self.sequences

    @property
    def boundaries_at(self) -> int:
        """Byte offset of the boundaries, int64 [D + 1]."""
        return self.pointers_at + 8 * self.sequences

    @property
    def size(self) -> int:
        """Bytes of the whole ``.idx``."""
        return self.boundaries_at + 8 * (self.documents + 1)

    def header(self) -> bytes:
        """The bytes at offset 0, up to the lengths."""
        return HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype], self.sequences, self.documents + 1)

    def pieces(
        self, lengths: npt.NDArray[np.integer[Any]], *, first_document: int, first_sequence: int, first_token: int
    ) -> list[tuple[int, bytes]]:
        """What a run of documents adds to the file, apart from the header: (byte offset, bytes) of each of the three regions.

        The pieces of runs that cover all documents fill the file without gap or overlap. The leading boundary 0 comes with
        ``first_document=0``, so a corpus of no documents still takes one call, with no lengths.

        Args:
            lengths: [d], tokens of each document of the run; 0 for an empty one, which makes no sequence.
            first_document: documents before the run.
            first_sequence: of these, the documents that hold tokens.
            first_token: tokens before the run.

        Raises:
            ValueError: a length that the format cannot hold, or a run that does not lie within the file.
        """
        lengths = _as_lengths(lengths)
        held = lengths[lengths > 0]
        if not (0 <= first_document <= self.documents - len(lengths) and 0 <= first_sequence <= self.sequences - len(held)):
            raise ValueError(
                f"{len(lengths)} documents of {len(held)} sequences after {first_document} and {first_sequence} do not lie within "
                f"{self.documents} documents of {self.sequences} sequences"
            )
        starts = np.cumsum(held, dtype=np.int64) - held + first_token
        ends = np.cumsum(lengths > 0, dtype=np.int64) + first_sequence
        boundary = first_document + 1
        if first_document == 0:
            ends, boundary = np.concatenate([np.zeros(1, np.int64), ends]), 0
        return [
            (self.lengths_at + 4 * first_sequence, held.tobytes()),
            (self.pointers_at + 8 * first_sequence, (starts * self.dtype.itemsize).tobytes()),
            (self.boundaries_at + 8 * boundary, ends.tobytes()),
        ]


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype not in DTYPE_CODES:
        raise ValueError(f"dtype {dtype}: only {', '.join(map(str, DTYPE_CODES))} are written")


def _as_lengths(lengths: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """A copy as int32: what the caller does with its array later must not reach what was recorded."""
    if lengths.ndim != 1 or (len(lengths) and lengths.dtype.kind not in "iu"):
        raise ValueError(f"lengths of dtype {lengths.dtype} and shape {lengths.shape}; expected one integer a document")
    if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > LONGEST):
        wrong = int(lengths.min()) if int(lengths.min()) < 0 else int(lengths.max())
        raise ValueError(f"a document of length {wrong}; the format holds 0 to {LONGEST} tokens")
    return lengths.astype(np.int32)


class IndexedWriter:
    """Writes documents to ``PREFIX.bin`` and, on :meth:`close`, ``PREFIX.idx``.

    Both appear under their final names only in :meth:`close`; leaving the ``with`` block by an exception removes what was written.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        _check_dtype(dtype)
        self.prefix = prefix
        self.dtype = dtype
        self.documents = 0
        """Documents written so far, empty ones included."""
        self.tokens = 0
        """Tokens written so far."""
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._stack = ExitStack()
        self._bin = self._stack.enter_context(atomic_file(_beside(prefix, ".bin")))

    def write(self, ids: npt.NDArray[Any], lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append documents.

        Args:
            ids: [sum(lengths)], the documents' token ids one after the other.
            lengths: [D], tokens of each document; 0 for an empty one.

        Raises:
            ValueError: ids that :func:`token_bytes` refuses, a length that int32 cannot hold, or lengths that do not add up.
                Nothing is written then.
        """
        copied = _as_lengths(lengths)
        total = int(copied.sum(dtype=np.int64))
        if total != len(ids):
            raise ValueError(f"lengths add up to {total}, {len(ids)} ids were given")
        self._bin.write(token_bytes(ids, self.dtype))
        self._lengths.append(copied)
        self.documents += len(copied)
        self.tokens += total

    def close(self) -> None:
        """Make both files durable and give them their final names."""
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        layout = IndexLayout(self.dtype, int(np.count_nonzero(lengths)), len(lengths))
        sequence = token = 0
        with self._stack, atomic_file(_beside(self.prefix, ".idx")) as handle:
            handle.write(layout.header())
            for first in range(0, max(1, len(lengths)), CHUNK):
                run = lengths[first : first + CHUNK]
                for offset, data in layout.pieces(run, first_document=first, first_sequence=sequence, first_token=token):
                    handle.seek(offset)
                    handle.write(data)
                sequence += int(np.count_nonzero(run))
                token += int(run.sum(dtype=np.int64))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, trace)


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Indexed:
    """An opened pair, memory-mapped. It works on after a fork, and pickles as its place, to be opened anew where it arrives."""

    tokens: Tokens
    """[N], all token ids, of one of the dtypes of DTYPE_CODES."""
    lengths: npt.NDArray[np.int32]
    """[n], tokens of each sequence."""
    pointers: npt.NDArray[np.int64]
    """[n], byte offset of each sequence in ``.bin``."""
    boundaries: npt.NDArray[np.int64]
    """[D + 1], the number of the first sequence of each document, then n."""
    prefix: Path
    """The pair without its endings, absolute."""
    checked: bool
    """Whether lengths, pointers and boundaries were checked against each other when it was opened."""

    @property
    def sequences(self) -> int:
        """n. A document has one in what is written here, or none where it is empty; in Megatron's files it may have several."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """D, empty documents included."""
        return len(self.boundaries) - 1

    def document(self, number: int) -> Tokens:
        """Token ids of a document, all its sequences (end-of-document token included). IndexError outside 0 to D − 1."""
        if not 0 <= number < self.documents:
            raise IndexError(f"{self.prefix}: document {number} of {self.documents}")
        return self._slice(int(self.boundaries[number]), int(self.boundaries[number + 1]))

    def sequence(self, number: int) -> Tokens:
        """Token ids of a sequence. IndexError outside 0 to n − 1."""
        if not 0 <= number < self.sequences:
            raise IndexError(f"{self.prefix}: sequence {number} of {self.sequences}")
        return self._slice(number, number + 1)

    def _slice(self, first: int, last: int) -> Tokens:
        if first == last:
            return self.tokens[:0]
        itemsize = self.tokens.dtype.itemsize
        if 0 <= first < last <= self.sequences:
            start = int(self.pointers[first])
            end = int(self.pointers[last - 1]) + int(self.lengths[last - 1]) * itemsize
            if 0 <= start <= end <= self.tokens.nbytes and start % itemsize == 0:
                return self.tokens[start // itemsize : end // itemsize]
        # only without the checks at open: less or other data than was asked for is never returned
        raise ArtifactError(f"{self.prefix}.idx: sequences {first} to {last} do not lie within the tokens; open it with check=True")

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open_indexed, check=self.checked), (self.prefix,)


def open_indexed(prefix: Path, *, check: bool = True) -> Indexed:
    """Map ``PREFIX.bin`` and ``PREFIX.idx``.

    Args:
        prefix: the pair without its endings.
        check: also read the lengths, pointers and boundaries and check them against each other, in bounded memory. Without it only
            header, sizes and both ends are checked, in a time that does not grow with the corpus.

    Raises:
        ArtifactError: a missing, truncated or foreign file, or one whose parts contradict each other.
    """
    idx, bin_ = _beside(prefix, ".idx"), _beside(prefix, ".bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file")
    layout = _read_header(idx)
    lengths = _map(idx, np.dtype(np.int32), layout.lengths_at, layout.sequences)
    pointers = _map(idx, np.dtype(np.int64), layout.pointers_at, layout.sequences)
    boundaries = _map(idx, np.dtype(np.int64), layout.boundaries_at, layout.documents + 1)
    end = int(pointers[-1]) + int(lengths[-1]) * layout.dtype.itemsize if layout.sequences else 0
    _check_ends(idx, bin_, layout, end, boundaries)
    if check:
        _check_sequences(idx, layout, end)
        _check_boundaries(idx, layout)
    tokens = _map(bin_, layout.dtype, 0, end // layout.dtype.itemsize)
    return Indexed(tokens, lengths, pointers, boundaries, prefix.absolute(), check)


def _beside(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)  # with_suffix would cut a prefix that holds a dot


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Any:
    if count == 0:  # an empty range cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _read_header(idx: Path) -> IndexLayout:
    """The layout that the header promises, which the file's size bears out."""
    size = idx.stat().st_size
    if size < HEADER.size:
        raise ArtifactError(f"{idx}: {size} bytes, shorter than the {HEADER.size}-byte header")
    with idx.open("rb") as handle:
        magic, version, code, sequences, boundaries = HEADER.unpack(handle.read(HEADER.size))
    if magic != MAGIC or version != 1:
        raise ArtifactError(f"{idx}: magic {magic!r} version {version}; expected {MAGIC!r} version 1 (Megatron's format)")
    dtypes = {value: key for key, value in DTYPE_CODES.items()}
    if code not in dtypes:
        known = ", ".join(f"{value} ({dtypes[value]})" for value in sorted(dtypes))
        raise ArtifactError(f"{idx}: dtype code {code}; expected {known}: Megatron's codes, DeepSpeed's differ from 6 on")
    layout = IndexLayout(dtypes[code], sequences, boundaries - 1)
    if size != layout.size:
        promise = f"{size} bytes, but its header promises {sequences} sequences and {boundaries} boundaries: {layout.size} bytes"
        if sequences and size == layout.size + sequences:
            promise += (
                ". One more byte a sequence is what Megatron writes for a multimodal dataset (sequence_modes), which is not read here; "
                "write the text alone, with multimodal=False"
            )
        raise ArtifactError(f"{idx}: {promise}")
    return layout


def _check_ends(idx: Path, bin_: Path, layout: IndexLayout, end: int, boundaries: npt.NDArray[np.int64]) -> None:
    """What can be told without reading the arrays: where the sequences end, and the first and last boundary."""
    dtype, found = layout.dtype, bin_.stat().st_size
    if found != end:
        hint = "one of the two was cut or belongs to another corpus"
        if dtype.kind == "f":
            hint += f", or DeepSpeed wrote them, whose dtype code {DTYPE_CODES[dtype]} does not mean {dtype}"
        raise ArtifactError(f"{bin_}: {found} bytes, but {idx.name} ends at byte {end}; {hint}")
    if end % dtype.itemsize:
        raise ArtifactError(f"{bin_}: {found} bytes do not hold a whole number of tokens, {dtype} according to {idx.name}")
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != layout.sequences:
        raise ArtifactError(f"{idx}: document boundaries do not run from 0 to {layout.sequences}")


def _chunks(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """(number of its first entry, chunk) over an array in a file. Read, not mapped: mapped pages would add up in memory."""
    with path.open("rb", buffering=0) as handle:
        handle.seek(offset)
        for first in range(0, count, CHUNK):
            chunk = np.fromfile(handle, dtype, min(CHUNK, count - first))
            if len(chunk) < min(CHUNK, count - first):
                raise ArtifactError(f"{path}: was cut while it was read")
            yield first, chunk


def _check_sequences(idx: Path, layout: IndexLayout, end: int) -> None:
    """No length is negative, and each sequence starts where the one before it ends."""
    at = 0
    every_length = _chunks(idx, np.dtype(np.int32), layout.lengths_at, layout.sequences)
    every_pointer = _chunks(idx, np.dtype(np.int64), layout.pointers_at, layout.sequences)
    for (first, lengths), (_, pointers) in zip(every_length, every_pointer, strict=True):
        if int(lengths.min()) < 0:
            raise ArtifactError(f"{idx}: sequence {first + int(lengths.argmin())} has a negative length, {int(lengths.min())}")
        stops = np.cumsum(lengths, dtype=np.int64)  # at most CHUNK * 2**31, so nothing wraps
        stops *= layout.dtype.itemsize
        stops += at
        wrong = int(pointers[0]) != at or not np.array_equal(pointers[1:], stops[:-1])
        if wrong:
            starts = np.concatenate([np.array([at], np.int64), stops[:-1]])
            place = int(np.flatnonzero(starts != pointers)[0])
            raise ArtifactError(
                f"{idx}: sequence {first + place} starts at byte {pointers[place]}, its predecessors end at {starts[place]}"
            )
        at = int(stops[-1])
        if at > end:  # refused here, before sums could pass 2**63
            raise ArtifactError(f"{idx}: sequence {first + len(lengths) - 1} ends at byte {at}, beyond the last one's end {end}")


def _check_boundaries(idx: Path, layout: IndexLayout) -> None:
    """They never decrease; their ends were checked, so all lie between 0 and n."""
    before = 0
    for first, boundaries in _chunks(idx, np.dtype(np.int64), layout.boundaries_at, layout.documents + 1):
        falls = np.flatnonzero(boundaries[1:] < boundaries[:-1]) + 1
        if int(boundaries[0]) < before:
            falls = np.zeros(1, np.int64)
        if len(falls):
            raise ArtifactError(
                f"{idx}: document boundaries decrease to {boundaries[falls[0]]} at {first + int(falls[0])}; "
                f"they run from 0 to {layout.sequences} and never decrease"
            )
        before = int(boundaries[-1])
