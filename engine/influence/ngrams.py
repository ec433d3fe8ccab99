"""The n-gram influence model: ridge regression on hashed token n-grams of a sample. Seconds on a CPU, and hardly a FLOP.

It shows how much of the influences is in the words alone, and how much more labels would teach (:func:`label_curve`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import lsmr

from mates.engine.data.index import load_array
from mates.engine.influence.bags import BUCKETS, ngram_features, ngram_flops
from mates.engine.influence.features import NO_FEATURES, ExtraFeatures
from mates.engine.influence.model import Samples, Scores
from mates.engine.probe.fidelity import pearson, spearman
from mates.engine.random import KeyedPermutation
from mates.preprocess.artifact import ArtifactError, write_array

PENALTIES = (0.1, 1.0, 10.0)
ITERATIONS = 50
BLOCK = 512  # samples whose features are held at a time
WEIGHTS_FILE = "ngrams.npy"
CURVE = (8, 4, 2, 1)  # which part of the training labels each point has: one in so many
CURVE_LABELS = 16_384  # features of more would take gigabytes; whoever has so many labels does not lack them

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
FeaturesOf = Callable[[Rows], sparse.csr_array]
"""Features of the labelled samples in these rows."""


def all_features(samples: Samples, extra: ExtraFeatures = NO_FEATURES) -> sparse.csr_array:
    """N-grams of samples and, as further columns, extra features: [n, 2**18 + F] float32."""
    parts = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
    return sparse.vstack([_widened(ngram_features(part.windows), extra.compute(part)) for part in parts], format="csr")


def _widened(features: sparse.csr_array, extra: npt.NDArray[np.float32]) -> sparse.csr_array:
    return sparse.hstack([features, sparse.csr_array(extra)], format="csr") if extra.shape[1] else features


@dataclass(frozen=True)
class NgramRidge:
    """Weights of the columns, 2**18 buckets and extra features, and what is predicted where there are none."""

    weights: Floats
    bias: float

    def predict(self, features: sparse.csr_array) -> Floats:
        """Predictions [n], in the unit of the values that it was fitted to."""
        predicted: Floats = features @ self.weights + self.bias
        return predicted


def fit_ridge(features: sparse.csr_array, values: Floats, penalty: float) -> NgramRidge:
    """Minimise Σ (x_i·w + b − y_i)² + penalty·‖w‖² with b the mean of y, by LSMR (Fong & Saunders, 2011).

    Args:
        features: [n, 2**18 + F]. values: [n]. penalty: of the weights.
    """
    bias = float(values.mean())
    weights = lsmr(features, values - bias, damp=penalty**0.5, maxiter=ITERATIONS)[0]
    return NgramRidge(weights, bias)


def best_ridge(features: sparse.csr_array, values: Floats, train: Rows, validation: Rows) -> NgramRidge:
    """The ridge regression on the rows ``train`` whose penalty has the least squared error on ``validation``."""
    models = [fit_ridge(features[train], values[train], penalty) for penalty in PENALTIES]
    return min(models, key=lambda model: float(np.mean((model.predict(features[validation]) - values[validation]) ** 2)))


@dataclass(frozen=True)
class NgramModel:
    """Ridge regression on hashed n-grams, one for each reference task: an :class:`InfluenceModel`."""

    ridges: tuple[NgramRidge, ...]
    extra: ExtraFeatures = NO_FEATURES

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`."""
        return lambda: self.predict(samples)

    def predict(self, samples: Samples) -> Scores:
        """Scores [n, R]."""
        parts = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
        return np.concatenate([self.predict_features(all_features(part, self.extra)) for part in parts])

    def predict_features(self, features: sparse.csr_array) -> Scores:
        """The same from :func:`all_features`."""
        return np.stack([ridge.predict(features) for ridge in self.ridges], axis=1).astype(np.float32)

    def forward_flops(self, samples: int, length: int) -> float:
        """See :class:`Scorer`."""
        return len(self.ridges) * ngram_flops(samples, length) + self.extra.flops(samples, length)

    def save(self, directory: Path) -> None:
        """See :class:`InfluenceModel`."""
        write_array(directory / WEIGHTS_FILE, np.stack([np.append(ridge.weights, ridge.bias) for ridge in self.ridges]))
        self.extra.save(directory)

    @classmethod
    def load(cls, directory: Path) -> NgramModel:
        """What :meth:`save` wrote. ArtifactError where it is something else."""
        extra = ExtraFeatures.load(directory)
        values, expected = np.array(load_array(directory / WEIGHTS_FILE, np.dtype(np.float64), 2)), BUCKETS + len(extra.names) + 1
        if values.shape[1] != expected:
            raise ArtifactError(f"{directory / WEIGHTS_FILE}: {values.shape[1]} weights, expected {expected}; fit the model again")
        return cls(tuple(NgramRidge(row[:-1], float(row[-1])) for row in values), extra)


def ridge_flops(labels: int, length: int) -> float:
    """FLOPs of :func:`best_ridge`: two products with the features an iteration, of every penalty."""
    return 2 * len(PENALTIES) * ITERATIONS * ngram_flops(labels, length)


def label_curve(
    features_of: FeaturesOf, values: Floats, parts: Mapping[str, Rows], seed: int, stage: int, divisors: Sequence[int] = CURVE
) -> list[dict[str, float | None]]:
    """What an n-gram model learns from some of the training labels: one in each of ``divisors``.

    Args:
        features_of: features of the labelled samples. values: their influences [n].
        parts: rows of the ``train``, ``validation`` and ``test`` labels. Of many, 16,384 in these shares are taken.
        seed: of the run. stage: the labels' stage.

    Returns:
        For each point the number of training ``labels``, and ``spearman`` and ``pearson`` on the test labels (None where they are
        not defined).
    """
    chosen = some_labels(parts, seed, stage)
    features, at, own = features_of(np.concatenate(list(chosen.values()))), _places(chosen), values[np.concatenate(list(chosen.values()))]
    curve = []
    for part in divisors:
        train = at["train"][: max(2, len(at["train"]) // part)]
        curve.append({"labels": len(train)} | _tested(features, own, at | {"train": train}))
    return curve


def ablation(
    features_of: FeaturesOf, names: Sequence[str], values: Floats, parts: Mapping[str, Rows], seed: int, stage: int
) -> list[dict[str, Any]]:
    """What each extra feature adds to an n-gram model: without any, with each alone, with all.

    Args:
        features_of: features of the labelled samples, the extra ones last. names: of those. The others: see :func:`label_curve`.

    Returns:
        For each set of ``features`` their names, and ``spearman`` and ``pearson`` on the test labels.
    """
    chosen = some_labels(parts, seed, stage)
    rows, at = np.concatenate(list(chosen.values())), _places(chosen)
    features, words = features_of(rows), np.arange(BUCKETS)
    sets = [[], *([number] for number in range(len(names)))] + ([list(range(len(names)))] if len(names) > 1 else [])
    return [
        {"features": [names[number] for number in kept]}
        | _tested(features[:, np.append(words, BUCKETS + np.array(kept, np.int64))], values[rows], at)
        for kept in sets
    ]


def some_labels(parts: Mapping[str, Rows], seed: int, stage: int) -> dict[str, Rows]:
    """Rows of the parts, of very many labels some."""
    share = min(1.0, CURVE_LABELS / sum(map(len, parts.values())))
    return {name: _some(rows, max(2, int(len(rows) * share)), seed, stage) for name, rows in parts.items()}


def _places(chosen: Mapping[str, Rows]) -> dict[str, Rows]:
    """Where the rows of each part stand when all are put one after the other."""
    bounds = np.cumsum([0, *map(len, chosen.values())])
    return {name: np.arange(start, stop) for name, start, stop in zip(chosen, bounds[:-1], bounds[1:], strict=True)}


def _tested(features: sparse.csr_array, values: Floats, at: Mapping[str, Rows]) -> dict[str, float | None]:
    """Agreement on the test rows of a model of the training rows."""
    predicted = best_ridge(features, values, at["train"], at["validation"]).predict(features[at["test"]])
    found = {"spearman": float(spearman(predicted, values[at["test"]])), "pearson": float(pearson(predicted, values[at["test"]]))}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def _some(rows: Rows, count: int, seed: int, stage: int) -> Rows:
    return rows[KeyedPermutation(len(rows), seed, "label-curve", stage)(np.arange(min(count, len(rows))))]


def curve_line(curve: Sequence[Mapping[str, float | None]]) -> str:
    """The curve for a terminal."""
    shown = ", ".join(f"{point['labels']} labels {figure(point['spearman'])}" for point in curve)
    return f"an n-gram model's Spearman by number of labels: {shown}"


def figure(value: float | None) -> str:
    """A correlation for a terminal."""
    return "undefined" if value is None else f"{value:.3f}"
