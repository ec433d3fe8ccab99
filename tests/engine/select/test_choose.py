"""The selection rules against exact enumeration and brute force."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mates.engine import random as keyed
from mates.engine.select.choose import gumbel_top_k, in_training_order, top_k

SCORES = np.array([0.4, -1.0, 0.0, 1.3, -0.2, 0.7, -0.6, 0.2])
IDS = np.array([12, 3, 40, 7, 2**40, 0, 25, 9])
K, TEMPERATURE, DRAWS = 3, 0.8, 20_000


def exact_probabilities() -> dict[frozenset[int], float]:
    """Of each set of three: the sum over its orders of the Plackett–Luce law with weights exp(−score / temperature)."""
    weights = {int(item): math.exp(-score / TEMPERATURE) for item, score in zip(IDS, SCORES, strict=True)}
    probabilities: Counter[frozenset[int]] = Counter()
    for order in itertools.permutations(weights, K):
        probability, left = 1.0, sum(weights.values())
        for item in order:
            probability *= weights[item] / left
            left -= weights[item]
        probabilities[frozenset(order)] += probability  # type: ignore[assignment]
    return dict(probabilities)


def chi_square() -> Any:
    """The test of DRAWS draws, one a seed, against the exact law: 56 sets, 55 degrees of freedom."""
    expected = exact_probabilities()
    counts = Counter(frozenset(gumbel_top_k(SCORES, IDS, K, temperature=TEMPERATURE, seed=seed, stage=2).tolist()) for seed in range(DRAWS))
    assert counts.keys() <= expected.keys()
    return stats.chisquare([counts[item] for item in expected], [DRAWS * share for share in expected.values()])


def test_exact_law() -> None:
    expected = exact_probabilities()
    assert len(expected) == math.comb(8, 3) == 56
    assert sum(expected.values()) == pytest.approx(1, abs=1e-12)
    assert min(expected.values()) * DRAWS > 5  # enough in every cell for chi-square
    assert max(expected, key=lambda item: expected[item]) == {3, 25, 2**40}  # the three lowest scores


def test_gumbel_top_k_samples_the_plackett_luce_law() -> None:
    assert chi_square().pvalue > 0.001


def test_noise_of_the_other_sign_would_be_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where noise is added before the *smallest* values are taken."""
    monkeypatch.setattr("mates.engine.select.choose.gumbel", lambda *arguments: -keyed.gumbel(*arguments))
    result = chi_square()
    assert result.statistic > 1_000
    assert result.pvalue < 1e-100


def test_noise_is_that_of_seed_stage_and_id() -> None:
    for seed, stage in itertools.product(range(20), (0, 1, 5)):
        noise = keyed.gumbel(IDS, seed, "select", stage)
        keys = {int(item): -score / 0.3 + value for item, score, value in zip(IDS, SCORES, noise, strict=True)}
        expected = sorted(sorted(keys, key=lambda item: keys[item], reverse=True)[:K])
        assert gumbel_top_k(SCORES, IDS, K, temperature=0.3, seed=seed, stage=stage).tolist() == expected


@given(order=st.permutations(range(8)), seed=st.integers(0, 2**32 - 1), k=st.integers(0, 8))
def test_the_order_of_candidates_does_not_matter(order: list[int], seed: int, k: int) -> None:
    def chosen(scores: npt.NDArray[np.float64], ids: npt.NDArray[np.int64]) -> list[int]:
        return list(gumbel_top_k(scores, ids, k, temperature=0.5, seed=seed, stage=1).tolist())

    assert chosen(SCORES[order], IDS[order]) == chosen(SCORES, IDS)


def test_scores_of_lower_precision_choose_the_same() -> None:
    coarse = SCORES.astype(np.float32)
    for seed in range(50):
        one, other = (
            gumbel_top_k(scores, IDS, K, temperature=1e-3, seed=seed, stage=0).tolist() for scores in (coarse, coarse.astype(np.float64))
        )
        assert one == other


def test_limits_of_the_temperature() -> None:
    helpful = sorted(IDS[np.argsort(SCORES)[:K]].tolist())
    assert all(gumbel_top_k(SCORES, IDS, K, temperature=1e-6, seed=seed, stage=0).tolist() == helpful for seed in range(50))
    counts = Counter(item for seed in range(4_000) for item in gumbel_top_k(SCORES, IDS, 1, temperature=1e9, seed=seed, stage=0).tolist())
    assert stats.chisquare([counts[int(item)] for item in IDS]).pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.0, -1.0, -math.inf])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        gumbel_top_k(SCORES, IDS, K, temperature=temperature, seed=0, stage=0)


# --- top-k ---------------------------------------------------------------------------------------------------------

key_values = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 1e30, -1e30, math.inf, -math.inf]) | st.floats(allow_nan=False, width=32)


@given(
    pairs=st.dictionaries(st.integers(0, 2**62), key_values, max_size=30).map(lambda items: list(items.items())),
    dtype=st.sampled_from([np.float32, np.float64]),
    data=st.data(),
)
def test_top_k_against_sorting(pairs: list[tuple[int, float]], dtype: type[Any], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(pairs)))
    ids, keys = np.array([item for item, _ in pairs], np.int64), np.array([key for _, key in pairs], dtype)
    expected = sorted(item for _, item in sorted((-key, item) for item, key in pairs)[:k])
    found = top_k(keys, ids, k)
    assert found.tolist() == expected
    assert found.dtype == np.int64


def test_among_equal_keys_the_smaller_ids_win() -> None:
    assert top_k(np.zeros(5), np.array([9, 2, 7, 4, 5]), 3).tolist() == [2, 4, 5]
    assert top_k(np.array([0.0, 1.0, 0.0, 1.0, 0.0]), np.array([9, 2, 7, 4, 5]), 3).tolist() == [2, 4, 5]
    assert top_k(np.array([1.0, 0.0, 1.0, 0.0, 1.0]), np.array([9, 2, 7, 4, 5]), 4).tolist() == [2, 5, 7, 9]


@pytest.mark.parametrize("k", [-1, 9, 100])
def test_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} of 8 candidates"):
        top_k(SCORES, IDS, k)
    with pytest.raises(ValueError, match=f"{k} of 8 candidates"):
        gumbel_top_k(SCORES, IDS, k, temperature=1.0, seed=0, stage=0)


# --- training order ------------------------------------------------------------------------------------------------


@given(
    ids=st.sets(st.integers(0, 2**62), max_size=40),
    seed=st.integers(0, 2**32 - 1),
    stage=st.integers(0, 9),
    data=st.data(),
)
def test_training_order_is_a_permutation_of_the_set(ids: set[int], seed: int, stage: int, data: st.DataObject) -> None:
    one, other = (np.array(data.draw(st.permutations(sorted(ids))), np.int64) for _ in range(2))
    ordered = in_training_order(one, seed=seed, stage=stage)
    assert Counter(ordered.tolist()) == Counter(ids)
    assert in_training_order(other, seed=seed, stage=stage).tolist() == ordered.tolist()
    rank = dict(zip(one.tolist(), keyed.bits(one, seed, "order", stage).tolist(), strict=True))
    assert ordered.tolist() == sorted(ids, key=lambda item: (rank[item], item))


def test_training_orders_are_uniform_and_differ_between_stages() -> None:
    ids = np.array([5, 1, 300])
    counts = Counter(tuple(in_training_order(ids, seed=seed, stage=seed % 3).tolist()) for seed in range(3_000))
    assert stats.chisquare([counts[order] for order in itertools.permutations([1, 5, 300])]).pvalue > 0.001
    many = np.arange(1_000)
    orders = [in_training_order(many, seed=seed, stage=stage) for seed, stage in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations([many, *orders], 2):
        assert np.count_nonzero(one == other) < 10
