"""Samples as slices of the flat token stream, and which document a sample begins in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates.engine.data.corpus import Corpus, open_corpus, sample_count
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost
from mates.preprocess.indexed import IndexedWriter


def write_corpus(directory: Path, documents: list[list[int]], dtype: Any = np.int32) -> None:
    with IndexedWriter(directory / "tokens", np.dtype(dtype)) as writer:
        for document in documents:
            writer.write(np.array(document, np.int64), np.array([len(document)]))
    artifact.commit(directory, kind="corpus", settings={}, inputs={}, info={"dtype": "x", "tokens": 5}, cost=Cost())


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


lists_of_documents = st.lists(st.lists(st.integers(0, 65_535), max_size=9), min_size=1, max_size=12)


@given(
    documents=lists_of_documents,
    length=st.integers(1, 12),
    dtype=st.sampled_from([np.uint16, np.int32]),
    data=st.data(),
)
def test_samples_are_slices_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], length: int, dtype: Any, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, documents, dtype)
    tokens = flat(documents)
    slices = [tokens[start : start + length + 1] for start in range(0, len(tokens), length)]
    whole = [piece for piece in slices if len(piece) == length + 1]
    if not whole:
        with pytest.raises(ArtifactError, match=f"{len(tokens)} tokens, too few for one sample of {length} \\+ 1"):
            open_corpus(directory, length)
        return
    corpus = open_corpus(directory, length, verify=data.draw(st.booleans()))
    assert corpus.samples == sample_count(len(tokens), length) == len(whole)
    windows = corpus.windows(np.arange(len(whole)))
    assert windows.tolist() == whole
    assert windows.dtype == np.int64
    assert windows.shape == (len(whole), length + 1)
    # the labels of the samples, one after the other, are the stream from its second token on: none twice, none left out
    assert windows[:, 1:].ravel().tolist() == tokens[1 : len(whole) * length + 1]
    assert len(tokens) - (len(whole) * length + 1) < length
    chosen = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=8))
    assert corpus.windows(np.array(chosen, np.int64)).tolist() == [whole[item] for item in chosen]


@settings(max_examples=50)
@given(documents=lists_of_documents, length=st.integers(1, 4))
def test_document_of_a_sample_by_brute_force(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], length: int) -> None:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, documents, np.uint16)
    owner = [number for number, document in enumerate(documents) for _ in document]
    if len(owner) < length + 1:
        return
    corpus = open_corpus(directory, length)
    expected = [(directory, owner[sample * length]) for sample in range(corpus.samples)]
    assert [corpus.document_of(sample) for sample in range(corpus.samples)] == expected


@pytest.mark.parametrize(("tokens", "length", "samples"), [(0, 4, 0), (1, 1, 0), (2, 1, 1), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2)])
def test_sample_counts(tokens: int, length: int, samples: int) -> None:
    assert sample_count(tokens, length) == samples


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_corpus(tmp_path, [[1, 2, 3], [4, 5, 6, 7, 8], [9]])
    return open_corpus(tmp_path, 2)


@pytest.mark.parametrize("ids", [[4], [-1], [0, 1, 4], [2, -1, 0], [2**40]])
def test_ids_outside_the_corpus_are_index_errors(corpus: Corpus, ids: list[int]) -> None:
    assert corpus.samples == 4
    with pytest.raises(IndexError, match=f"sample ids {min(ids)} to {max(ids)} of 4"):
        corpus.windows(np.array(ids))
    for sample in ids:
        if not 0 <= sample < 4:
            with pytest.raises(IndexError, match=f"sample id {sample} of 4"):
                corpus.document_of(sample)


def test_no_ids_are_no_windows(corpus: Corpus) -> None:
    assert corpus.windows(np.zeros(0, np.int64)).shape == (0, 3)


def test_manifest_figures(corpus: Corpus, tmp_path: Path) -> None:
    assert corpus.fingerprint == artifact.load(tmp_path).fingerprint
    assert corpus.info("tokens") == 5


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no complete corpus artifact"):
        open_corpus(tmp_path, 2)
    (tmp_path / "labels.parquet").write_bytes(b"labels")
    artifact.commit(tmp_path, kind="labels", settings={}, inputs={}, info={}, cost=Cost())
    with pytest.raises(ArtifactError, match="holds a 'labels' artifact, expected 'corpus'"):
        open_corpus(tmp_path, 2)


def test_a_changed_token_is_found_when_it_is_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    data = bytearray(path.read_bytes())
    data[8] ^= 1
    path.write_bytes(data)
    assert open_corpus(tmp_path, 2).windows(np.array([1])).tolist() == [[2, 4, 5]]
    with pytest.raises(ArtifactError, match=re.escape(f"{path}: BLAKE3")):
        open_corpus(tmp_path, 2, verify=True)
