"""Ranks as threads of one process, for steps that share work through :class:`World` alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mates.engine.distributed import World


@contextmanager
def one_model_at_a_time() -> Iterator[None]:
    """transformers swaps methods of its base class while it reads a model: of two threads, one would put back what the other swapped in."""
    alone, read = threading.RLock(), PreTrainedModel.__dict__["from_pretrained"].__func__

    def from_pretrained(model_class: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
        with alone:
            model: PreTrainedModel = read(model_class, *args, **kwargs)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        yield


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
    with one_model_at_a_time():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results
