"""How good estimates of influences are: agreement with exact ones, the oracle's own reliability, and the choice of a method by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from mates.engine.random import bits

Floats = npt.NDArray[np.float64]

RESAMPLES = 1_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fidelity:
    """Agreement of one method with exact influences on one reference; None where it is not defined, all being alike."""

    spearman: Interval | None
    pearson: Interval | None

    def as_json(self) -> dict[str, Any]:
        """For manifests."""
        return asdict(self)


def spearman(first: Floats, second: Floats) -> Floats:
    """Rank correlation along the last axis; nan where one side is constant."""
    return pearson(stats.rankdata(first, axis=-1), stats.rankdata(second, axis=-1))


def pearson(first: Floats, second: Floats) -> Floats:
    """Correlation along the last axis; nan where one side is constant."""
    first, second = (values - values.mean(-1, keepdims=True) for values in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        products: Floats = (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    return products


def reliability(first: Floats, second: Floats) -> Floats:
    """2r/(1 + r) of two halves' correlation r: what the whole's correlation with another whole would be (Spearman–Brown); 0 below 0."""
    r = np.maximum(pearson(first, second), 0.0)
    whole: Floats = 2 * r / (1 + r)
    return whole


def interval(measure: Callable[[Floats, Floats], Floats], first: Floats, second: Floats, seed: int) -> Interval | None:
    """A measure of two columns [n] with the percentile interval of 1,000 bootstrap samples of their rows, keyed by ``seed``.

    None where the measure is not defined.
    """
    rows = (bits(np.arange(RESAMPLES * len(first)), seed, "fidelity") % np.uint64(len(first))).astype(np.int64).reshape(RESAMPLES, -1)
    drawn = measure(first[rows], second[rows])
    drawn = drawn[np.isfinite(drawn)]  # a resample of one row many times has no correlation
    value = float(measure(first, second))
    if not len(drawn) or not np.isfinite(value):
        return None
    tail = (1 - CONFIDENCE) / 2
    return Interval(value, float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail)))


def fidelity_of(estimate: Floats, exact: Floats, seed: int) -> Fidelity:
    """Agreement of estimated with exact influences, [n] both."""
    return Fidelity(interval(spearman, estimate, exact, seed), interval(pearson, estimate, exact, seed))


def shown(found: Interval | None) -> str:
    """An interval for a terminal."""
    return "not defined" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def cheapest(methods: Sequence[str], found: Mapping[str, Sequence[Fidelity]], least: float, fallback: str) -> str:
    """The first of ``methods``, in order of cost, whose Spearman's lower bound is at least ``least`` on every reference."""
    for method in methods:
        if all(one.spearman is not None and one.spearman.low >= least for one in found[method]):
            return method
    return fallback
