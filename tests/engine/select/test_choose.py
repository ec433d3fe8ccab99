"""The selection rules against exact enumeration and brute force."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mates.engine import random as keyed
from mates.engine.select import choose

SCORES = np.array([0.4, -1.0, 0.0, 1.3, -0.2, 0.7, -0.6, 0.2])
IDS = np.array([12, 3, 40, 7, 2**40, 0, 25, 9])
K, TEMPERATURE, DRAWS = 3, 0.8, 20_000


def top_k(keys: npt.NDArray[np.floating[Any]], ids: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
    """The ids of the k largest keys, ascending."""
    wide = keys.astype(np.float64)
    cut = choose.find_cut(lambda start, stop: (wide[start:stop], ids[start:stop]), len(ids), k)
    return np.sort(ids[cut.chosen(wide, ids)])


def gumbel_top_k(
    scores: npt.NDArray[np.floating[Any]], ids: npt.NDArray[np.int64], k: int, *, temperature: float, seed: int, stage: int
) -> npt.NDArray[np.int64]:
    """A sample of k ids, ascending."""
    return top_k(choose.gumbel_keys(scores, ids, temperature=temperature, seed=seed, stage=stage), ids, k)


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


@given(order=st.permutations(range(8)), seed=st.integers(0, 2**32 - 1), k=st.integers(1, 8))
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
    pairs=st.dictionaries(st.integers(0, 2**62), key_values, min_size=1, max_size=30).map(lambda items: list(items.items())),
    dtype=st.sampled_from([np.float32, np.float64]),
    data=st.data(),
)
def test_top_k_against_sorting(pairs: list[tuple[int, float]], dtype: type[Any], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(pairs)))
    ids, keys = np.array([item for item, _ in pairs], np.int64), np.array([key for _, key in pairs], dtype)
    expected = sorted(item for _, item in sorted((-key, item) for item, key in pairs)[:k])
    found = top_k(keys, ids, k)
    assert found.tolist() == expected
    assert found.dtype == np.int64


def test_among_equal_keys_the_smaller_ids_win() -> None:
    assert top_k(np.zeros(5), np.array([9, 2, 7, 4, 5]), 3).tolist() == [2, 4, 5]
    assert top_k(np.array([0.0, 1.0, 0.0, 1.0, 0.0]), np.array([9, 2, 7, 4, 5]), 3).tolist() == [2, 4, 5]
    assert top_k(np.array([1.0, 0.0, 1.0, 0.0, 1.0]), np.array([9, 2, 7, 4, 5]), 4).tolist() == [2, 5, 7, 9]


@pytest.mark.parametrize("k", [-1, 0, 9, 100])
def test_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} of 8 candidates"):
        top_k(SCORES, IDS, k)
    with pytest.raises(ValueError, match=f"{k} of 8 candidates"):
        gumbel_top_k(SCORES, IDS, k, temperature=1.0, seed=0, stage=0)


# --- in pieces -----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a few candidates were a billion."""
    for name, value in (("SORTED", 0), ("PIECE", 7), ("DIGIT", 6)):
        monkeypatch.setattr(choose, name, value)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_choose_as_sorting_does(in_pieces: None, seed: int) -> None:
    source = np.random.default_rng(seed)
    n = int(source.integers(1, 300))
    ids = source.permutation(10 * n)[:n]
    kinds = (source.normal(size=n), source.integers(-2, 3, n).astype(float), np.zeros(n), source.normal(size=n) * 1e-310)
    for keys, k in itertools.product(kinds, {1, n // 2 + 1, n}):
        expected = sorted(ids[np.lexsort((ids, -keys))[:k]].tolist())
        assert top_k(keys, ids, k).tolist() == expected


def test_ranks_that_count_a_part_each_find_the_same(in_pieces: None) -> None:
    """Four ranks, one after the other: each pass adds up what they counted."""
    source = np.random.default_rng(1)
    keys, ids = source.normal(size=100).round(1), source.permutation(1000)[:100]
    expected = choose.find_cut(lambda start, stop: (keys[start:stop], ids[start:stop]), 100, 31)
    bounds = [0, 10, 55, 56, 100]
    counted: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(4)]

    def rank_cut(number: int) -> choose.Cut:
        part = range(bounds[number], bounds[number + 1])
        return choose.find_cut(lambda start, stop: (keys[start:stop], ids[start:stop]), 100, 31, part=part, sums=meet(number))

    barrier = threading.Barrier(4)

    def meet(number: int) -> Any:
        def sums(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            counted[number].append(counts)
            barrier.wait()
            total: npt.NDArray[np.int64] = np.sum([own[len(counted[number]) - 1] for own in counted], axis=0)
            return total

        return sums

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(rank_cut, range(4)))
    assert found == [expected] * 4


def test_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="not a number"):
        choose.codes_of(np.array([0.0, math.nan]))
