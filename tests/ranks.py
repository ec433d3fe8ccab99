"""Ranks as threads of one process, for steps that share work through :class:`World` alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from mates.engine.distributed import World


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What every rank of a world of threads returns."""
    box: dict[str, Any] = {}
    barrier, results = threading.Barrier(size, timeout=60), [None] * size

    class Ranks(World):
        def gathered(self, make: Callable[[], Any]) -> list[Any]:
            box[str(self.rank)] = make()
            barrier.wait()
            found = [box[str(rank)] for rank in range(size)]
            barrier.wait()
            return found

        def same(self, make: Callable[[], Any]) -> Any:
            return self.gathered(make if self.first else lambda: None)[0]

        def total(self, values: torch.Tensor) -> torch.Tensor:
            return torch.stack(self.gathered(lambda: values.clone())).sum(0)

        def barrier(self) -> None:
            barrier.wait()

    def run(rank: int) -> None:
        results[rank] = work(Ranks(rank, size, torch.device("cpu")))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
