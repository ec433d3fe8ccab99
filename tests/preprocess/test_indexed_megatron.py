"""The .bin/.idx pair against Megatron-LM's own writer and reader."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mates.preprocess.artifact import ArtifactError
from mates.preprocess.indexed import DTYPE_CODES, IndexedWriter, IndexLayout, open_indexed, token_bytes, token_dtype

megatron: Any = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed: pip install megatron-core==0.16.1"
)

Dtype = np.dtype[Any]
Documents = Sequence[Sequence[Any]]

DTYPES: list[Dtype] = [np.dtype(kind.name) for kind in megatron.DType]


def values(dtype: Dtype) -> st.SearchStrategy[Any]:
    """Token ids: any that the dtype holds, the borders of uint16 where it holds them, and its largest."""
    if dtype.kind == "f":
        width = 8 * dtype.itemsize
        return st.sampled_from([0, 65_535, 65_536]) | st.floats(width=32 if width == 32 else 64, allow_nan=False)
    largest = int(np.iinfo(dtype).max)
    borders = [border for border in (0, 1, 65_535, 65_536, largest) if border <= largest]
    return st.sampled_from(borders) | st.integers(0, largest)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[Dtype, list[list[Any]]]:
    """A dtype and documents, of which some are empty, at both ends as well."""
    dtype: Dtype = draw(st.sampled_from(DTYPES))
    empty: st.SearchStrategy[list[Any]] = st.just([])
    return dtype, draw(st.lists(empty | st.lists(values(dtype), max_size=8), max_size=12))


def theirs(prefix: Path, documents: Documents, dtype: Dtype, sentences: Sequence[Sequence[int]] | None = None) -> None:
    """Megatron's pair, made as its preprocess_data.py does: a document without tokens has no sentence either."""
    sentences = sentences or [[len(document)] if len(document) else [] for document in documents]
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document, lengths in zip(documents, sentences, strict=True):
        builder.add_document(document, lengths)
    builder.finalize(f"{prefix}.idx")


def flat(documents: Documents, dtype: Dtype) -> Any:
    return np.array([token for document in documents for token in document], dtype)


def ours(prefix: Path, documents: Documents, dtype: Dtype, step: int = 5) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for start in range(0, len(documents), step):
            batch = documents[start : start + step]
            writer.write(flat(batch, dtype), np.array([len(document) for document in batch], np.int64))


def pair(prefix: Path) -> tuple[bytes, bytes]:
    return prefix.with_name(f"{prefix.name}.bin").read_bytes(), prefix.with_name(f"{prefix.name}.idx").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples; each writes the same names again."""
    return tmp_path_factory.mktemp("pairs")


def test_dtypes_and_codes_are_megatrons() -> None:
    assert {dtype.name: code for dtype, code in DTYPE_CODES.items()} == {kind.name: kind.value for kind in megatron.DType}
    for vocabulary in (1, 300, 65_499, 65_500, 65_536, 100_000):
        assert megatron.DType.optimal_dtype(vocabulary) == token_dtype(vocabulary).type


@given(corpus=corpora())
def test_the_bytes_are_megatrons(folder: Path, corpus: tuple[Dtype, list[list[Any]]]) -> None:
    dtype, documents = corpus
    theirs(folder / "theirs", documents, dtype)
    ours(folder / "ours", documents, dtype)
    assert pair(folder / "ours") == pair(folder / "theirs")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bytes_are_megatrons_in_every_dtype(folder: Path, dtype: Dtype) -> None:
    source = np.random.default_rng(0)
    largest = 2**24 if dtype.kind == "f" else int(np.iinfo(dtype).max)
    borders = [border for border in (0, 65_535, 65_536, largest) if border <= largest]
    documents = [[], borders, [], [], *(source.integers(0, largest, length).tolist() for length in (1, 7, 0, 200)), []]
    theirs(folder / "theirs", documents, dtype)
    ours(folder / "ours", documents, dtype)
    assert pair(folder / "ours") == pair(folder / "theirs")


@given(corpus=corpora())
def test_megatron_reads_ours(folder: Path, corpus: tuple[Dtype, list[list[Any]]]) -> None:
    dtype, documents = corpus
    documents = [*documents, [1]]  # Megatron cannot map an empty .bin
    ours(folder / "ours", documents, dtype)
    held = [document for document in documents if len(document)]
    for mmap in (True, False):
        found = megatron.IndexedDataset(str(folder / "ours"), mmap=mmap)
        assert found.index.dtype == dtype.type
        assert [found[number].tolist() for number in range(len(found))] == held
        assert found.sequence_lengths.tolist() == [len(document) for document in held]
        assert found.document_indices.tolist() == [0, *itertools.accumulate(len(document) > 0 for document in documents)]


@st.composite
def sentences(draw: st.DrawFn) -> tuple[Dtype, list[list[list[Any]]]]:
    """Documents of any number of sentences, none of them included, and sentences without tokens, which add_item can make."""
    dtype: Dtype = draw(st.sampled_from(DTYPES))
    return dtype, draw(st.lists(st.lists(st.lists(values(dtype), max_size=4), max_size=4), max_size=8))


@given(corpus=sentences())
def test_ours_reads_megatrons(folder: Path, corpus: tuple[Dtype, list[list[list[Any]]]]) -> None:
    dtype, documents = corpus
    joined = [[token for sentence in document for token in sentence] for document in documents]
    theirs(folder / "theirs", joined, dtype, [[len(sentence) for sentence in document] for document in documents])
    found = open_indexed(folder / "theirs")
    assert (found.documents, found.sequences) == (len(documents), sum(map(len, documents)))
    assert [found.document(number).tolist() for number in range(found.documents)] == joined
    every_sentence = [sentence for document in documents for sentence in document]
    assert [found.sequence(number).tolist() for number in range(found.sequences)] == every_sentence
    assert found.tokens.dtype == dtype


@given(corpus=corpora(), cuts=st.lists(st.integers(0, 12), max_size=3), random=st.randoms(use_true_random=False))
def test_pieces_in_any_order_are_megatrons(folder: Path, corpus: tuple[Dtype, list[list[Any]]], cuts: list[int], random: Any) -> None:
    dtype, documents = corpus
    layout = IndexLayout(dtype, sum(len(document) > 0 for document in documents), len(documents))
    writes = [("pieces.idx", 0, layout.header())]
    edges = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    for start, stop in itertools.pairwise(edges):
        before, run = documents[:start], documents[start:stop]
        token = sum(map(len, before))
        pieces = layout.pieces(
            np.array([len(document) for document in run], np.int32),
            first_document=start,
            first_sequence=sum(len(document) > 0 for document in before),
            first_token=token,
        )
        writes += [("pieces.idx", offset, data) for offset, data in pieces]
        writes.append(("pieces.bin", token * dtype.itemsize, token_bytes(flat(run, dtype), dtype)))
    random.shuffle(writes)
    for name in ("pieces.bin", "pieces.idx"):
        (folder / name).write_bytes(b"")
    for name, offset, data in writes:
        with (folder / name).open("r+b") as handle:
            handle.seek(offset)
            handle.write(data)
    theirs(folder / "theirs", documents, dtype)
    ours(folder / "ours", documents, dtype)
    assert pair(folder / "pieces") == pair(folder / "theirs") == pair(folder / "ours")


def test_pairs_that_megatron_joined_are_read(folder: Path) -> None:
    """add_index, which Megatron's merge tool is made of."""
    dtype = np.dtype(np.uint16)
    parts: list[Documents] = [[[1, 2], [], [65_535]], [[]], [[], [3]]]
    builder = megatron.IndexedDatasetBuilder(str(folder / "joined.bin"), dtype=np.uint16)
    for number, part in enumerate(parts):
        ours(folder / f"part{number}", part, dtype)
        builder.add_index(str(folder / f"part{number}"))
    builder.finalize(str(folder / "joined.idx"))
    ours(folder / "ours", [document for part in parts for document in part], dtype)
    assert pair(folder / "joined") == pair(folder / "ours")
    assert open_indexed(folder / "joined").documents == 6


def test_megatrons_multimodal_pairs_are_refused(folder: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(folder / "modes.bin"), dtype=np.int32, multimodal=True)
    builder.add_document([1, 2, 3], [2, 1], [0, 1])
    builder.finalize(str(folder / "modes.idx"))
    with pytest.raises(ArtifactError, match=r"modes\.idx: 76 bytes, but .* 74 bytes\. .* multimodal dataset \(sequence_modes\)"):
        open_indexed(folder / "modes")
