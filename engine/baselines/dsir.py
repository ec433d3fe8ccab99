"""DSIR: importance weights from hashed n-grams (Xie et al., "Data Selection for Language Models via Importance Resampling",
arXiv 2302.03169)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mates.engine.baselines.compiled import Floats, Integers, Windows, count_buckets, sum_buckets, tokens_of
from mates.preprocess.features import NGRAM_BUCKETS

SMOOTHING = 1e-8  # as in the authors' code: added to the probabilities, which then sum to slightly more than one


@dataclass(frozen=True)
class Dsir:
    """Two bags of hashed token uni- and bigrams, one fitted to the target's text and one to the raw text, as their log ratio.

    ln w(x) = Σ_j c_j(x)·(ln(p_j + 10⁻⁸) − ln(q_j + 10⁻⁸)), c(x) the counts of x in 10,000 buckets, p and q the shares of the buckets in
    the target and in the raw text (section 4 of the paper; the smoothing is the authors' code's). Gumbel-top-k with scores −ln w and
    temperature 1 is the paper's resampling without replacement.
    """

    tables: Floats
    """[10,000], ln(p + 10⁻⁸) − ln(q + 10⁻⁸) of each bucket, in nats."""

    @classmethod
    def fit(cls, target: Iterable[Windows], raw: Iterable[Windows]) -> Dsir:
        """Count n-grams of the target and of the raw text.

        Args:
            target, raw: token ids, in windows [n, L] or in sequences [N] of any lengths. The authors read 10⁹ n-grams of raw text.

        Raises:
            ValueError: no tokens in one of them.
        """
        return cls(log_shares(target, "target") - log_shares(raw, "raw text"))

    @classmethod
    def from_array(cls, tables: npt.NDArray[np.generic]) -> Dsir:
        """From what ``tables`` was. ValueError where it is something else."""
        if tables.dtype != np.float64 or tables.shape != (NGRAM_BUCKETS,) or not np.isfinite(tables.astype(np.float64)).all():
            raise ValueError(f"{tables.dtype} of shape {tables.shape}, expected {NGRAM_BUCKETS} finite float64")
        return cls(np.ascontiguousarray(tables, np.float64))

    def log_weights(self, windows: Windows) -> Floats:
        """ln w of samples in nats: [n, L] → [n] float64."""
        weights: Floats = sum_buckets(tokens_of(windows), self.tables)
        return weights

    def scores(self, windows: Windows) -> Floats:
        """−ln w of samples in nats: [n, L] → [n] float64."""
        return -self.log_weights(windows)

    def relevance(self, windows: Windows) -> Floats:
        """ln w for each of a sample's 2·L − 1 n-grams: [n, L] → [n] float64, in nats, comparable between samples of all lengths."""
        relevance: Floats = self.log_weights(windows) / (2 * windows.shape[1] - 1)
        return relevance


def log_shares(texts: Iterable[Windows], name: str) -> Floats:
    """ln(share + 10⁻⁸) of each bucket in texts [10,000]. ValueError, with their name, where they hold no tokens."""
    counts: Integers = np.zeros(NGRAM_BUCKETS, np.int64)
    for text in texts:
        count_buckets(tokens_of(np.atleast_2d(text)), counts)
    if not counts.any():
        raise ValueError(f"no tokens in the {name}")
    shares: Floats = np.log(counts / counts.sum() + SMOOTHING)
    return shares
