"""The .bin/.idx pair against an independent writer of Megatron's layout; test_indexed_megatron.py asks Megatron itself."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mates.preprocess import artifact, indexed
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.indexed import CHUNK, Indexed, IndexedWriter, IndexLayout, open_indexed, token_bytes, token_dtype

Dtype = np.dtype[Any]

UINT8: Dtype = np.dtype(np.uint8)
UINT16: Dtype = np.dtype(np.uint16)
INT32: Dtype = np.dtype(np.int32)
INT64: Dtype = np.dtype(np.int64)
FLOAT32: Dtype = np.dtype(np.float32)
FLOAT64: Dtype = np.dtype(np.float64)

# struct's letter, Megatron's code, bytes, and the largest integer up to which all are held
FORMAT: dict[Dtype, tuple[str, int, int, int]] = {
    UINT8: ("B", 1, 1, 2**8 - 1),
    np.dtype(np.int8): ("b", 2, 1, 2**7 - 1),
    np.dtype(np.int16): ("h", 3, 2, 2**15 - 1),
    INT32: ("i", 4, 4, 2**31 - 1),
    INT64: ("q", 5, 8, 2**63 - 1),
    FLOAT64: ("d", 6, 8, 2**53),
    FLOAT32: ("f", 7, 4, 2**24),
    UINT16: ("H", 8, 2, 2**16 - 1),
}


def layout(documents: list[list[int]], dtype: Dtype) -> tuple[bytes, bytes]:
    """The .bin and .idx that Megatron-LM's description of its format asks for, with nothing of the project."""
    letter, code, width, _ = FORMAT[dtype]
    tokens = b"".join(struct.pack(f"<{len(document)}{letter}", *document) for document in documents)
    lengths = [len(document) for document in documents if document]
    count = len(lengths)
    starts = [0, *itertools.accumulate(length * width for length in lengths)][:count]
    boundaries = [0, *itertools.accumulate(len(document) > 0 for document in documents)]
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code) + struct.pack("<QQ", count, len(boundaries))
    index += struct.pack(f"<{count}i", *lengths) + struct.pack(f"<{count}q", *starts)
    return tokens, index + struct.pack(f"<{len(boundaries)}q", *boundaries)


def bare(lengths: list[int], starts: list[int], boundaries: list[int]) -> bytes:
    """An .idx of int32 tokens that may say anything."""
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(lengths), len(boundaries))
    return header + struct.pack(f"<{len(lengths)}i{len(starts)}q{len(boundaries)}q", *lengths, *starts, *boundaries)


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
    dtype: Dtype = draw(st.sampled_from([*FORMAT]))
    largest = FORMAT[dtype][3]
    ids = st.integers(0, largest) | st.sampled_from([0, 1, min(65_535, largest), min(65_536, largest), largest])
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

    held = [document for document in documents if document]
    for check in (True, False):
        found = open_indexed(prefix, check=check)
        assert found.checked == check
        assert found.tokens.dtype == dtype
        assert found.tokens.tolist() == [token for document in documents for token in document]
        assert (found.documents, found.sequences) == (len(documents), len(held))
        assert [found.document(number).tolist() for number in range(found.documents)] == documents
        assert [found.sequence(number).tolist() for number in range(found.sequences)] == held
        assert found.lengths.tolist() == [len(document) for document in held]


def test_a_pair_as_a_literal(prefix: Path) -> None:
    write(prefix, [[1, 65_535], [], [258]], UINT16)
    tokens, index = pair(prefix)
    assert tokens.hex() == "0100ffff0201"
    assert index.hex() == (
        "4d4d494449445800000100000000000000" + "08" + "0200000000000000" + "0400000000000000"
        "0200000001000000"
        "00000000000000000400000000000000"
        "0000000000000000010000000000000001000000000000000200000000000000"
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


def test_pairs_of_several_sequences_a_document_are_read(prefix: Path) -> None:
    """Megatron can split a document into sentences; its boundaries then skip sequences. It can also store empty sequences."""
    put(prefix, struct.pack("<6i", *range(1, 7)), bare([2, 1, 0, 3], [0, 8, 12, 12], [0, 0, 2, 2, 4]))
    found = open_indexed(prefix)
    assert [found.document(number).tolist() for number in range(4)] == [[], [1, 2, 3], [], [4, 5, 6]]
    assert [found.sequence(number).tolist() for number in range(4)] == [[1, 2], [3], [], [4, 5, 6]]


def test_numbers_outside_are_refused(prefix: Path) -> None:
    write(prefix, [[1], [], [2]], INT32)
    found = open_indexed(prefix)
    for number in (-1, 3):
        with pytest.raises(IndexError, match=f"document {number} of 3"):
            found.document(number)
    for number in (-1, 2):
        with pytest.raises(IndexError, match=f"sequence {number} of 2"):
            found.sequence(number)


# --- other processes -----------------------------------------------------------------------------------------------


def read_all(found: Indexed, into: Any) -> None:
    into.send([found.document(number).tolist() for number in range(found.documents)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(prefix: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    documents = [*TINY, list(range(50_000))]
    write(prefix, documents, UINT16)
    monkeypatch.chdir(prefix.parent)
    found = open_indexed(Path(prefix.name))  # a relative place that the other process may not share
    monkeypatch.undo()
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=read_all, args=(found, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == documents
    process.join()
    assert process.exitcode == 0
    assert found.document(0).tolist() == documents[0]  # the child's end took nothing from the parent's map


@pytest.mark.parametrize("check", [True, False])
def test_a_pickle_is_the_place_and_the_options(prefix: Path, check: bool) -> None:
    write(prefix, [list(range(50_000))], UINT16)
    found = open_indexed(prefix, check=check)
    data = pickle.dumps(found)
    assert len(data) < 1_000
    again = pickle.loads(data)
    assert again.checked == copy.deepcopy(found).checked == check
    assert methodcaller("document", 0)(again).tolist() == list(range(50_000))
    write(prefix, [[1, 2]], UINT16)
    assert pickle.loads(data).document(0).tolist() == [1, 2]
    prefix.with_name("tokens.bin").unlink()
    with pytest.raises(ArtifactError, match=r"tokens\.bin: no such file"):
        pickle.loads(data)


# --- pieces written by offset --------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[list[int]], list[int], Any]:
    lengths = draw(st.lists(st.just(0) | st.integers(0, 5), max_size=15))
    cuts = sorted(draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    pieces = [lengths[start:stop] for start, stop in itertools.pairwise([0, *cuts, len(lengths)])]
    return pieces, lengths, draw(st.randoms(use_true_random=False))


@given(drawn=runs(), dtype=st.sampled_from([*FORMAT]))
def test_pieces_in_any_order_make_the_file(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[list[list[int]], list[int], Any], dtype: Dtype
) -> None:
    parts, lengths, random = drawn
    prefix = tmp_path_factory.mktemp("pieces") / "tokens"
    ids = np.arange(sum(lengths)) % 100
    index = IndexLayout(dtype, sum(length > 0 for length in lengths), len(lengths))
    writes = [(prefix.with_name("tokens.idx"), 0, index.header())]
    document = sequence = token = 0
    for part in parts:
        of_part = index.pieces(np.array(part, np.int32), first_document=document, first_sequence=sequence, first_token=token)
        writes += [(prefix.with_name("tokens.idx"), offset, data) for offset, data in of_part]
        held = ids[token : token + sum(part)]
        writes.append((prefix.with_name("tokens.bin"), token * dtype.itemsize, token_bytes(held, dtype)))
        document, sequence, token = document + len(part), sequence + sum(length > 0 for length in part), token + sum(part)
    random.shuffle(writes)
    put(prefix, b"", b"")
    for path, offset, data in writes:
        with path.open("r+b") as handle:
            handle.seek(offset)
            handle.write(data)
    ends = [0, *itertools.accumulate(lengths)]
    assert pair(prefix) == layout([ids[start:stop].tolist() for start, stop in itertools.pairwise(ends)], dtype)
    assert index.size == prefix.with_name("tokens.idx").stat().st_size
    # only the leading boundary may be written twice, by runs of no documents at the front
    assert sum(len(data) for path, _, data in writes if path.suffix == ".idx") - index.size in range(0, 8 * len(parts), 8)


@pytest.mark.parametrize("first", [{"first_document": 2}, {"first_document": -1}, {"first_sequence": 1}, {"first_sequence": -1}])
def test_pieces_outside_the_file_are_refused(first: dict[str, int]) -> None:
    places = {"first_document": 0, "first_sequence": 0, "first_token": 0} | first
    with pytest.raises(ValueError, match="do not lie within 3 documents of 2 sequences"):
        IndexLayout(UINT16, 2, 3).pieces(np.array([5, 6]), **places)


def test_more_documents_than_a_chunk(prefix: Path) -> None:
    """Writer and reader work in chunks; what is carried from one to the next, and a fault at each side of a border."""
    lengths = np.arange(2 * CHUNK + 3) % 3
    ids = np.arange(lengths.sum()) % 60_000
    with IndexedWriter(prefix, UINT16) as writer:
        writer.write(ids, lengths)
    found = open_indexed(prefix)
    assert found.lengths.tolist() == lengths[lengths > 0].tolist()
    assert found.pointers.tolist() == (2 * (np.cumsum(lengths) - lengths)[lengths > 0]).tolist()
    assert found.boundaries.tolist() == [0, *np.cumsum(lengths > 0).tolist()]
    index = IndexLayout(UINT16, found.sequences, found.documents)
    whole = pair(prefix)[1]
    for region, number in itertools.product((index.pointers_at, index.boundaries_at), (CHUNK - 1, CHUNK, CHUNK + 1)):
        for value in (-1, 2**62):
            at = region + 8 * number
            prefix.with_name("tokens.idx").write_bytes(whole[:at] + struct.pack("<q", value) + whole[at + 8 :])
            with pytest.raises(ArtifactError, match=rf"sequence {number} starts at|boundaries decrease to .* at ({number}|{number + 1});"):
                open_indexed(prefix)


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
        (UINT8, [256]),
        (np.dtype(np.int8), [128]),
        (np.dtype(np.int16), [2**15]),
        (INT64, [-1]),
        (FLOAT32, [2**24 + 1]),
        (FLOAT32, [-(2**24) - 1]),
        (FLOAT64, [2**53 + 1]),
    ],
)
def test_an_id_that_does_not_fit_is_refused_and_nothing_is_left(prefix: Path, dtype: Dtype, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"token ids {min(ids)} to {max(ids)} do not fit {dtype}"):
        write(prefix, [[3, 4], ids], dtype, batches=2)
    assert list(prefix.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("dtype", "ids"),
    [
        (INT64, np.array([2**63], np.uint64)),
        (FLOAT32, np.array([0.1])),
        (FLOAT32, np.array([1.0, 1e300])),
        (FLOAT32, np.array([2**63 - 1])),
        (FLOAT64, np.array([2**63 - 1])),
    ],
    ids=str,
)
def test_a_value_that_would_be_rounded_is_refused(dtype: Dtype, ids: Any) -> None:
    with pytest.raises(ValueError, match=rf"token ids .* do not fit {dtype}"):
        token_bytes(ids, dtype)


def test_values_that_fit_are_kept() -> None:
    held = np.array([0.5, -2.0, -0.0, np.inf, -np.inf, np.nan])
    assert token_bytes(held, FLOAT32) == struct.pack("<6f", *held)
    assert token_bytes(held, FLOAT64) == held.tobytes()
    assert token_bytes(np.array([3, 65_535], ">u2"), UINT16) == struct.pack("<2H", 3, 65_535)
    assert token_bytes(np.arange(8)[::3], UINT8) == bytes([0, 3, 6])
    assert token_bytes(np.array([]), UINT8) == b""  # no values, so none that does not fit


@pytest.mark.parametrize("dtype", [*FORMAT], ids=str)
def test_ids_of_another_kind_are_refused(dtype: Dtype) -> None:
    kinds = [np.array([True]), np.array([1j]), np.array([1], object), np.array(["1"]), np.array([[1]]), np.array(1)]
    if dtype.kind != "f":
        kinds += [np.array([1.0]), np.array([1.0], np.float32)]
    for ids in kinds:
        with pytest.raises(ValueError, match=rf"token ids of dtype .* and shape .* are stored as {dtype}"):
            token_bytes(ids, dtype)


def test_arrays_may_be_used_again_after_a_write(prefix: Path) -> None:
    ids, lengths = np.array([1, 2, 3], np.uint16), np.array([1, 2], np.int32)
    with IndexedWriter(prefix, UINT16) as writer:
        writer.write(ids, lengths)
        ids[:], lengths[:] = 9, 0
    assert pair(prefix) == layout([[1], [2, 3]], UINT16)


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
    for wrong in (np.array([1.5, 1.5]), np.array([[3]]), np.array([True, True, True])):
        with pytest.raises(ValueError, match="expected one integer a document"):
            writer.write(np.arange(3), wrong)
    with pytest.raises(ValueError, match="length -1"):
        IndexLayout(UINT16, 2, 2).pieces(np.array([1, -1]), first_document=0, first_sequence=0, first_token=0)
    assert writer.documents == writer.tokens == 0


@pytest.mark.parametrize("dtype", ["u4", "u8", "f2", "c8", "?", "O", "S1", ">u2", ">i4"])
def test_other_dtypes_are_refused(prefix: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match="only uint8, int8, int16, int32, int64, float64, float32, uint16 are written"):
        IndexedWriter(prefix, np.dtype(dtype))
    with pytest.raises(ValueError, match="are written"):
        IndexLayout(np.dtype(dtype), 0, 0)
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


@pytest.mark.parametrize("dtype", [UINT16, INT32, FLOAT64], ids=str)
def test_every_truncation_is_refused_at_open(prefix: Path, dtype: Dtype) -> None:
    tokens, index = layout(TINY, dtype)
    for length, check in itertools.product(range(len(tokens)), (True, False)):
        put(prefix, tokens[:length], index)
        with pytest.raises(ArtifactError, match=rf"tokens\.bin: {length} bytes, but tokens\.idx ends at byte {len(tokens)}"):
            open_indexed(prefix, check=check)
    for length, check in itertools.product(range(len(index)), (True, False)):
        put(prefix, tokens, index[:length])
        with pytest.raises(ArtifactError, match=rf"tokens\.idx: {length} bytes, "):
            open_indexed(prefix, check=check)
    for extra in ((tokens + b"\0", index), (tokens, index + b"\0"), (b"", index), (tokens, b"")):
        put(prefix, *extra)
        with pytest.raises(ArtifactError, match=r"tokens\.(bin|idx): \d+ bytes, "):
            open_indexed(prefix, check=False)
    put(prefix, tokens, index)
    assert open_indexed(prefix).tokens.tolist() == [token for document in TINY for token in document]


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
    for code in {*range(256)} - {*range(1, 9)}:
        put(prefix, tokens, index[:17] + bytes([code]) + index[18:])
        with pytest.raises(ArtifactError, match=rf"dtype code {code}; expected 1 \(uint8\), .*, 8 \(uint16\): .* DeepSpeed's differ"):
            open_indexed(prefix)
    for code in (1, 2, 4, 5, 6, 7):  # other dtypes' codes
        put(prefix, tokens, index[:17] + bytes([code]) + index[18:])
        hint = f"DeepSpeed wrote them, whose dtype code {code}" if code in (6, 7) else "another corpus$"
        with pytest.raises(ArtifactError, match=rf"tokens\.bin: 16 bytes, but .*{hint}"):
            open_indexed(prefix, check=False)


def test_multimodal_pairs_are_refused(prefix: Path) -> None:
    tokens, index = layout(TINY, UINT16)
    put(prefix, tokens, index + b"\0\1\1")  # a mode for each of three sequences
    with pytest.raises(ArtifactError, match=r"tokens\.idx: 113 bytes, but .*multimodal dataset \(sequence_modes\)"):
        open_indexed(prefix)


@pytest.mark.parametrize("dtype", [UINT16, INT32], ids=str)
@pytest.mark.parametrize("mask", [0x01, 0x02, 0x80, 0xFF])
def test_every_changed_byte_of_the_index_is_found(prefix: Path, dtype: Dtype, mask: int) -> None:
    """All but boundaries that still rise from 0 to the number of sequences: another division of the same tokens."""
    documents = [*TINY, [5, 6]]
    tokens, index = layout(documents, dtype)
    count, sections = len(documents), set()
    for at in range(len(index)):
        changed = index[:at] + bytes([index[at] ^ mask]) + index[at + 1 :]
        put(prefix, tokens, changed)
        bounds = struct.unpack(f"<{count + 1}q", changed[-8 * (count + 1) :])
        another_division = changed[: -8 * (count + 1)] == index[: -8 * (count + 1)] and (
            bounds[0] == 0 and bounds[-1] == count - 1 and all(a <= b for a, b in itertools.pairwise(bounds))
        )
        if another_division:
            assert open_indexed(prefix).boundaries.tolist() == list(bounds)
            continue
        with pytest.raises(ArtifactError, match=r"tokens\.(idx|bin): ") as caught:
            open_indexed(prefix)
        sections |= {word for word in ("starts at", "boundaries do not", "boundaries decrease") if word in str(caught.value)}
    assert {"starts at", "boundaries do not"} <= sections
    assert "boundaries decrease" in sections or mask == 1  # a changed last bit makes 0, 1, 1, 2 no more than another division


# Each is refused for one reason alone: sizes, ends and all else agree.
CONTRADICTIONS = [
    ([0, 3, 1, 4], [0, 12, 12, 16], [0, 4], "sequence 1 starts at byte 12, its predecessors end at 0"),
    ([3, 1, 4], [4, 12, 16], [0, 3], "sequence 0 starts at byte 4, its predecessors end at 0"),
    ([3, 1, 4], [0, 13, 16], [0, 3], "sequence 1 starts at byte 13, its predecessors end at 12"),
    ([3, -1, 2, 4], [0, 12, 8, 16], [0, 4], "sequence 1 has a negative length, -1"),
    ([3, 1, 4], [0, 12, 16], [0, 2, 1, 3], "boundaries decrease to 1 at 2"),
    ([3, 1, 4], [0, 12, 16], [0, -1, 3], "boundaries decrease to -1 at 1"),
    ([3, 1, 4], [0, 12, 16], [0, 4, 3], "boundaries decrease to 3 at 2"),
    ([3, 1, 4], [0, 12, 16], [1, 3], "boundaries do not run from 0 to 3"),
    ([3, 1, 4], [0, 12, 16], [0, 2], "boundaries do not run from 0 to 3"),
    ([3, 1, 4], [0, 12, 16], [3], "boundaries do not run from 0 to 3"),
    ([3, 1, 4], [0, 12, 16], [], "boundaries do not run from 0 to 3"),
]


@pytest.mark.parametrize(("lengths", "starts", "boundaries", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(prefix: Path, lengths: list[int], starts: list[int], boundaries: list[int], message: str) -> None:
    put(prefix, bytes(32), bare(lengths, starts, boundaries))
    with pytest.raises(ArtifactError, match=rf"tokens\.idx: .*{message}"):
        open_indexed(prefix)
    if "do not run" in message:  # seen at the ends alone
        with pytest.raises(ArtifactError, match=message):
            open_indexed(prefix, check=False)


def test_sums_stop_at_the_end(prefix: Path) -> None:
    """Sequences that already passed the end are refused before more are added up."""
    put(prefix, bytes(32), bare([1] * (CHUNK + 1), [*range(0, 4 * CHUNK, 4), 28], [0, CHUNK + 1]))
    with pytest.raises(ArtifactError, match=f"sequence {CHUNK - 1} ends at byte {4 * CHUNK}, beyond the last one's end 32"):
        open_indexed(prefix)


def test_a_file_cut_while_it_is_read_is_refused(prefix: Path) -> None:
    put(prefix, b"", bytes(84))
    path = prefix.with_name("tokens.idx")
    assert [(first, len(chunk)) for first, chunk in indexed._chunks(path, INT64, 4, 10)] == [(0, 10)]
    with pytest.raises(ArtifactError, match="was cut while it was read"):
        list(indexed._chunks(path, INT64, 4, 11))


def test_unchecked_arrays_never_lead_to_other_data(prefix: Path) -> None:
    """Without the passes over the arrays a slice that leaves the tokens is an error, not a shorter one."""
    for lengths, starts, boundaries in (
        ([3, 1, 4], [0, 2**40, 16], [0, 2, 2, 3]),
        ([3, 1, 4], [-(2**63), 12, 16], [0, 1, 2, 3]),
        ([3, 1, 4], [1, 12, 16], [0, 1, 2, 3]),
        ([9, 1, 4], [0, 12, 16], [0, 1, 2, 3]),
        ([-3, 1, 4], [0, 12, 16], [0, 1, 2, 3]),
        ([3, 1, 4], [0, 12, 16], [0, 2**62, 2, 3]),
        ([3, 1, 4], [0, 12, 16], [0, -2, 2, 3]),
    ):
        put(prefix, bytes(32), bare(lengths, starts, boundaries))
        found = open_indexed(prefix, check=False)
        with pytest.raises(ArtifactError, match=r"tokens\.idx: sequences .* open it with check=True"):
            found.document(0)
    put(prefix, bytes(7), bare([1, 1], [0, 3], [0, 2]))
    with pytest.raises(ArtifactError, match="7 bytes do not hold a whole number of tokens, int32"):
        open_indexed(prefix, check=False)


def test_opening_takes_little_memory(prefix: Path) -> None:
    """Four million sequences in 80 MB of index: neither copied nor kept."""
    count = 1 << 22
    with prefix.with_name("tokens.idx").open("wb") as handle:
        handle.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, count, count + 1))
        handle.truncate(34 + 20 * count)
        handle.seek(34 + 20 * count)
        handle.write(struct.pack("<q", count))
    put_bin = prefix.with_name("tokens.bin")
    put_bin.write_bytes(b"")
    tracemalloc.start()
    try:
        assert open_indexed(prefix).sequences == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


PROBE = """
import pathlib, resource, struct, sys
from mates.preprocess.indexed import open_indexed
from mates.preprocess.artifact import ArtifactError
prefix = pathlib.Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for sequences, boundaries in ((2**63, 1), (2**40, 1), (2**40, 2**40 + 1), (0, 2**63), (1, 2**40), (2**64 - 1, 2**64 - 1)):
    prefix.with_name("tokens.idx").write_bytes(struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, sequences, boundaries) + bytes(100))
    for check in (True, False):
        try:
            open_indexed(prefix, check=check)
        except ArtifactError as error:
            print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.timeout(60)
def test_claims_of_the_impossible_take_no_memory(prefix: Path) -> None:
    put(prefix, b"", b"")
    done = subprocess.run([sys.executable, "-P", "-c", PROBE, str(prefix)], capture_output=True, text=True, check=True)
    *messages, grown_kib = done.stdout.splitlines()
    assert len(messages) == 12
    assert all("134 bytes, but its header promises" in message for message in messages)
    assert int(grown_kib) < 50 * 1024


# --- as part of an artifact ----------------------------------------------------------------------------------------


def test_ten_thousand_flipped_bits_are_found(prefix: Path) -> None:
    """What the pair's own consistency cannot show, such as another token, the manifest's hashes do."""
    source = np.random.default_rng(0)
    lengths = [*source.integers(0, 60, 20).tolist(), 0]
    write(prefix, [source.integers(0, 65_536, length).tolist() for length in lengths], UINT16)
    artifact.commit(prefix.parent, kind="corpus", settings={}, inputs={}, info={}, cost=artifact.Cost())
    whole = {path: path.read_bytes() for path in (prefix.with_name("tokens.bin"), prefix.with_name("tokens.idx"))}
    bits = [(path, bit) for path, data in whole.items() for bit in range(8 * len(data))]
    assert len(bits) >= 10_000
    with ExitStack() as stack:
        handles = {path: stack.enter_context(path.open("r+b", buffering=0)) for path in whole}
        for number in source.choice(len(bits), 10_000, replace=False).tolist():
            path, bit = bits[number]
            byte = whole[path][bit // 8]
            os.pwrite(handles[path].fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
            with pytest.raises(ArtifactError, match=rf"{path.name}: BLAKE3"):
                artifact.verify(prefix.parent, "corpus")
            os.pwrite(handles[path].fileno(), bytes([byte]), bit // 8)
    artifact.verify(prefix.parent, "corpus")
