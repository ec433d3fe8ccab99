"""Fidelity figures against scipy, and the choice of a method."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mates.engine.probe.fidelity import (
    Fidelity,
    Interval,
    cheapest,
    fidelity_of,
    interval,
    lower_bound,
    pearson,
    reliability,
    shown,
    spearman,
)


def columns(n: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    first = generator.standard_normal(n)
    return first, first + noise * generator.standard_normal(n)


def test_correlations_are_scipys() -> None:
    first, second = columns(50, 0.5)
    second[7] = second[8]  # a tie
    assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, rel=1e-12)
    assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic, rel=1e-12)
    stacked = spearman(np.stack([first, -first]), np.stack([second, second]))
    assert stacked == pytest.approx([spearman(first, second), -spearman(first, second)], rel=1e-12)


def test_reliability_foretells_the_wholes_correlation() -> None:
    """Of many parallel halves: the correlation of two wholes is 2r/(1 + r) of the halves' r."""
    generator = np.random.default_rng(1)
    truth = generator.standard_normal(200_000)
    halves = truth + generator.standard_normal((4, len(truth)))
    wholes = (halves[0] + halves[1]) / 2, (halves[2] + halves[3]) / 2
    assert float(reliability(halves[0], halves[1])) == pytest.approx(float(pearson(*wholes)), abs=0.005)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(2), 0
    for number in range(200):
        first = generator.standard_normal(40)
        second = 0.8 * first + 0.6 * generator.standard_normal(40)
        found = interval(pearson, first, second, seed=number)
        assert found is not None
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.8 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_equal_seeds_give_equal_intervals() -> None:
    first, second = columns(30, 1.0)
    assert fidelity_of(first, second, 3) == fidelity_of(first, second, 3)
    assert fidelity_of(first, second, 3) != fidelity_of(first, second, 4)


def test_a_constant_column_has_no_correlation() -> None:
    first, _ = columns(20, 1.0)
    assert interval(spearman, first, np.zeros(20), seed=0) is None
    found = fidelity_of(np.zeros(20), first, seed=0)
    assert found.as_json() == {"spearman": None, "pearson": None}
    assert shown(found.spearman) == "not defined"
    assert cheapest(["linear"], {"linear": [found]}, -1.0, "exact") == "exact"


def test_few_equally_ordered_samples_prove_little() -> None:
    """The bootstrap of a perfect correlation has no width."""
    for n, least in ((8, 0.80), (16, 0.98), (128, 0.9999)):
        first = np.arange(n, dtype=np.float64)
        found = fidelity_of(first, first, seed=0).spearman
        assert found is not None
        assert found.value == 1
        assert least < found.low < 1
    assert lower_bound(0.9, 103) == pytest.approx(np.tanh(np.arctanh(0.9) - 1.96 * np.sqrt((1 + 0.81 / 2) / 100)))
    assert lower_bound(-1.0, 10) >= -1


def fidelity(low: float) -> Fidelity:
    return Fidelity(Interval(1.0, low, 1.0), Interval(1.0, 1.0, 1.0))


def test_the_cheapest_method_that_is_faithful_on_every_reference_is_taken() -> None:
    found = {"frozen": [fidelity(0.99), fidelity(0.90)], "linear": [fidelity(0.96), fidelity(0.95)], "corrected": [fidelity(1.0)] * 2}
    methods = ("frozen", "linear", "corrected")
    assert cheapest(methods, found, 0.95, "exact") == "linear"
    assert cheapest(methods, found, 0.97, "exact") == "corrected"
    assert cheapest(methods[:2], found, 0.97, "exact") == "exact"
    assert cheapest(methods[:1], {"frozen": [fidelity(float("nan"))]}, 0.1, "exact") == "exact"
