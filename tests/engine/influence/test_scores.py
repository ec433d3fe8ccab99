"""Score files that are damaged, stale, short, of another shape or not finite are each refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mates.engine.influence.score import Scores, open_scores, shard_name
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost

CORPUS, SAMPLES, CHUNK = "c" * 64, 25, 10


def write(directory: Path, scores: npt.NDArray[np.float32]) -> None:
    """Scores of 25 candidates in three files, with a manifest that says so."""
    for number, start in enumerate(range(0, len(scores), CHUNK)):
        artifact.write_array(directory / shard_name(number), scores[start : start + CHUNK])
    artifact.commit(
        directory,
        kind="scores",
        settings={"chunk_size": CHUNK},
        inputs={"corpus": CORPUS},
        info={"samples": SAMPLES, "references": ["task"], "model": "ngram", "dropped": 0, "mean_sd": [0.0]},
        cost=Cost(),
    )


def drawn(rows: int = SAMPLES, columns: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


@pytest.fixture
def scores(tmp_path: Path) -> Scores:
    write(tmp_path, drawn())
    return open_scores(tmp_path, CORPUS)


@pytest.mark.parametrize(("start", "stop"), [(0, 25), (0, 10), (10, 20), (3, 4), (7, 23), (19, 25), (20, 21)])
def test_any_part_is_read_over_the_seams_of_files(scores: Scores, start: int, stop: int) -> None:
    assert np.array_equal(scores.read(start, stop), drawn()[start:stop])
    assert np.array_equal(scores.read(), drawn())


def test_scores_of_another_corpus_are_refused_naming_both(scores: Scores) -> None:
    with pytest.raises(ArtifactError, match="scores of corpus cccccccccccc, but the train corpus is dddddddddddd"):
        open_scores(scores.directory, "d" * 64)


def test_a_file_that_is_short_or_missing_is_refused(scores: Scores) -> None:
    path = scores.directory / shard_name(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(path))}: \d+ bytes, the manifest says"):
        open_scores(scores.directory, CORPUS)
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(path))}: not a readable .npy file"):
        scores.read(5, 15)
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{re.escape(str(path))}: missing"):
        open_scores(scores.directory, CORPUS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_by_file_and_row(tmp_path: Path, bad: float) -> None:
    spoilt = drawn()
    spoilt[13, 0] = bad
    write(tmp_path, spoilt)
    found = open_scores(tmp_path, CORPUS)
    assert len(found.read(0, 10)) == 10
    with pytest.raises(
        ArtifactError, match=rf"{shard_name(1)}: the score in row 3 is \[{bad}\], expected finite ones; what made it is broken"
    ):
        found.read(10, 20)


@pytest.mark.parametrize("shape", [(24, 1), (26, 1), (25, 2)])
def test_files_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    write(tmp_path, drawn(*shape))
    with pytest.raises(ArtifactError, match=r"scores of shape \(\d+, \d\), expected \(\d+, 1\); remove .* and score again"):
        open_scores(tmp_path, CORPUS).read()


def test_a_flipped_bit_is_found_by_hashes(scores: Scores) -> None:
    path = scores.directory / shard_name(2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{shard_name(2)}: BLAKE3"):
        artifact.verify(scores.directory)
