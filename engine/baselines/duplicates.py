"""Exact duplicates and near-duplicates, as samples come by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from rensa import RMinHashDeduplicator

Windows = npt.NDArray[np.integer[Any]]

SHINGLE = 5  # tokens
PERMUTATIONS = 256  # of a signature: a similarity of 0.8 is estimated to ±0.025
FOUND = 0.99  # of the pairs at the threshold that are to be compared
SEED = 42


class Duplicates:
    """Says of each sample in turn whether it duplicates one that was kept before.

    Exact duplicates have equal XXH3-128 hashes of their tokens. Near-duplicates have sets of runs of five tokens whose Jaccard similarity,
    estimated from MinHash signatures (Broder, 1997), reaches the threshold. Signatures are compared where they agree in a band of
    locality-sensitive hashing. A sample that is kept takes about 5 kB of memory, or 0.1 kB without near-duplicates.

    Args:
        threshold: the Jaccard similarity from which on samples are near-duplicates, or None for exact duplicates alone.

    Raises:
        ValueError: a threshold that is not above 0 and at most 1.
    """

    def __init__(self, threshold: float | None = 0.8) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold}: must be above 0 and at most 1")
        self._digests: set[bytes] = set()
        self._near = None if threshold is None else RMinHashDeduplicator(threshold, PERMUTATIONS, True, bands(threshold), SEED)

    def add(self, windows: Windows) -> npt.NDArray[np.bool_]:
        """Which samples duplicate one that was kept before, of this call or of an earlier one: [m, L] → [m].

        The answers do not depend on how the samples are cut into calls.
        """
        ids = np.ascontiguousarray(windows, "<u4")
        duplicate = np.zeros(len(ids), np.bool_)
        for row, window in enumerate(ids):
            digest = xxhash.xxh3_128_digest(window)
            duplicate[row] = digest in self._digests
            self._digests.add(digest)
        if self._near is not None:
            rows = np.flatnonzero(~duplicate)
            first = len(self._digests) - len(rows)
            kept = self._near.add_pairs((str(first + number), _shingles(ids[row])) for number, row in enumerate(rows))
            duplicate[rows] = ~np.array(kept, np.bool_)
        return duplicate


def bands(threshold: float) -> int:
    """Bands of a signature, as few as let 99% of the pairs at the threshold agree in one: 1 − (1 − threshold^(256 / bands))^bands do."""
    choices = [1 << power for power in range(PERMUTATIONS.bit_length())]
    return next((count for count in choices if 1 - (1 - threshold ** (PERMUTATIONS // count)) ** count >= FOUND), PERMUTATIONS)


def _shingles(window: npt.NDArray[np.uint32]) -> list[bytes]:
    size = min(SHINGLE, len(window))
    shingles = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(window, size))
    return shingles.view(f"V{4 * size}").ravel().tolist()
