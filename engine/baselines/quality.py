"""A quality classifier: text that is known to be good against the corpus itself.

As GPT-3 (Brown et al., arXiv 2005.14165, appendix A) and DCLM (Li et al., arXiv 2406.11794, section 4.4) filter: a linear classifier on
hashed uni- and bigrams, which DCLM trains with fastText. fastText is no longer maintained; with a bag of n-grams as input its model is a
logistic regression of low rank, and here it is one of full rank whose optimum is unique.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse
from threadpoolctl import threadpool_limits

from mates.engine.baselines.compiled import Windows
from mates.engine.influence.bags import BUCKETS, ngram_features

PENALTY = 0.1
TOLERANCE = 1e-8  # of the gradient of the mean loss
ITERATIONS = 1_000
BLOCK = 512  # samples whose features are made at a time

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class QualityClassifier:
    """Logistic regression on hashed n-grams: log-odds of a sample being of the positives, were both equally many."""

    weights: Floats
    """[2**18 + 1]: of each bucket, and the bias."""
    end: int
    """The end-of-document token, which the classifier does not see: how often text ends is no sign of its quality."""

    @classmethod
    def fit(cls, positives: Windows, negatives: Windows, end: int, penalty: float = PENALTY) -> QualityClassifier:
        """Minimise Σ_i s_i·ln(1 + exp(−y_i·(w·x_i + b))) + penalty/2·‖w‖², s_i = n / (2·samples of the class of i), by L-BFGS.

        x is :func:`~mates.engine.influence.bags.ngram_features` of a sample. All are held: up to 24 bytes a token. The result does not
        depend on the number of threads.

        Args:
            positives: token ids of good text [p, L], y = 1. negatives: token ids of samples of the corpus [m, L], y = −1.
            end: the end-of-document token. penalty: of the weights; the bias has none.

        Raises:
            ValueError: no positives or no negatives, or an optimum that was not found.
        """
        from sklearn.exceptions import ConvergenceWarning  # takes seconds, which every command would wait for
        from sklearn.linear_model import LogisticRegression

        if not (len(positives) and len(negatives)):
            raise ValueError(f"{len(positives)} positive and {len(negatives)} negative samples, expected some of both")
        features = sparse.vstack([*_features(positives, end), *_features(negatives, end)], format="csr")
        labels = np.repeat([1, -1], [len(positives), len(negatives)])
        model = LogisticRegression(C=1 / penalty, class_weight="balanced", tol=TOLERANCE, max_iter=ITERATIONS)
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features, labels)
        if model.n_iter_[0] >= ITERATIONS:
            raise ValueError(f"no optimum of the classifier after {ITERATIONS} iterations at penalty {penalty}; take other samples")
        return cls(np.append(model.coef_[0], model.intercept_[0]), end)

    @classmethod
    def from_array(cls, weights: npt.NDArray[np.generic], end: int) -> QualityClassifier:
        """From what ``weights`` was. ValueError where it is something else."""
        if weights.dtype != np.float64 or weights.shape != (BUCKETS + 1,) or not np.isfinite(weights.astype(np.float64)).all():
            raise ValueError(f"{weights.dtype} of shape {weights.shape}, expected {BUCKETS + 1} finite float64")
        return cls(np.ascontiguousarray(weights, np.float64), end)

    def scores(self, windows: Windows) -> Floats:
        """−log-odds of samples: [n, L] → [n] float64."""
        parts = [features @ -self.weights[:-1] for features in _features(windows, self.end)]
        scores: Floats = np.concatenate([np.empty(0), *parts]) - self.weights[-1]
        return scores


def _features(windows: Windows, end: int) -> list[sparse.csr_array]:
    """In float64, in which optimum and scores are then computed, a block of samples each."""
    return [ngram_features(without(windows[start : start + BLOCK], end)).astype(np.float64) for start in range(0, len(windows), BLOCK)]


def without(windows: Windows, end: int) -> Windows:
    """Windows [n, L] with the token before it in the place of each end-of-document token, at a window's start the first other one."""
    filled, rows = windows.copy(), np.arange(len(windows))
    filled[:, 0] = windows[rows, np.argmax(windows != end, axis=1)]
    for column in np.flatnonzero((windows[:, 1:] == end).any(0)) + 1:
        filled[:, column] = np.where(windows[:, column] == end, filled[:, column - 1], windows[:, column])
    return filled


def packed(texts: Iterable[Windows], length: int, most: int) -> npt.NDArray[np.int64]:
    """Token sequences [N] of any lengths one after the other, cut into at most so many windows [n, L]."""
    held = []
    count = 0
    for tokens in texts:
        held.append(tokens)
        count += len(tokens)
        if count >= most * length:
            break
    joined = np.concatenate(held).astype(np.int64) if held else np.empty(0, np.int64)
    windows = min(most, len(joined) // length)
    return joined[: windows * length].reshape(windows, length)
