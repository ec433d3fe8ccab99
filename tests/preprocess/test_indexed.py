"""The .bin/.idx pair against an independent writer of Megatron's layout, and against Megatron where it is installed."""

from __future__ import annotations

import itertools
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mates.preprocess.artifact import ArtifactError
from mates.preprocess.indexed import IndexedWriter, open_indexed, token_dtype

Dtype = np.dtype[Any]

UINT16: Dtype = np.dtype(np.uint16)
INT32: Dtype = np.dtype(np.int32)
LARGEST = {UINT16: 65_535, INT32: 2**31 - 1}


def layout(documents: list[list[int]], dtype: Dtype) -> tuple[bytes, bytes]:
    """The .bin and .idx that Megatron-LM's description of its format asks for, with nothing of the project."""
    letter, code, width = {UINT16: ("H", 8, 2), INT32: ("i", 4, 4)}[dtype]
    tokens = b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents)
    count = len(documents)
    starts = [0, *itertools.accumulate(len(document) * width for document in documents)][:count]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", count, count + 1)
    index += struct.pack(f"<{count}i", *map(len, documents)) + struct.pack(f"<{count}q", *starts)
    return tokens, index + struct.pack(f"<{count + 1}q", *range(count + 1))


def write(prefix: Path, documents: list[list[int]], dtype: Dtype, batches: int = 1) -> None:
    step = max(1, -(-len(documents) // batches))
    with IndexedWriter(prefix, dtype) as writer:
        for start in range(0, len(documents), step):
            batch = documents[start : start + step]
            ids = np.array([token for document in batch for token in document], np.int64)
            writer.write(ids, np.array([len(document) for document in batch], np.int64))
        assert writer.documents == len(documents)
        assert writer.tokens == sum(map(len, documents))


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return (prefix.parent / f"{prefix.name}.bin").read_bytes(), (prefix.parent / f"{prefix.name}.idx").read_bytes()


def put(prefix: Path, tokens: bytes, index: bytes) -> None:
    (prefix.parent / f"{prefix.name}.bin").write_bytes(tokens)
    (prefix.parent / f"{prefix.name}.idx").write_bytes(index)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[list[int]], Dtype]:
    dtype: Dtype = draw(st.sampled_from([UINT16, INT32]))
    largest = LARGEST[dtype]
    ids = st.integers(0, largest) | st.sampled_from([0, 1, 65_535, min(65_536, largest), largest])
    return draw(st.lists(st.lists(ids, max_size=12), max_size=12)), dtype


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return tmp_path / "tokens"


# --- the bytes, and what is read back ------------------------------------------------------------------------------


@given(corpus=corpora(), batches=st.integers(1, 4))
def test_bytes_are_megatrons_and_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, corpus: tuple[list[list[int]], Dtype], batches: int
) -> None:
    documents, dtype = corpus
    prefix = tmp_path_factory.mktemp("pair") / "tokens"
    write(prefix, documents, dtype, batches)
    assert pair(prefix) == layout(documents, dtype)
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["tokens.bin", "tokens.idx"]

    found = open_indexed(prefix, verify=True)
    assert found.tokens.dtype == dtype
    assert found.tokens.tolist() == [token for document in documents for token in document]
    assert [found.document(number).tolist() for number in range(len(found.lengths))] == documents
    assert found.lengths.tolist() == [len(document) for document in documents]
    assert found.boundaries.tolist() == list(range(len(documents) + 1))


def test_a_pair_as_a_literal(prefix: Path) -> None:
    write(prefix, [[1, 65_535], [], [258]], UINT16)
    tokens, index = pair(prefix)
    assert tokens.hex() == "0100ffff0201"
    assert index.hex() == (
        "4d4d494449445800000100000000000000" + "08" + "0300000000000000" + "0400000000000000"
        "020000000000000001000000"
        "000000000000000004000000000000000400000000000000"
        "0000000000000000010000000000000002000000000000000300000000000000"
    )


def test_a_dot_in_the_prefix_is_kept(tmp_path: Path) -> None:
    for name in ("c4.train", "c4.holdout"):
        write(tmp_path / name, [[len(name)]], INT32)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c4.holdout.bin", "c4.holdout.idx", "c4.train.bin", "c4.train.idx",
    ]  # fmt: skip
    assert [open_indexed(tmp_path / name).tokens.tolist() for name in ("c4.train", "c4.holdout")] == [[8], [10]]


@pytest.mark.parametrize("size", [1, 300, 65_499, 65_500, 65_536, 100_000])
def test_uint16_below_65500_entries(size: int) -> None:
    assert token_dtype(size) == (INT32 if size >= 65_500 else UINT16)


# --- Megatron itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [UINT16, INT32], ids=str)
def test_megatron_writes_the_same_and_reads_ours(tmp_path: Path, megatron: Any, dtype: Dtype) -> None:
    import torch

    source = np.random.default_rng(0)
    lengths = [0, 1, 7, *source.integers(0, 200, 40).tolist(), 0]
    documents = [source.integers(0, LARGEST[dtype], length, endpoint=True).tolist() for length in lengths]
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    builder = megatron.IndexedDatasetBuilder(f"{theirs}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(f"{theirs}.idx")
    write(ours, documents, dtype, batches=3)
    assert pair(ours) == pair(theirs)

    read = megatron.IndexedDataset(str(ours))
    assert [read[number].tolist() for number in range(len(read))] == documents
    assert read.document_indices.tolist() == list(range(len(documents) + 1))
    assert read.index.dtype == dtype.type
    for vocabulary in (65_499, 65_500):
        assert megatron.DType.optimal_dtype(vocabulary) == token_dtype(vocabulary).type


def test_pairs_of_several_sequences_a_document_are_read(prefix: Path) -> None:
    """Megatron can split a document into sentences; its boundaries then skip sequences."""
    tokens, index = layout([[1, 2], [3], [4, 5, 6]], INT32)
    put(prefix, tokens, index[: 34 + 36] + struct.pack("<4q", 0, 2, 2, 3))
    found = open_indexed(prefix, verify=True)
    assert found.boundaries.tolist() == [0, 2, 2, 3]
    assert found.document(1).tolist() == [3]


# --- what the writer refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "ids"),
    [
        (UINT16, [1, 65_536]),
        (UINT16, [70_000]),
        (UINT16, [-1]),
        (INT32, [2**31]),
        (INT32, [5, -1]),
        (INT32, [2**63 - 1]),
    ],
)
def test_an_id_that_does_not_fit_is_refused_and_nothing_is_left(prefix: Path, dtype: Dtype, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"token ids {min(ids)} to {max(ids)} do not fit {dtype}"):
        write(prefix, [[3, 4], ids], dtype, batches=2)
    assert list(prefix.parent.iterdir()) == []


def test_lengths_that_do_not_add_up_are_refused(prefix: Path) -> None:
    writer = IndexedWriter(prefix, INT32)
    for lengths in ([2], [4], [1, 1], [3, 1], []):
        with pytest.raises(ValueError, match="lengths add up to"):
            writer.write(np.arange(3), np.array(lengths, np.int64))


def test_lengths_that_the_format_cannot_hold_are_refused(prefix: Path) -> None:
    writer = IndexedWriter(prefix, UINT16)
    with pytest.raises(ValueError, match="length -1"):
        writer.write(np.arange(3), np.array([4, -1]))
    endless = np.broadcast_to(np.uint16(0), (2**31,))  # takes no memory
    with pytest.raises(ValueError, match="length 2147483648"):
        writer.write(endless, np.array([2**31]))
    assert writer.documents == writer.tokens == 0


@pytest.mark.parametrize("dtype", [np.int64, np.uint32, np.float32, np.uint8])
def test_other_dtypes_are_refused(prefix: Path, dtype: type) -> None:
    with pytest.raises(ValueError, match="only uint16, int32 are written"):
        IndexedWriter(prefix, np.dtype(dtype))
    assert list(prefix.parent.iterdir()) == []


def test_nothing_has_its_name_before_close_and_an_exception_removes_all(prefix: Path) -> None:
    put(prefix, b"old bin", b"old idx")

    def fail() -> None:
        with IndexedWriter(prefix, INT32) as writer:
            writer.write(np.arange(3), np.array([3]))
            assert pair(prefix) == (b"old bin", b"old idx")
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert pair(prefix) == (b"old bin", b"old idx")
    assert len(list(prefix.parent.iterdir())) == 2


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tiny tmpfs to fill needs root and the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("documents", "batches", "name"),
    [
        (2_400, 1, "idx"),
        (48_000, 1, "bin"),
        (48_000, 4_000, "bin"),
    ],  # .idx does not fit; .bin does not, in one piece or in many
)
def test_full_disk_is_named_and_leaves_nothing(tiny_disk: Path, documents: int, batches: int, name: str) -> None:
    with pytest.raises(ArtifactError, match=rf"tokens\.{name}: the disk is full"):
        write(tiny_disk / "tokens", [[1, 2, 3, 4]] * documents, UINT16, batches)
    assert list(tiny_disk.iterdir()) == []


# --- what the reader refuses ---------------------------------------------------------------------------------------

TINY = [[7, 0, 65_535], [], [9], [1, 2, 3, 4]]


@pytest.mark.parametrize("dtype", [UINT16, INT32], ids=str)
def test_every_truncation_is_refused_at_open(prefix: Path, dtype: Dtype) -> None:
    tokens, index = layout(TINY, dtype)
    for length in range(len(tokens)):
        put(prefix, tokens[:length], index)
        with pytest.raises(ArtifactError, match=rf"tokens\.bin: {length} bytes, but tokens\.idx ends at byte {len(tokens)}"):
            open_indexed(prefix)
    for length in range(len(index)):
        put(prefix, tokens, index[:length])
        with pytest.raises(ArtifactError, match=rf"tokens\.idx: {length} bytes, "):
            open_indexed(prefix)
    for extra in ((tokens + b"\0", index), (tokens, index + b"\0"), (b"", index), (tokens, b"")):
        put(prefix, *extra)
        with pytest.raises(ArtifactError, match=r"tokens\.(bin|idx): \d+ bytes, "):
            open_indexed(prefix)
    put(prefix, tokens, index)
    assert open_indexed(prefix, verify=True).tokens.tolist() == [token for document in TINY for token in document]


def test_a_missing_file_is_named(prefix: Path) -> None:
    put(prefix, *layout(TINY, INT32))
    for name in ("tokens.bin", "tokens.idx"):
        path = prefix.parent / name
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(ArtifactError, match=re.escape(f"{path}: no such file")):
            open_indexed(prefix)
        path.write_bytes(data)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("sequences", "boundaries"),
    # the last four promise a size that is 0 modulo 2**64: arithmetic that wraps would let them pass
    [(2**63, 1), (2**63, 2**63), (2**64 - 1, 2**64 - 1), (2**62, 0), (0, 2**61), (2**62, 2**61), (2**63, 0)],
)
def test_impossible_counts_are_refused_without_reading_them(prefix: Path, sequences: int, boundaries: int) -> None:
    put(prefix, b"", b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, sequences, boundaries))
    with pytest.raises(ArtifactError, match=f"34 bytes, but its header promises {sequences} sequences"):
        open_indexed(prefix)


def test_foreign_headers_are_refused(prefix: Path) -> None:
    tokens, index = layout(TINY, UINT16)
    for at in range(9):
        put(prefix, tokens, index[:at] + bytes([index[at] ^ 1]) + index[at + 1 :])
        with pytest.raises(ArtifactError, match=r"expected b'MMIDIDX\\x00\\x00' version 1"):
            open_indexed(prefix)
    for version in (0, 2, 1 << 56):
        put(prefix, tokens, index[:9] + struct.pack("<Q", version) + index[17:])
        with pytest.raises(ArtifactError, match=f"version {version}; expected"):
            open_indexed(prefix)
    for code in set(range(256)) - {4, 8}:
        put(prefix, tokens, index[:17] + bytes([code]) + index[18:])
        with pytest.raises(ArtifactError, match=rf"dtype code {code}; expected 8 \(uint16\) or 4 \(int32\)"):
            open_indexed(prefix)
    put(prefix, tokens, index[:17] + bytes([4]) + index[18:])  # the other dtype's code
    with pytest.raises(ArtifactError, match=r"tokens\.bin: 16 bytes, but"):
        open_indexed(prefix)


@pytest.mark.parametrize("dtype", [UINT16, INT32], ids=str)
@pytest.mark.parametrize("mask", [0x01, 0x02, 0x80, 0xFF])
def test_verify_finds_every_changed_byte(prefix: Path, dtype: Dtype, mask: int) -> None:
    """All but boundaries that still rise from 0 to the number of sequences: another division of the same tokens."""
    documents = [*TINY, [5, 6]]
    tokens, index = layout(documents, dtype)
    count, sections = len(documents), set()
    for at in range(len(index)):
        changed = index[:at] + bytes([index[at] ^ mask]) + index[at + 1 :]
        put(prefix, tokens, changed)
        bounds = struct.unpack(f"<{count + 1}q", changed[-8 * (count + 1) :])
        another_division = changed[: -8 * (count + 1)] == index[: -8 * (count + 1)] and (
            bounds[0] == 0 and bounds[-1] == count and all(a <= b for a, b in itertools.pairwise(bounds))
        )
        if another_division:
            assert open_indexed(prefix, verify=True).boundaries.tolist() == list(bounds)
            continue
        with pytest.raises(ArtifactError, match=r"tokens\.(idx|bin): ") as caught:
            open_indexed(prefix, verify=True)
        sections |= {word for word in ("negative", "starts at", "boundaries do not") if word in str(caught.value)}
    assert {"starts at", "boundaries do not"} <= sections


def test_verify_finds_lengths_that_swapped_places(prefix: Path) -> None:
    tokens, index = layout(TINY, INT32)
    lengths = struct.pack("<4i", 0, 3, 1, 4)
    put(prefix, tokens, index[:34] + lengths + index[50:])
    open_indexed(prefix)  # sizes alone do not show it
    with pytest.raises(ArtifactError, match="sequence 1 starts at byte 12, its predecessors end at 0"):
        open_indexed(prefix, verify=True)


def test_verify_finds_a_negative_length(prefix: Path) -> None:
    tokens, index = layout(TINY, INT32)
    lengths, starts = struct.pack("<4i", 3, -1, 2, 4), struct.pack("<4q", 0, 12, 8, 16)
    put(prefix, tokens, index[:34] + lengths + starts + index[82:])
    with pytest.raises(ArtifactError, match="sequence 1 has a negative length"):
        open_indexed(prefix, verify=True)
