"""The ``.bin``/``.idx`` pair, byte for byte as Megatron-LM writes and reads it.

``.bin`` is the concatenated token ids. ``.idx`` is, little-endian::

    9 bytes   magic  b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     dtype code (8 = uint16, 4 = int32; Megatron's codes, which differ from DeepSpeed's)
    uint64    sequences n
    uint64    document boundaries d (documents + 1)
    int32[n]  tokens of each sequence
    int64[n]  byte offset of each sequence in .bin
    int64[d]  index of the first sequence of each document, then n

Each document is one sequence here, as Megatron's preprocessing makes it by default.
"""

from __future__ import annotations

import struct
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.preprocess.artifact import ArtifactError, atomic_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[np.dtype[Any], int] = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
UINT16_VOCABULARY = 65_500  # Megatron stores ids as uint16 below this many vocabulary entries

Tokens = np.ndarray[Any, np.dtype[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that ids of a vocabulary are stored in: uint16 below 65,500 entries as Megatron does, else int32."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCABULARY else np.dtype(np.int32)


class IndexedWriter:
    """Writes documents to ``PREFIX.bin`` and, on :meth:`close`, ``PREFIX.idx``.

    Both appear under their final names only in :meth:`close`; leaving the ``with`` block by an exception removes what was written.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[Any]) -> None:
        if dtype not in DTYPE_CODES:
            raise ValueError(f"dtype {dtype}: only {', '.join(map(str, DTYPE_CODES))} are written")
        self.prefix = prefix
        self.dtype = dtype
        self.tokens = 0
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._stack = ExitStack()
        self._bin = self._stack.enter_context(atomic_file(_beside(prefix, ".bin")))

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return sum(len(lengths) for lengths in self._lengths)

    def write(self, ids: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append documents.

        Args:
            ids: [sum(lengths)], the documents' token ids one after the other.
            lengths: [D], tokens of each document.

        Raises:
            ValueError: an id that the dtype cannot hold or a length that int32 cannot (they would wrap silently), or lengths that do
                not add up.
        """
        if len(lengths) and (int(lengths.min()) < 0 or int(lengths.max()) > np.iinfo(np.int32).max):
            wrong = int(lengths.min()) if int(lengths.min()) < 0 else int(lengths.max())
            raise ValueError(f"a document of length {wrong}; the format holds 0 to {np.iinfo(np.int32).max} tokens")
        if int(lengths.sum()) != len(ids):
            raise ValueError(f"lengths add up to {int(lengths.sum())}, {len(ids)} ids were given")
        limits = np.iinfo(self.dtype)
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) > limits.max):
            raise ValueError(f"token ids {int(ids.min())} to {int(ids.max())} do not fit {self.dtype}")
        self._bin.write(np.ascontiguousarray(ids, dtype=self.dtype).tobytes())
        self._lengths.append(np.asarray(lengths, dtype=np.int32))
        self.tokens += len(ids)

    def close(self) -> None:
        """Make both files durable and give them their final names."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
        pointers *= self.dtype.itemsize
        with self._stack, atomic_file(_beside(self.prefix, ".idx")) as handle:
            boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
            handle.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[self.dtype], len(lengths), len(boundaries)))
            handle.write(lengths.tobytes())
            handle.write(pointers.tobytes())
            handle.write(boundaries.tobytes())

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, trace)


@dataclass(frozen=True)
class Indexed:
    """An opened pair: ``tokens`` [N] uint16 or int32 and ``lengths`` [D] int32 and ``boundaries`` [D + 1] int64, memory-mapped."""

    tokens: Tokens
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    boundaries: npt.NDArray[np.int64]

    def document(self, number: int) -> Tokens:
        """Token ids of one sequence (a document, end-of-document token included)."""
        start = int(self.pointers[number]) // self.tokens.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[number])]


def open_indexed(prefix: Path, *, verify: bool = False) -> Indexed:
    """Map ``PREFIX.bin`` and ``PREFIX.idx``.

    Sizes are checked against the header before anything is mapped. ``verify`` also checks every length, offset and boundary.

    Raises:
        ArtifactError: a missing, truncated or foreign file, or one whose parts contradict each other.
    """
    idx, bin_ = _beside(prefix, ".idx"), _beside(prefix, ".bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file")
    size = idx.stat().st_size
    if size < HEADER.size:
        raise ArtifactError(f"{idx}: {size} bytes, shorter than the {HEADER.size}-byte header")
    with idx.open("rb") as handle:
        magic, version, code, sequences, boundaries = HEADER.unpack(handle.read(HEADER.size))
    if magic != MAGIC or version != 1:
        raise ArtifactError(f"{idx}: magic {magic!r} version {version}; expected {MAGIC!r} version 1 (Megatron's format)")
    dtypes = {value: key for key, value in DTYPE_CODES.items()}
    if code not in dtypes:
        raise ArtifactError(f"{idx}: dtype code {code}; expected 8 (uint16) or 4 (int32), Megatron's codes")
    expected = HEADER.size + sequences * 12 + boundaries * 8
    if size != expected:
        raise ArtifactError(
            f"{idx}: {size} bytes, but its header promises {sequences} sequences and {boundaries} boundaries: {expected} bytes"
        )
    dtype = dtypes[code]
    lengths = _map(idx, np.dtype(np.int32), HEADER.size, sequences)
    pointers = _map(idx, np.dtype(np.int64), HEADER.size + 4 * sequences, sequences)
    bounds = _map(idx, np.dtype(np.int64), HEADER.size + 12 * sequences, boundaries)
    end = (int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize) if sequences else 0
    found = bin_.stat().st_size
    if found != end:
        raise ArtifactError(
            f"{bin_}: {found} bytes, but {idx.name} ends at byte {end}; one of the two was cut or belongs to another corpus"
        )
    if verify:
        _verify(idx, lengths, pointers, bounds, dtype.itemsize)
    return Indexed(_map(bin_, dtype, 0, end // dtype.itemsize), lengths, pointers, bounds)


def _beside(prefix: Path, ending: str) -> Path:
    return prefix.with_name(prefix.name + ending)  # with_suffix would cut a prefix that holds a dot


def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Any:
    if count == 0:  # an empty range cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _verify(
    idx: Path,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    boundaries: npt.NDArray[np.int64],
    itemsize: int,
) -> None:
    if len(lengths) and int(lengths.min()) < 0:
        raise ArtifactError(f"{idx}: sequence {int(lengths.argmin())} has a negative length")
    expected = np.cumsum(lengths, dtype=np.int64) - lengths
    wrong = np.flatnonzero(expected * itemsize != pointers)
    if len(wrong):
        raise ArtifactError(
            f"{idx}: sequence {wrong[0]} starts at byte {pointers[wrong[0]]}, its predecessors end at {expected[wrong[0]] * itemsize}"
        )
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != len(lengths) or bool((np.diff(boundaries) < 0).any()):
        raise ArtifactError(f"{idx}: document boundaries do not run from 0 to {len(lengths)}")
