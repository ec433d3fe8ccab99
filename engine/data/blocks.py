"""Which samples are the candidates of which stage.

The train samples are put in a keyed permutation and cut into disjoint blocks, one a stage: a corpus ordered by source is mixed, and
no sample is ever a candidate twice. Stage 0, which trains on random data, needs no choice: its block is exactly what it reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from mates.engine.config import Recipe
from mates.engine.random import KeyedPermutation


class CorpusTooSmallError(ValueError):
    """The corpus has fewer samples than the recipe's stages need."""


@dataclass(frozen=True)
class Blocks:
    """Candidate blocks over ``samples`` train samples; block s holds positions bounds[s] … bounds[s + 1] of the permutation."""

    samples: int
    bounds: tuple[int, ...]
    seed: int

    def size(self, stage: int) -> int:
        """Candidates of a stage."""
        return self.bounds[stage + 1] - self.bounds[stage]

    def candidates(self, stage: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Sample ids of positions start … stop of a stage's block, in the block's order: [stop − start] int64."""
        size = self.size(stage)
        stop = size if stop is None else min(stop, size)
        positions = np.arange(start, stop, dtype=np.int64) + self.bounds[stage]
        return KeyedPermutation(self.samples, self.seed, "blocks")(positions)


def block_sizes(recipe: Recipe) -> list[int]:
    """Candidates of each stage: steps · batch for stage 0, ceil(steps · batch / ratio) after it."""
    trained = recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size
    ratio = Fraction(str(recipe.select.ratio))  # 21 / 0.35 is 60, but a little more in binary fractions, and would be rounded up to 61
    return [trained] + [math.ceil(trained / ratio)] * (recipe.pretrain.stages - 1)


def make_blocks(recipe: Recipe, samples: int) -> Blocks:
    """Cut ``samples`` train samples into the recipe's blocks.

    Raises:
        CorpusTooSmallError: naming needed and found.
    """
    sizes = block_sizes(recipe)
    if sum(sizes) > samples:
        length = recipe.pretrain.sequence_length
        raise CorpusTooSmallError(
            f"the train corpus has {samples:,} samples of {length} tokens; {recipe.pretrain.stages} stages of "
            f"{recipe.pretrain.steps_per_stage} steps x {recipe.pretrain.batch_size} samples at select.ratio {recipe.select.ratio} "
            f"need {sum(sizes):,} ({sum(sizes) * length:,} tokens). Give more text, fewer steps or stages, or a larger ratio"
        )
    return Blocks(samples, (0, *np.cumsum(sizes).tolist()), recipe.seed)
