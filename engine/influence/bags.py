"""Samples as bags of hashed token n-grams: what linear models of them read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

BUCKETS = 1 << 18
_MULTIPLIERS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F))
_HIGH = np.uint64(64 - 18)


def ngram_features(windows: npt.NDArray[np.integer[Any]]) -> sparse.csr_array:
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


def ngram_flops(samples: int, length: int) -> float:
    """FLOPs of a weighted sum over the n-grams of samples of ``length`` tokens: a multiply-add for each."""
    return 2.0 * samples * (2 * length - 1)
