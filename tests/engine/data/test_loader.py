"""Batches are the index cut up, at whatever position the loader is opened and however many ranks and threads there are."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.loader import Batches
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost
from mates.preprocess.indexed import IndexedWriter

LENGTH, SAMPLES, BATCH = 7, 60, 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    directory = tmp_path_factory.mktemp("corpus")
    with IndexedWriter(directory / "tokens", np.dtype(np.uint16)) as writer:
        for start in range(10):
            writer.write(np.arange(start, start + 43), np.array([43]))
    artifact.commit(directory, kind="corpus", settings={}, inputs={}, info={}, cost=Cost())
    return open_corpus(directory, LENGTH)


@pytest.fixture(scope="module")
def ids(corpus: Corpus) -> np.ndarray:
    return np.random.default_rng(0).permutation(corpus.samples)[:SAMPLES]


def expected(corpus: Corpus, ids: np.ndarray, first: int) -> list[list[list[int]]]:
    """By plain slices of the token stream."""
    tokens = corpus.parts[0][1].tokens.tolist()
    rows = [tokens[sample * LENGTH : sample * LENGTH + LENGTH + 1] for sample in ids.tolist()]
    return [rows[start : start + BATCH] for start in range(first * BATCH, SAMPLES, BATCH)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_position_gives_the_rest_in_order(corpus: Corpus, ids: np.ndarray, threads: int) -> None:
    for first in range(SAMPLES // BATCH + 1):
        with Batches(corpus, ids, BATCH, first=first, threads=threads) as batches:
            found = list(batches)
        assert [windows.tolist() for windows in found] == expected(corpus, ids, first)
        assert all(windows.dtype == np.uint16 for windows in found)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_parts_are_the_global_batch(corpus: Corpus, ids: np.ndarray, ranks: int) -> None:
    parts = []
    for rank in range(ranks):
        with Batches(corpus, ids, BATCH, rank=rank, ranks=ranks) as batches:
            parts.append(list(batches))
    joined = [np.concatenate(windows).tolist() for windows in zip(*parts, strict=True)]
    assert joined == expected(corpus, ids, 0)


def test_samples_that_fill_no_batch_are_left(corpus: Corpus, ids: np.ndarray) -> None:
    with Batches(corpus, ids[:-1], BATCH) as batches:
        assert len(list(batches)) == SAMPLES // BATCH - 1


def test_an_id_outside_the_corpus_is_said_when_its_batch_is_taken(corpus: Corpus, ids: np.ndarray) -> None:
    wrong = ids.copy()
    wrong[2 * BATCH] = corpus.samples
    with Batches(corpus, wrong, BATCH) as batches:
        taken = iter(batches)
        next(taken)
        next(taken)
        with pytest.raises(IndexError, match=f"sample ids .* to {corpus.samples} of {corpus.samples}"):
            next(taken)


def test_leaving_early_ends_the_threads(corpus: Corpus, ids: np.ndarray) -> None:
    with Batches(corpus, ids, BATCH, threads=2) as batches:
        next(iter(batches))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_what_is_read_is_a_copy(corpus: Corpus, ids: np.ndarray) -> None:
    windows = corpus.stored(ids)
    windows[:] = 0
    assert corpus.stored(ids).any()


def test_an_index_of_a_billion_samples_opens_at_once(corpus: Corpus, tmp_path: Path) -> None:
    """A sparse file: what start-up read of it would be seen in memory."""
    path = tmp_path / "ids.npy"
    ids = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=(10**9,))
    ids[-BATCH:] = range(BATCH)
    del ids
    with Batches(corpus, np.load(path, mmap_mode="r"), BATCH, first=10**9 // BATCH - 1) as batches:
        (last,) = batches
    assert last.tolist()[-1] == corpus.stored(np.array([1]))[0].tolist()
