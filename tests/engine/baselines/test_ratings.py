"""Files of a user's scores: what is read, and every mistake with what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mates.engine.baselines import ratings
from mates.engine.baselines.ratings import read_ratings
from mates.preprocess.artifact import ArtifactError

SAMPLES = 9
VALUES = np.arange(SAMPLES) / 8 - 0.5  # exact in every float


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_npy(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "scores.npy", VALUES.astype(dtype))
    found = read_ratings(tmp_path / "scores.npy", SAMPLES)
    ids = np.array([7, 0, 8, 7])
    assert found.scores(ids).tolist() == VALUES[ids].tolist()
    assert found.scores(ids).dtype == np.float64
    assert isinstance(found.values, np.memmap)


@pytest.mark.parametrize("id_type", [pa.int64(), pa.uint64(), pa.int32(), pa.uint16()])
@pytest.mark.parametrize("score_type", [pa.float32(), pa.float64()])
def test_parquet(tmp_path: Path, id_type: pa.DataType, score_type: pa.DataType) -> None:
    ids = np.array([8, 3, 0, 5])
    path = write_parquet(
        tmp_path / "scores.parquet", text=["of no use"] * 4, score=pa.array(VALUES[ids], score_type), sample_id=pa.array(ids, id_type)
    )
    found = read_ratings(path, SAMPLES)
    asked = np.array([5, 8, 0, 5, 3])
    assert found.scores(asked).tolist() == VALUES[asked].tolist()
    assert found.scores(asked).dtype == np.float64


@pytest.mark.parametrize("asked", [[1], [8, 3, 1, 7], [2]])
def test_samples_without_a_score_are_named(tmp_path: Path, asked: list[int]) -> None:
    ids = [8, 3, 0, 5]
    found = read_ratings(write_parquet(tmp_path / "scores.parquet", sample_id=ids, score=VALUES[ids]), SAMPLES)
    missing = [item for item in asked if item not in ids]
    expected = (
        rf"scores.parquet: no score for sample {missing[0]} nor for {len(missing) - 1} others of the {len(asked)} asked for, but 4 of the 9"
    )
    with pytest.raises(ArtifactError, match=expected):
        found.scores(np.array(asked))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (VALUES[:8], r"float64 of shape \(8,\), expected 9 floats, one for each train sample"),
        (np.append(VALUES, 0.0), r"float64 of shape \(10,\), expected 9 floats"),
        (VALUES[:, None], r"float64 of shape \(9, 1\), expected 9 floats"),
        (np.arange(9), r"int64 of shape \(9,\), expected 9 floats"),
        (np.array(["a"] * 9), r"<U1 of shape \(9,\), expected 9 floats"),
        (np.array([None] * 9), r"not a readable \.npy file of numbers \(.*objects.*\), expected 9 floats"),
        (np.where(np.arange(9) == 6, np.nan, VALUES), "score nan in row 6, expected finite numbers"),
        (np.where(np.arange(9) == 8, -np.inf, VALUES), "score -inf in row 8, expected finite numbers"),
    ],
)
def test_npy_that_is_something_else(tmp_path: Path, values: np.ndarray, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratings, "BLOCK", 4)
    np.save(tmp_path / "scores.npy", values, allow_pickle=True)
    with pytest.raises(ArtifactError, match=r"scores\.npy: " + message):
        read_ratings(tmp_path / "scores.npy", SAMPLES)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (tmp_path / "unpickled").touch, ()

    np.save(tmp_path / "scores.npy", np.array([Bomb()] * SAMPLES), allow_pickle=True)
    with pytest.raises(ArtifactError, match="not a readable"):
        read_ratings(tmp_path / "scores.npy", SAMPLES)
    assert not (tmp_path / "unpickled").exists()


def test_npy_that_is_cut_or_no_npy(tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    np.save(path, VALUES)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"not numpy at all"):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"scores\.npy: not a readable \.npy file of numbers .*expected 9 floats"):
            read_ratings(path, SAMPLES)
    with path.open("wb") as handle:
        np.savez(handle, VALUES)
    with pytest.raises(ArtifactError, match=r"scores\.npy: an archive of several arrays, expected 9 floats"):
        read_ratings(path, SAMPLES)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sample_id": [0], "rating": [0.5]}, r"no column score among sample_id, rating, expected the columns"),
        ({"id": [0], "rating": [0.5]}, r"no column sample_id or score among id, rating"),
        ({"sample_id": [0.0], "score": [0.5]}, r"sample_id is double and score is double, expected .*integers"),
        ({"sample_id": [0], "score": [5]}, r"sample_id is int64 and score is int64, expected .*floats"),
        ({"sample_id": ["0"], "score": ["a"]}, r"sample_id is string and score is string"),
        ({"sample_id": pa.array([], pa.int64()), "score": pa.array([], pa.float32())}, "no rows, expected"),
        ({"sample_id": [3, 4, 3], "score": [0.5, 0.5, 0.5]}, "sample_id 3 in rows 0 and 2, expected each once"),
        ({"sample_id": [3, 9, 10], "score": [0.5, 0.5, 0.5]}, r"sample_id 9 in row 1 \(of 2 such rows\), expected 0 to 8"),
        ({"sample_id": [3, -1], "score": [0.5, 0.5]}, r"sample_id -1 in row 1 \(of 1 such rows\), expected 0 to 8"),
        ({"sample_id": pa.array([2**63], pa.uint64()), "score": [0.5]}, r"sample_id 9223372036854775808 in row 0"),
        ({"sample_id": [3, None], "score": [0.5, 0.5]}, r"no sample_id in row 1 \(of 1 such rows\)"),
        ({"sample_id": [3, 4, 5], "score": [0.5, None, None]}, r"no score in row 1 \(of 2 such rows\)"),
        ({"sample_id": [5, 4], "score": [0.5, float("nan")]}, "score nan in row 1, expected finite numbers"),
        ({"sample_id": [5, 4], "score": [float("inf"), 0.5]}, "score inf in row 0, expected finite numbers"),
    ],
)
def test_parquet_that_is_something_else(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=r"scores\.parquet: " + message):
        read_ratings(write_parquet(tmp_path / "scores.parquet", **columns), SAMPLES)


def test_parquet_that_is_cut_or_no_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "scores.parquet", sample_id=range(9), score=VALUES)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:20], b"", b"not Parquet at all", whole[:20] + b"?" * 60 + whole[80:]):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"scores\.parquet: not a readable Parquet file .*expected the columns"):
            read_ratings(path, SAMPLES)


def test_files_that_are_not_there_or_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"scores\.npy: no such file"):
        read_ratings(tmp_path / "scores.npy", SAMPLES)
    with pytest.raises(ArtifactError, match="no such file"):
        read_ratings(tmp_path, SAMPLES)
    (tmp_path / "scores.csv").write_text("0,1\n")
    with pytest.raises(ArtifactError, match=r"scores\.csv: the name ends in '\.csv', expected \.npy or \.parquet"):
        read_ratings(tmp_path / "scores.csv", SAMPLES)
