"""The n-gram influence model against dense linear algebra, and its label curve on labels of known difficulty."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from scipy import sparse

from mates.engine.influence.bags import BUCKETS, ngram_features
from mates.engine.influence.ngrams import CURVE_LABELS, FeaturesOf, ablation, curve_line, fit_ridge, label_curve


def windows(n: int, length: int = 40, vocabulary: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (n, length))


def parts_of(n: int) -> dict[str, np.ndarray]:
    rows = np.arange(n)
    return {"train": rows[rows % 4 < 2], "validation": rows[rows % 4 == 2], "test": rows[rows % 4 == 3]}


def of(tokens: np.ndarray) -> FeaturesOf:
    return lambda rows: ngram_features(tokens[rows])


def test_features_count_unigrams_and_bigrams() -> None:
    tokens = windows(20)
    features = ngram_features(tokens)
    assert features.shape == (20, BUCKETS)
    for row, ids in zip(features.toarray(), tokens.tolist(), strict=True):
        counts = Counter([(one,) for one in ids] + list(pairwise(ids)))
        expected = np.sort(np.log1p(list(counts.values())))
        expected /= np.linalg.norm(expected)
        assert np.sort(row[row > 0]) == pytest.approx(expected, rel=1e-5)  # 79 n-grams in 262,144 buckets: none collide here
    assert (ngram_features(tokens[3:4]) != features[[3]]).nnz == 0
    swapped = tokens.copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert (ngram_features(swapped) != features).nnz > 0


def test_ridge_is_the_dense_solution() -> None:
    features, values = ngram_features(windows(30)), np.random.default_rng(1).normal(size=30)
    used = np.unique(features.indices)
    dense = features.toarray()[:, used].astype(np.float64)
    for penalty in (0.1, 3.0):
        model = fit_ridge(features, values, penalty)
        expected = np.linalg.solve(dense.T @ dense + penalty * np.eye(len(used)), dense.T @ (values - values.mean()))
        assert model.bias == values.mean()
        assert np.abs(model.weights[used] - expected).max() <= 1e-5 * np.abs(expected).max()
        assert not np.delete(model.weights, used).any()
        assert model.predict(features) == pytest.approx(dense @ expected + values.mean(), abs=1e-5)


def test_the_curve_rises_where_more_labels_teach_more() -> None:
    tokens = windows(1_600)
    helps = np.random.default_rng(2).normal(size=50)
    curve = label_curve(of(tokens), helps[tokens].mean(1), parts_of(1_600), seed=0, stage=1)
    assert [point["labels"] for point in curve] == [100, 200, 400, 800]
    found = [point["spearman"] or 0.0 for point in curve]
    assert found == sorted(found)
    assert found[-1] > 0.9
    assert curve == label_curve(of(tokens), helps[tokens].mean(1), parts_of(1_600), seed=0, stage=1)
    assert curve_line(curve).endswith(f"800 labels {found[-1]:.3f}")


def test_noise_teaches_nothing() -> None:
    curve = label_curve(of(windows(1_600)), np.random.default_rng(3).normal(size=1_600), parts_of(1_600), seed=0, stage=1)
    assert all(abs(point["spearman"] or 0.0) < 4 / 400**0.5 for point in curve)


def test_equal_labels_have_no_curve_but_no_error() -> None:
    curve = label_curve(of(windows(16)), np.zeros(16), parts_of(16), seed=0, stage=1)
    assert [point["spearman"] for point in curve] == [None] * 4
    assert "undefined" in curve_line(curve)


def test_of_very_many_labels_some_are_taken() -> None:
    n = CURVE_LABELS * 2
    curve = label_curve(of(windows(n, length=4)), np.arange(n, dtype=np.float64), parts_of(n), seed=0, stage=1)
    assert [point["labels"] for point in curve] == [1_024, 2_048, 4_096, 8_192]


def test_the_ablation_tells_what_a_feature_adds() -> None:
    """Labels are half words and half a feature of its own, beside one of noise."""
    source, tokens = np.random.default_rng(4), windows(1_600)
    extra = source.normal(size=(1_600, 2)).astype(np.float32)
    words = source.normal(size=50)[tokens].mean(1)
    values = words / words.std() + extra[:, 0]

    def features_of(rows: np.ndarray) -> sparse.csr_array:
        return sparse.hstack([ngram_features(tokens[rows]), sparse.csr_array(extra[rows])], format="csr")

    found = ablation(features_of, ["told", "noise"], values, parts_of(1_600), seed=0, stage=1)
    assert [one["features"] for one in found] == [[], ["told"], ["noise"], ["told", "noise"]]
    without, told, noise, both = (one["spearman"] for one in found)
    assert told > without + 0.1
    assert both > without + 0.1
    assert abs(noise - without) < 0.05
    assert without == label_curve(of(tokens), values, parts_of(1_600), seed=0, stage=1)[-1]["spearman"]
