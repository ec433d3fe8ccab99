"""The bigram language model against dictionaries, and as a distribution."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mates.engine.baselines import ngram_lm
from mates.engine.baselines.ngram_lm import NgramLanguageModel

VOCABULARY = 70
D = 0.75


def random_windows(n: int, length: int = 25, seed: int = 0) -> np.ndarray:
    """Skewed tokens; the last ten of the vocabulary never come."""
    return (np.random.default_rng(seed).zipf(1.4, (n, length)) % (VOCABULARY - 10)).astype(np.uint16)


class Definition:
    """Interpolated Kneser–Ney as the docstring's equations have it."""

    def __init__(self, windows: np.ndarray) -> None:
        self.counts = Counter(pair for ids in windows.tolist() for pair in pairwise(ids))

    def lower(self, token: int) -> float:
        contexts = Counter(second for _, second in self.counts)
        uniform = D * len(contexts) / len(self.counts) / VOCABULARY
        return max(contexts[token] - D, 0) / len(self.counts) + uniform

    def probability(self, first: int, second: int) -> float:
        after = [count for (before, _), count in self.counts.items() if before == first]
        if not after:
            return self.lower(second)
        return max(self.counts[first, second] - D, 0) / sum(after) + D * len(after) / sum(after) * self.lower(second)


@pytest.fixture(scope="module")
def fitted() -> NgramLanguageModel:
    return NgramLanguageModel.fit([random_windows(40)], VOCABULARY)


def test_losses_are_those_of_the_definition(fitted: NgramLanguageModel) -> None:
    definition, asked = Definition(random_windows(40)), random_windows(20, seed=1)
    asked[0] = np.arange(25) + 45  # unseen tokens too
    expected = [math.fsum(-math.log(definition.probability(*pair)) for pair in pairwise(ids)) / 24 for ids in asked.tolist()]
    np.testing.assert_allclose(fitted.losses(asked), expected, rtol=1e-9, atol=1e-9)
    assert fitted.losses(asked).dtype == np.float64


def test_next_tokens_are_a_distribution(fitted: NgramLanguageModel) -> None:
    tokens = np.arange(VOCABULARY)
    for first in tokens:
        pairs = np.stack([np.full(VOCABULARY, first), tokens], axis=1)
        losses = fitted.losses(pairs)
        assert np.isfinite(losses).all()
        assert math.fsum(np.exp(-losses)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("piece", [1, 100, 1 << 24])
@pytest.mark.parametrize("pieces", [1, 2, 7, 40])
def test_fitting_does_not_depend_on_the_pieces(
    fitted: NgramLanguageModel, pieces: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngram_lm, "PIECE", piece)
    other = NgramLanguageModel.fit(np.array_split(random_windows(40).astype(np.int64), pieces), VOCABULARY)
    for name, array in fitted.arrays.items():
        assert other.arrays[name].tolist() == array.tolist()


def test_a_loss_does_not_depend_on_the_other_samples(fitted: NgramLanguageModel) -> None:
    asked = random_windows(101, seed=1)
    whole = fitted.losses(asked).tolist()
    for pieces in (2, 7, 101):
        assert np.concatenate([fitted.losses(part) for part in np.array_split(asked, pieces)]).tolist() == whole
    assert fitted.losses(asked[::-1])[::-1].tolist() == whole
    assert fitted.losses(asked.astype(np.int64)).tolist() == whole


def test_text_like_the_fitted_is_easier(fitted: NgramLanguageModel) -> None:
    uniform = np.random.default_rng(0).integers(0, VOCABULARY, (50, 25))
    assert fitted.losses(random_windows(50, seed=1)).max() < fitted.losses(uniform).min()


def test_arrays_are_saved_and_opened(fitted: NgramLanguageModel) -> None:
    asked = random_windows(9, seed=1)
    assert NgramLanguageModel.from_arrays(fitted.arrays).losses(asked).tolist() == fitted.losses(asked).tolist()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("starts", lambda values: values[:9]),
        ("starts", lambda values: values.astype(np.int32)),
        ("starts", lambda values: values[::-1]),
        ("starts", lambda values: values[[0, 2, 1, *range(3, len(values))]]),
        ("followers", lambda values: values + np.uint32(VOCABULARY)),
        ("followers", lambda values: values[:-1]),
        ("counts", lambda values: values[:-1]),
        ("counts", lambda values: values - 1),
    ],
)
def test_arrays_that_do_not_fit_are_refused(fitted: NgramLanguageModel, name: str, change: object) -> None:
    assert callable(change)
    with pytest.raises(ValueError, match="not a bigram language model"):
        NgramLanguageModel.from_arrays(fitted.arrays | {name: change(fitted.arrays[name])})


def test_tokens_outside_the_vocabulary_are_refused(fitted: NgramLanguageModel) -> None:
    for call in (fitted.losses, lambda windows: NgramLanguageModel.fit([windows], VOCABULARY)):
        with pytest.raises(ValueError, match="token 70, the vocabulary has 70"):
            call(np.array([[1, 70]]))
    with pytest.raises(ValueError, match="windows of 1 tokens"):
        fitted.losses(np.array([[1]]))
    with pytest.raises(ValueError, match="no bigrams"):
        NgramLanguageModel.fit([np.zeros((0, 4), np.uint16)], VOCABULARY)
