"""The quality classifier against another minimisation of the same loss, and on held-out text."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats
from threadpoolctl import threadpool_limits

from mates.engine.baselines import quality
from mates.engine.baselines.quality import QualityClassifier
from mates.engine.influence.bags import BUCKETS, ngram_features

END = 200  # of documents; beside the tokens of the others


def good(n: int, seed: int = 0) -> np.ndarray:
    """Mostly of the first hundred tokens."""
    return np.random.default_rng(seed).choice([*range(100)] * 4 + [*range(100, 200)], (n, 30))


def raw(n: int, seed: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (n, 30))


@pytest.mark.parametrize("penalty", [0.1, 2.0])
def test_weights_minimise_the_penalised_loss(penalty: float) -> None:
    positives, negatives = good(30), raw(90)
    features = ngram_features(np.concatenate([positives, negatives])).toarray().astype(np.float64)
    used = np.flatnonzero(features.any(0))
    signs, share = np.repeat([1.0, -1.0], [30, 90]), np.repeat([120 / 60, 120 / 180], [30, 90])
    signed = signs[:, None] * np.column_stack([features[:, used], np.ones(120)])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signed @ weights
        slope = -share / (1 + np.exp(margins))
        penalised = np.append(weights[:-1], 0)
        return float(share @ np.logaddexp(0, -margins) + penalty / 2 * penalised @ penalised), slope @ signed + penalty * penalised

    best = optimize.minimize(
        loss, np.zeros(len(used) + 1), jac=True, method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 0, "maxiter": 5_000}
    )
    assert np.abs(best.jac).max() < 1e-6
    found = QualityClassifier.fit(positives, negatives, END, penalty).weights
    np.testing.assert_allclose(found[[*used, BUCKETS]], best.x, atol=2e-4 * np.abs(best.x).max())
    assert not np.delete(found, [*used, BUCKETS]).any()
    assert loss(found[[*used, BUCKETS]])[0] == pytest.approx(best.fun, rel=1e-7)


def test_scores_are_log_odds() -> None:
    classifier, asked = QualityClassifier.fit(good(30), raw(90), END), good(7, seed=1)
    expected = -(ngram_features(asked).toarray().astype(np.float64) @ classifier.weights[:-1] + classifier.weights[-1])
    np.testing.assert_allclose(classifier.scores(asked), expected, rtol=1e-9, atol=1e-12)
    assert classifier.scores(asked).dtype == np.float64


def test_held_out_text_is_told_apart() -> None:
    classifier = QualityClassifier.fit(good(200), raw(400), END)
    positives, negatives = classifier.scores(good(300, seed=1)), classifier.scores(raw(300, seed=101))
    auc = 1 - stats.mannwhitneyu(positives, negatives).statistic / 300**2
    assert auc > 0.97
    assert abs(np.median(positives) + np.median(negatives)) < 0.5 * np.median(negatives)  # balanced, though there are twice as many


def test_labels_of_chance_teach_nothing() -> None:
    classifier = QualityClassifier.fit(raw(200, seed=1), raw(400, seed=2), END)
    one, other = classifier.scores(raw(300, seed=3)), classifier.scores(raw(300, seed=4))
    assert stats.mannwhitneyu(one, other).pvalue > 0.001


def test_fitting_again_gives_the_same() -> None:
    expected = QualityClassifier.fit(good(30), raw(90), END).weights.tolist()
    for threads in (1, 2):
        with threadpool_limits(threads):
            assert QualityClassifier.fit(good(30), raw(90), END).weights.tolist() == expected


def test_a_score_does_not_depend_on_the_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, asked = QualityClassifier.fit(good(30), raw(90), END), raw(101, seed=5)
    whole = classifier.scores(asked).tolist()
    for pieces in (2, 7, 101):
        assert np.concatenate([classifier.scores(part) for part in np.array_split(asked, pieces)]).tolist() == whole
    monkeypatch.setattr(quality, "BLOCK", 10)
    assert classifier.scores(asked[::-1])[::-1].tolist() == whole
    assert classifier.scores(asked.astype(np.uint16)).tolist() == whole
    assert classifier.scores(asked[:0]).tolist() == []


def test_ends_of_documents_are_not_seen() -> None:
    """Text that ends often is scored as if the token before went on; so are the samples that it learns from."""
    classifier, asked = QualityClassifier.fit(good(30), raw(90), END), raw(7, seed=5)
    ended, repeated, negatives = asked.copy(), asked.copy(), raw(90)
    ended[:, [0, 9, 10]] = END
    repeated[:, [0, 9, 10]] = asked[:, [1, 8, 8]]
    assert classifier.scores(ended).tolist() == classifier.scores(repeated).tolist()
    negatives[:, 4] = negatives[:, 3]
    expected = QualityClassifier.fit(good(30), negatives, END).weights.tolist()
    negatives[:, 4] = END
    assert QualityClassifier.fit(good(30), negatives, END).weights.tolist() == expected


def test_weights_are_saved_and_opened() -> None:
    classifier = QualityClassifier.fit(good(30), raw(90), END)
    assert QualityClassifier.from_array(classifier.weights.copy(), END).scores(raw(9)).tolist() == classifier.scores(raw(9)).tolist()
    for wrong in (classifier.weights[:-1], classifier.weights.astype(np.float32), np.full(BUCKETS + 1, np.nan)):
        with pytest.raises(ValueError, match="expected 262145 finite float64"):
            QualityClassifier.from_array(wrong, END)


def test_what_cannot_be_fitted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="0 positive and 5 negative samples"):
        QualityClassifier.fit(good(0), raw(5), END)
    monkeypatch.setattr(quality, "ITERATIONS", 2)
    with pytest.raises(ValueError, match="no optimum of the classifier after 2 iterations"):
        QualityClassifier.fit(good(30), raw(90), END)
