"""Batches of a selection index, read ahead in the background while the model works.

The order of samples is that of the index, whatever the number of ranks: rank r of n gets the r-th n-th of each global batch. Where a
loader stands is the number of batches that were taken; opened there again, it gives the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.data.corpus import Corpus

AHEAD = 2  # batches that wait for each thread

Windows = npt.NDArray[np.integer[Any]]


class Batches:
    """This rank's part of each global batch, in order. ``with Batches(…) as batches: for windows in batches: …``."""

    def __init__(
        self,
        corpus: Corpus,
        ids: npt.NDArray[np.int64],
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        first: int = 0,
        threads: int = 1,
    ) -> None:
        """Begin to read.

        Args:
            corpus: where samples are. ids: [n], samples in training order, such as a selection index' (memory-mapped).
            batch_size: samples of a global batch, a multiple of ``ranks``. rank, ranks: whose part.
            first: the number of the first batch.
            threads: that read ahead; 0 reads each batch when it is taken.
        """
        assert batch_size % ranks == 0, f"{batch_size} samples for {ranks} ranks"
        self._corpus, self._ids, self._batch_size = corpus, ids, batch_size
        self._part = batch_size // ranks
        self._offset = rank * self._part
        self._next, self._batches = first, len(ids) // batch_size
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="batches") if threads else None
        self._waiting: deque[Future[Windows]] = deque()
        self._ahead = AHEAD * threads

    def __iter__(self) -> Iterator[Windows]:
        """Windows [batch_size / ranks, L + 1] in the dtype that the corpus stores. IndexError for an id outside the corpus."""
        while True:
            if self._threads is None:
                if self._next == self._batches:
                    return
                self._next += 1
                yield self._read(self._next - 1)
                continue
            while self._next < self._batches and len(self._waiting) <= self._ahead:
                self._waiting.append(self._threads.submit(self._read, self._next))
                self._next += 1
            if not self._waiting:
                return
            yield self._waiting.popleft().result()

    def _read(self, number: int) -> Windows:
        start = number * self._batch_size + self._offset
        return self._corpus.stored(np.asarray(self._ids[start : start + self._part]))

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        """Read no further."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
