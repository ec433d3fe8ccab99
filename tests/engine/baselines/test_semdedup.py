"""SemDeDup against its definition, one pair at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from mates.engine.baselines import semdedup
from mates.engine.baselines.semdedup import Clusters, cluster, similarities


def random_embeddings(n: int = 300, d: int = 12, seed: int = 0) -> np.ndarray:
    """Around five directions, of many lengths, with the last third near copies of the first."""
    source = np.random.default_rng(seed)
    embeddings = source.normal(size=(5, d))[source.integers(0, 5, n)] + 0.5 * source.normal(size=(n, d))
    third = n // 3
    embeddings[n - third :] = embeddings[:third] + 0.01 * source.normal(size=(third, d))
    return (embeddings * source.uniform(0.1, 9, (n, 1))).astype(np.float32)


def by_definition(embeddings: np.ndarray, clusters: Clusters, keep: str) -> list[float]:
    unit = [row / np.linalg.norm(row) for row in embeddings.astype(np.float64)]
    scores = [-1.0] * len(unit)
    for number, centroid in enumerate(clusters.centroids.astype(np.float64)):
        members = [row for row in range(len(unit)) if clusters.of[row] == number]
        members.sort(key=lambda row: unit[row] @ centroid, reverse=keep == "easy")
        for place, row in enumerate(members):
            scores[row] = max([float(unit[row] @ unit[other]) for other in members[:place]], default=-1.0)
    return scores


@pytest.mark.parametrize("keep", ["hard", "easy"])
@pytest.mark.parametrize("block", [1, 7, 4_096])
def test_similarities_are_those_of_the_definition(keep: semdedup.Keep, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semdedup, "BLOCK", block)
    embeddings = random_embeddings()
    clusters = cluster(embeddings, 6, seed=0)
    found = similarities(embeddings, clusters, keep=keep)
    np.testing.assert_allclose(found, by_definition(embeddings, clusters, keep), atol=1e-6)
    assert np.count_nonzero(found == -1) == 6
    assert found.max() <= 1
    assert np.count_nonzero(found > 0.99) >= 90  # of a hundred pairs of copies some fall into different clusters


def test_of_copies_the_one_farther_from_the_centroid_stays() -> None:
    centroids = np.array([[1, 0]], np.float32)
    angles = np.array([0.10, 0.50, 0.12, 0.52])
    embeddings = np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    clusters = Clusters(centroids, np.zeros(4, np.int32))
    assert similarities(embeddings, clusters) == pytest.approx([np.cos(0.02), np.cos(0.02), np.cos(0.38), -1], abs=1e-6)
    assert similarities(embeddings, clusters, keep="easy") == pytest.approx([-1, np.cos(0.38), np.cos(0.02), np.cos(0.02)], abs=1e-6)


def test_each_sample_is_in_the_cluster_of_the_most_similar_centroid() -> None:
    embeddings = random_embeddings()
    clusters = cluster(embeddings, 5, seed=0)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert clusters.of.tolist() == np.argmax(unit @ clusters.centroids.T, axis=1).tolist()
    np.testing.assert_allclose(np.linalg.norm(clusters.centroids, axis=1), 1, rtol=1e-6)
    assert np.bincount(clusters.of).min() > 20
    assert (unit * clusters.centroids[clusters.of]).sum(1).mean() > 0.8


def test_ranks_share_the_clusters() -> None:
    embeddings = random_embeddings()
    clusters = cluster(embeddings, 7, seed=0)
    whole = similarities(embeddings, clusters)
    parts = [similarities(embeddings, clusters, numbers) for numbers in (range(2), range(2, 3), range(3, 7))]
    assert (np.count_nonzero(~np.isnan(parts), axis=0) == 1).all()
    assert np.nansum(parts, axis=0).tolist() == whole.tolist()


def test_results_are_the_same_again_from_a_memory_map_and_with_other_threads(tmp_path: Path) -> None:
    embeddings = random_embeddings(3_000, 40)
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    expected = cluster(embeddings, 20, seed=3)
    scores = similarities(embeddings, expected).tolist()
    for threads in (1, 2):
        with threadpool_limits(threads):
            found = cluster(mapped, 20, seed=3)
            assert found.centroids.tolist() == expected.centroids.tolist()
            assert found.of.tolist() == expected.of.tolist()
            assert similarities(mapped, found).tolist() == scores
    assert cluster(embeddings, 20, seed=4).of.tolist() != expected.of.tolist()


def test_clusters_are_fitted_to_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semdedup, "FITTED", 50)
    embeddings = random_embeddings()
    clusters = cluster(embeddings, 5, seed=0)
    assert len(clusters.of) == 300
    with pytest.raises(ValueError, match="n_samples=50 should be >= n_clusters=51"):
        cluster(embeddings, 51, seed=0)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_embeddings_without_a_direction_are_refused(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = random_embeddings()
    embeddings[[123, 200]] = value
    for fitted in (1, 300):  # found while fitting or while assigning
        monkeypatch.setattr(semdedup, "FITTED", fitted)
        with pytest.raises(ValueError, match=r"embedding 123 has length .*; 2 are so"):
            cluster(embeddings, 1, seed=0)


def test_an_empty_cluster_has_no_samples() -> None:
    clusters = Clusters(np.eye(3, dtype=np.float32), np.array([0, 2, 2], np.int32))
    assert similarities(np.eye(3, dtype=np.float32)[[0, 2, 2]], clusters).tolist() == [-1, -1, 1]


def test_rounding_takes_no_similarity_above_one() -> None:
    once = random_embeddings(200)
    twice = np.concatenate([once, once])
    found = similarities(twice, Clusters(np.eye(12, dtype=np.float32)[:1], np.zeros(400, np.int32)))
    assert found.max() == 1
    assert np.count_nonzero(found > 1 - 1e-6) == 200
