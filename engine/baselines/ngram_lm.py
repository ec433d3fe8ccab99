"""A bigram language model of tokens: a loss for each sample in microseconds, to filter by perplexity without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mates.engine.baselines.compiled import SPREAD, Floats, Integers, Tokens, Windows, bigram_losses, tokens_of

DISCOUNT = 0.75  # near n1 / (n1 + 2·n2) of large corpora (Ney et al., 1994), and never the 0 or 1 of small ones
PIECE = 1 << 24  # bigrams that are sorted at a time
_GATHER = np.uint64(pow(int(SPREAD), -1, 1 << 32))  # undoes SPREAD
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)

Counted = tuple[npt.NDArray[np.uint64], Integers]
"""Keys first·2**32 + (second·SPREAD mod 2**32) [M], ascending, and how often each was seen [M]."""


@dataclass(frozen=True)
class NgramLanguageModel:
    """Kneser–Ney of order two (ICASSP 1995), interpolated as by Chen & Goodman (Computer Speech & Language, 1999).

    p(b|a) = max(c(ab) − D, 0) / c(a·) + D·N(a·) / c(a·)·p₁(b), c(ab) the count of a bigram, c(a·) its sum over b, N(a·) the number of
    different b after a, and D = 0.75. After an a that was never seen, p(b|a) = p₁(b).
    p₁(b) = max(N(·b) − D, 0) / N(··) + D·T / N(··) / V, N(·b) the number of different a before b, N(··) that of different bigrams, T that
    of b with N(·b) > 0, and V the vocabulary's size: a token is the likelier the more contexts it was seen in, and none is impossible.
    """

    starts: Integers
    """[V + 1], where each token's followers begin."""
    followers: Tokens
    """[M] uint32, the second tokens b of bigrams as b·SPREAD mod 2**32, by first token, ascending."""
    counts: Integers
    """[M], how often each bigram was seen."""

    @classmethod
    def fit(cls, windows: Iterable[Windows], vocab_size: int) -> NgramLanguageModel:
        """Count bigrams within windows.

        Args:
            windows: token ids [n, L] each. vocab_size: V.

        Raises:
            ValueError: a token that is not in the vocabulary, or nothing to count.
        """
        counted: list[Counted] = []
        held: list[npt.NDArray[np.uint64]] = []
        size = 0
        for piece in windows:
            ids = _checked(piece, vocab_size).astype(np.uint64)
            held.append(((ids[:, :-1] << _SHIFT) | _spread(ids[:, 1:], SPREAD)).ravel())
            size += len(held[-1])
            if size >= PIECE:
                _count(held, counted)
                held, size = [], 0
        if size:
            _count(held, counted)
        if not counted:
            raise ValueError("no bigrams to fit to")
        keys, counts = _merged(counted)
        starts = np.searchsorted(keys, np.arange(vocab_size + 1, dtype=np.uint64) << _SHIFT).astype(np.int64)
        return cls(starts, (keys & _LOW).astype(np.uint32), counts)

    @property
    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """All of the model, to save it."""
        return {"starts": self.starts, "followers": self.followers, "counts": self.counts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> NgramLanguageModel:
        """From what ``arrays`` was. ValueError where it is something else."""
        model = cls(*(np.ascontiguousarray(arrays[name]) for name in ("starts", "followers", "counts")))
        dtypes = [array.dtype for array in (model.starts, model.followers, model.counts)]
        if dtypes != [np.int64, np.uint32, np.int64] or not len(model.starts) > 1:
            raise ValueError(f"dtypes {dtypes}, {len(model.starts)} starts: not a bigram language model")
        bigrams, bounds = len(model.followers), model.starts
        ordered = bounds[0] == 0 and bounds[-1] == bigrams == len(model.counts) and (np.diff(bounds) >= 0).all()
        # a bound or token outside the tables would be read without a check by compiled code
        if not (bigrams and ordered and int(model._second.max()) < model.vocab_size and int(model.counts.min()) > 0):
            raise ValueError(f"{bigrams} bigrams of {model.vocab_size} tokens that do not fit together: not a bigram language model")
        return model

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.starts) - 1

    def losses(self, windows: Windows) -> Floats:
        """Mean loss of each window's tokens but the first, given the one before: [n, L] → [n] float64, in nats a token.

        ValueError for a token that is not in the vocabulary, and for windows of a single one.
        """
        ids = _checked(windows, self.vocab_size)
        if ids.shape[1] < 2:
            raise ValueError(f"windows of {ids.shape[1]} tokens, which predict none")
        losses: Floats = bigram_losses(ids, self.starts, self.followers, *self._probabilities)
        return losses

    @property
    def _second(self) -> Tokens:
        """[M], the second tokens themselves."""
        return _spread(self.followers.astype(np.uint64), _GATHER).astype(np.uint32)

    @cached_property
    def _probabilities(self) -> tuple[Floats, Floats, Floats]:
        """The discounted share of each bigram [M], what is left for p₁ after each token [V], and p₁ [V]."""
        types = np.diff(self.starts)
        first = np.repeat(np.arange(self.vocab_size), types)
        totals = np.bincount(first, self.counts, self.vocab_size)
        backoff = np.divide(DISCOUNT * types, totals, out=np.ones(self.vocab_size), where=types > 0)
        contexts = np.bincount(self._second, minlength=self.vocab_size)
        uniform = DISCOUNT * np.count_nonzero(contexts) / self.vocab_size
        lower = (np.maximum(contexts - DISCOUNT, 0) + uniform) / len(self.followers)
        return (self.counts - DISCOUNT) / totals[first], backoff, lower


def _spread(tokens: npt.NDArray[np.uint64], factor: np.uint64) -> npt.NDArray[np.uint64]:
    spread: npt.NDArray[np.uint64] = (tokens * factor) & _LOW
    return spread


def _checked(windows: Windows, vocab_size: int) -> Tokens:
    ids = tokens_of(windows)
    if ids.size and int(ids.max()) >= vocab_size:
        raise ValueError(f"token {int(ids.max())}, the vocabulary has {vocab_size}")
    return ids


def _count(held: list[npt.NDArray[np.uint64]], counted: list[Counted]) -> None:
    """Add what is held to what is counted, merging counts of similar sizes, so that each is merged a few times only."""
    keys, counts = np.unique(np.concatenate(held), return_counts=True)
    counted.append((keys, counts.astype(np.int64)))
    while len(counted) > 1 and len(counted[-2][0]) < 2 * len(counted[-1][0]):
        counted.append(_merged([counted.pop(), counted.pop()]))


def _merged(counted: list[Counted]) -> Counted:
    keys = np.concatenate([part[0] for part in counted])
    order = np.argsort(keys, kind="stable")  # of sorted pieces it merges
    keys, first = np.unique(keys[order], return_index=True)
    return keys, np.add.reduceat(np.concatenate([part[1] for part in counted])[order], first)
