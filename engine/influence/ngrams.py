"""The n-gram influence model: ridge regression on hashed token n-grams of a sample. Seconds on a CPU, and hardly a FLOP.

It shows how much of the influences is in the words alone, and how much more labels would teach (:func:`label_curve`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.linalg import lsmr

from mates.engine.data.index import load_array
from mates.engine.influence.model import Windows
from mates.engine.probe.fidelity import pearson, spearman
from mates.engine.random import KeyedPermutation
from mates.preprocess.artifact import ArtifactError, write_array

BUCKETS = 1 << 18
PENALTIES = (0.1, 1.0, 10.0)
ITERATIONS = 50
BLOCK = 512  # samples whose features are held at a time
WEIGHTS_FILE = "ngrams.npy"
CURVE = (8, 4, 2, 1)  # which part of the training labels each point has: one in so many
CURVE_LABELS = 16_384  # features of more would take gigabytes; whoever has so many labels does not lack them
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
_HIGH = np.uint64(64 - 18)

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def ngram_features(windows: Windows) -> sparse.csr_array:
    """Hashed uni- and bigrams of samples.

    Args:
        windows: token ids [n, L].

    Returns:
        [n, 2**18] float32: ln(1 + count) of each bucket, every row of length 1.
    """
    n, length = windows.shape
    with np.errstate(over="ignore"):
        first = (windows.astype(np.uint64) + np.uint64(1)) * _MULTIPLIERS[0]
        pairs = (first[:, :-1] ^ (first[:, 1:] >> np.uint64(7))) * _MULTIPLIERS[1]
    buckets = (np.concatenate([first, pairs], axis=1) >> _HIGH).astype(np.int32)
    starts = np.arange(n + 1, dtype=np.int64) * buckets.shape[1]
    features = sparse.csr_array((np.ones(buckets.size, np.float32), buckets.ravel(), starts), shape=(n, BUCKETS))
    features.sum_duplicates()
    features.data = np.log1p(features.data)
    norms = np.sqrt(np.add.reduceat(features.data**2, features.indptr[:-1])) if length else np.ones(n)
    features.data /= np.repeat(norms, np.diff(features.indptr))
    return features


@dataclass(frozen=True)
class NgramRidge:
    """Weights of the buckets [2**18], and what is predicted where there are none."""

    weights: Floats
    bias: float

    def predict(self, features: sparse.csr_array) -> Floats:
        """Predictions [n], in the unit of the values that it was fitted to."""
        predicted: Floats = features @ self.weights + self.bias
        return predicted


def fit_ridge(features: sparse.csr_array, values: Floats, penalty: float) -> NgramRidge:
    """Minimise Σ (x_i·w + b − y_i)² + penalty·‖w‖² with b the mean of y, by LSMR (Fong & Saunders, 2011).

    Args:
        features: [n, 2**18]. values: [n]. penalty: of the weights.
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
    """Ridge regression on hashed n-grams: an :class:`InfluenceModel`."""

    ridge: NgramRidge

    def predict(self, windows: Windows) -> npt.NDArray[np.float32]:
        """See :class:`InfluenceModel`."""
        parts = [windows[start : start + BLOCK] for start in range(0, len(windows), BLOCK)]
        return np.concatenate([self.ridge.predict(ngram_features(part)).astype(np.float32) for part in parts])

    def forward_flops(self, samples: int, length: int) -> float:
        """See :class:`InfluenceModel`."""
        return ngram_flops(samples, length)

    def save(self, directory: Path) -> None:
        """See :class:`InfluenceModel`."""
        write_array(directory / WEIGHTS_FILE, np.append(self.ridge.weights, self.ridge.bias))

    @classmethod
    def load(cls, directory: Path) -> NgramModel:
        """What :meth:`save` wrote. ArtifactError where it is something else."""
        values = np.array(load_array(directory / WEIGHTS_FILE, np.dtype(np.float64), 1))
        if len(values) != BUCKETS + 1:
            raise ArtifactError(f"{directory / WEIGHTS_FILE}: {len(values)} weights, expected {BUCKETS + 1}; fit the model again")
        return cls(NgramRidge(values[:-1], float(values[-1])))


def ngram_flops(samples: int, length: int) -> float:
    """FLOPs of predicting samples of ``length`` tokens: a multiply-add for each n-gram."""
    return 2.0 * samples * (2 * length - 1)


def ridge_flops(labels: int, length: int) -> float:
    """FLOPs of :func:`best_ridge`: two products with the features an iteration, of every penalty."""
    return 2 * len(PENALTIES) * ITERATIONS * ngram_flops(labels, length)


def label_curve(windows: Windows, values: Floats, parts: Mapping[str, Rows], seed: int, stage: int) -> list[dict[str, float | None]]:
    """What an n-gram model learns from an eighth, a quarter, half and all of the training labels.

    Args:
        windows: token ids of the labelled samples [n, L]. values: their influences [n].
        parts: rows of the ``train``, ``validation`` and ``test`` labels. Of many, 16,384 in these shares are taken.
        seed: of the run. stage: the labels' stage.

    Returns:
        For each point the number of training ``labels``, and ``spearman`` and ``pearson`` on the test labels (None where they are
        not defined).
    """
    share = min(1.0, CURVE_LABELS / sum(map(len, parts.values())))
    chosen = {name: _some(rows, max(2, int(len(rows) * share)), seed, stage) for name, rows in parts.items()}
    kept = np.concatenate(list(chosen.values()))
    features, own = ngram_features(windows[kept]), values[kept]
    bounds = np.cumsum([0, *map(len, chosen.values())])
    at = {name: np.arange(start, stop) for name, start, stop in zip(chosen, bounds[:-1], bounds[1:], strict=True)}
    test, truth = features[at["test"]], own[at["test"]]
    curve = []
    for part in CURVE:
        train = at["train"][: max(2, len(at["train"]) // part)]
        predicted = best_ridge(features, own, train, at["validation"]).predict(test)
        found = {"spearman": float(spearman(predicted, truth)), "pearson": float(pearson(predicted, truth))}
        curve.append({"labels": len(train)} | {name: value if np.isfinite(value) else None for name, value in found.items()})
    return curve


def _some(rows: Rows, count: int, seed: int, stage: int) -> Rows:
    return rows[KeyedPermutation(len(rows), seed, "label-curve", stage)(np.arange(min(count, len(rows))))]


def curve_line(curve: Sequence[Mapping[str, float | None]]) -> str:
    """The curve for a terminal."""
    shown = ", ".join(f"{point['labels']} labels {_figure(point['spearman'])}" for point in curve)
    return f"an n-gram model's Spearman by number of labels: {shown}"


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
