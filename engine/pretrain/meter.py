"""How fast training goes and what it takes: tokens a second, model FLOPs utilisation, memory."""

from __future__ import annotations

import time
from typing import Any

import psutil
import torch

from mates.engine.config import Recipe
from mates.engine.distributed import World
from mates.engine.progress import say

GIB = 2**30
PATIENCE = 0.1
"""Seconds that a product on a CPU may take."""


def matmul_rates(device: torch.device, dtype: torch.dtype, *, size: int, repeats: int) -> list[float]:
    """Rates of a product of two ``size`` × ``size`` matrices in FLOP/s, after a first one: of a GPU, or of this process' CPU threads."""
    source = torch.Generator(device).manual_seed(0)  # training's own generator is left as it is
    left, right = (torch.randn(size, size, generator=source, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return rates[1:]


def matmul_tflops(device: torch.device, dtype: torch.dtype, *, size: int | None = None, repeats: int = 5) -> float:
    """The best rate of a large matrix product in TFLOP/s: of 8,192 rows on a GPU, on a CPU of 1,024 or as many as it does in a tenth of a
    second, for bf16 without instructions of its own is slower by a factor of fifty and more."""
    sizes = (size,) if size else (8192,) if device.type == "cuda" else (256, 512, 1024)
    best = 0.0
    for rows in sizes:
        best = max(best, *matmul_rates(device, dtype, size=rows, repeats=repeats))
        if 2 * (2 * rows) ** 3 / best > PATIENCE:  # the next one
            break
    return best / 1e12


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Speed between two readings.

    MFU is the model's FLOPs (matrix products of forward and backward pass, attention in full, recomputation left out) over what all
    devices could do at their peak: the recipe's figure, or the rate of a large matrix product that is measured at the start.
    """

    def __init__(self, recipe: Recipe, world: World, *, flops_per_step: float) -> None:
        self._world, self._tokens, self._flops = world, recipe.pretrain.tokens_per_step, flops_per_step
        stated = recipe.launch.peak_tflops
        dtype = torch.bfloat16 if recipe.pretrain.precision == "bf16" else torch.float32
        self._peak = stated or matmul_tflops(world.device, dtype)
        if world.first and not stated and world.device.type == "cpu" and dtype == torch.bfloat16:
            fp32 = matmul_tflops(world.device, torch.float32)
            if fp32 > 2 * self._peak:
                times = f"{fp32 / self._peak:.0f} times as fast as bf16"
                say(f"pretrain: this CPU multiplies fp32 {times}; pretrain.precision: fp32 would save time here")
        self._source = "launch.peak_tflops" if stated else f"{recipe.pretrain.precision} matrix product, measured"
        self._steps, self._since = 0, 0.0

    def start(self, step: int) -> None:
        """Begin to count after ``step``."""
        self._steps, self._since = step, time.perf_counter()

    def read(self, step: int) -> dict[str, Any]:
        """Figures of the steps since the last reading, up to ``step``; of memory, the most that this rank's GPU held, or what its process
        holds."""
        now = time.perf_counter()
        rate = (step - self._steps) / max(now - self._since, 1e-9)
        self._steps, self._since = step, now
        return {
            "tokens_per_second": rate * self._tokens,
            "mfu": rate * self._flops / (self._peak * 1e12 * self._world.size),
            "peak_tflops": self._peak,
            "peak_is": self._source,
            "memory_gib": self._memory() / GIB,
        }

    def _memory(self) -> int:
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._world.device)
        return int(psutil.Process().memory_info().rss)
