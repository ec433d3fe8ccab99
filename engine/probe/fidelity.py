"""How good estimates of influences are: agreement with exact ones, the oracle's own reliability, and the choice of a method by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.random import bits

Floats = npt.NDArray[np.float64]

RESAMPLES = 1_000
RESAMPLES_AT_ONCE = 50  # memory: some 100 bytes for each sample of each
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
    from scipy import stats  # takes a second, which every command would wait for

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
    blocks = []
    for start in range(0, RESAMPLES, RESAMPLES_AT_ONCE):
        counters = np.arange(start * len(first), min(RESAMPLES, start + RESAMPLES_AT_ONCE) * len(first))
        rows = (bits(counters, seed, "fidelity") % np.uint64(len(first))).astype(np.int64).reshape(-1, len(first))
        blocks.append(measure(first[rows], second[rows]))
    drawn = np.concatenate(blocks)
    drawn = drawn[np.isfinite(drawn)]  # a resample of one row many times has no correlation
    value = float(measure(first, second))
    if not len(drawn) or not np.isfinite(value):
        return None
    tail = (1 - CONFIDENCE) / 2
    return Interval(value, float(np.quantile(drawn, tail)), float(np.quantile(drawn, 1 - tail)))


def fidelity_of(estimate: Floats, exact: Floats, seed: int) -> Fidelity:
    """Agreement of estimated with exact influences, [n] both."""
    rank = interval(spearman, estimate, exact, seed)
    if rank is not None:
        rank = replace(rank, low=min(rank.low, lower_bound(rank.value, len(exact))))
    return Fidelity(rank, interval(pearson, estimate, exact, seed))


def lower_bound(rank: float, n: int) -> float:
    """The lower end of Spearman's 95% interval by Fisher's transformation (Bonett & Wright, 2000).

    Resampling n equally ordered pairs gives nothing but equally ordered pairs, so of few samples the bootstrap believes too much. A
    perfect correlation is taken for the best one below it, that of one exchange of neighbours.
    """
    if n < 4:
        return -1.0
    best = 1 - 12 / (n * (n**2 - 1))
    z = math.atanh(min(max(rank, -best), best))
    return math.tanh(z - 1.96 * math.sqrt((1 + rank**2 / 2) / (n - 3)))


def shown(found: Interval | None) -> str:
    """An interval for a terminal."""
    return "not defined" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def cheapest(methods: Sequence[str], found: Mapping[str, Sequence[Fidelity]], least: float, fallback: str) -> str:
    """The first of ``methods``, in order of cost, whose Spearman's lower bound is at least ``least`` on every reference."""
    for method in methods:
        if all(one.spearman is not None and one.spearman.low >= least for one in found[method]):
            return method
    return fallback
