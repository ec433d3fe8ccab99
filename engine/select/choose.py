"""The selection rules, over any number of candidates in bounded memory.

Candidates come in pieces, by position. A piece's keys are computed again in each pass, so that nothing of the size of the candidates is
held. Three passes find where the chosen end, as a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.random import gumbel

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
U64 = npt.NDArray[np.uint64]
Piece = Callable[[int, int], tuple[Floats, Ids]]
"""Keys [m] and sample ids [m] of candidates start … stop."""
Sums = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]

PIECE = 1 << 20  # candidates whose keys are held at a time
SORTED = 1 << 16  # candidates that are simply sorted
DIGIT = 20  # bits of a key that a pass counts
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True)
class Cut:
    """Where the chosen end: chosen is whose code is larger than ``code``, or equal while the id's complement is at least ``complement``."""

    code: np.uint64
    complement: np.uint64

    def chosen(self, keys: Floats, ids: Ids) -> npt.NDArray[np.bool_]:
        """Which of some candidates are chosen."""
        codes = codes_of(keys)
        chosen: npt.NDArray[np.bool_] = (codes > self.code) | ((codes == self.code) & (~ids.astype(np.uint64) >= self.complement))
        return chosen


def codes_of(keys: Floats) -> U64:
    """Whole numbers in the order of the keys: [n] float64 → [n] uint64. ValueError where a key is not a number."""
    if np.isnan(keys).any():
        raise ValueError("a key is not a number")
    raw = (keys + 0.0).view(np.uint64)  # −0 becomes 0, its equal
    return np.where(raw & _SIGN, ~raw, raw | _SIGN)


def find_cut(piece: Piece, n: int, k: int, *, part: range | None = None, sums: Sums = lambda counts: counts) -> Cut:
    """Where the k largest of n keys end; among equal keys those with smaller ids are larger.

    Radix selection, of more than some thousands: each pass counts the next 20 bits of the keys' codes, then of the ids' complements, among
    candidates that share the bits known so far, until all that share them are chosen.

    Args:
        piece: keys and ids by position; ids are different. n: candidates. k: how many are chosen, at least one.
        part: the positions that this rank counts; all by default. sums: adds counts up over ranks.
    """
    if not 0 < k <= n:
        raise ValueError(f"{k} of {n} candidates")
    if n <= SORTED:
        keys, ids = piece(0, n)
        last = np.lexsort((ids, -keys))[k - 1]
        return Cut(codes_of(keys)[last], ~ids.astype(np.uint64)[last])
    part, left = range(n) if part is None else part, k
    prefix = [np.uint64(0), np.uint64(0)]
    for word, fixed in ((word, fixed) for word in range(2) for fixed in range(0, 64, DIGIT)):
        width = min(DIGIT, 64 - fixed)
        shift, counts = np.uint64(64 - fixed - width), np.zeros(1 << width, np.int64)
        for keys, ids in _pieces(piece, part):
            words = [codes_of(keys), ~ids.astype(np.uint64)]
            shares = np.ones(len(ids), np.bool_)
            if word == 1:
                shares &= words[0] == prefix[0]
            if fixed:
                shares &= (words[word] ^ prefix[word]) >> (shift + np.uint64(width)) == 0
            digits = (words[word][shares] >> shift) & np.uint64((1 << width) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << width)
        counts = sums(counts)
        larger = np.cumsum(counts[::-1])[::-1] - counts
        digit = int(np.flatnonzero(larger < left)[0])
        left -= int(larger[digit])
        prefix[word] |= np.uint64(digit) << shift
        if counts[digit] == left:
            break
    return Cut(*prefix)


def _pieces(piece: Piece, part: range) -> Iterator[tuple[Floats, Ids]]:
    for first in range(part.start, part.stop, PIECE):
        yield piece(first, min(first + PIECE, part.stop))


def gumbel_keys(scores: npt.NDArray[np.floating[Any]], ids: Ids, *, temperature: float, seed: int, stage: int) -> Floats:
    """Keys whose k largest are a sample without replacement with probabilities ∝ exp(−score / temperature) (Kool et al., arXiv 1903.06059).

    −score / temperature + Gumbel noise: lower scores (more helpful) are likelier. The noise of an id depends on (seed, stage, id) alone.

    Args:
        scores: [n], in standard deviations of the labels. ids: [n], sample ids. temperature: above 0, in the unit of the scores.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    return -scores.astype(np.float64) / temperature + gumbel(ids, seed, "select", stage)
