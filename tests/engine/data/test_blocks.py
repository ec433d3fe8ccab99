"""Candidate blocks: how large they are, that they are disjoint, and what happens where the corpus is too small."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mates.engine.config import EvaluateConfig, PretrainConfig, Recipe, SelectConfig
from mates.engine.data.blocks import Blocks, CorpusTooSmallError, block_sizes, make_blocks


def recipe_of(*, steps: int = 3, batch: int = 4, stages: int = 3, ratio: float = 0.2, seed: int = 0) -> Recipe:
    return Recipe(
        seed=seed,
        pretrain=PretrainConfig(
            steps_per_stage=steps,
            batch_size=batch,
            micro_batch_size=1,
            stages=stages,
            warmup_steps=0,
            sequence_length=16,
        ),
        select=SelectConfig(ratio=ratio),
        evaluate=EvaluateConfig(decay_steps=0),
    )


ratios = st.integers(1, 100).map(lambda number: number / 100) | st.integers(1, 1_000).map(lambda number: number / 1_000)
recipes = st.builds(
    recipe_of,
    steps=st.integers(1, 40),
    batch=st.integers(1, 8),
    stages=st.integers(1, 5),
    ratio=ratios,
    seed=st.integers(0, 99),
)


@given(recipe=recipes)
def test_sizes_are_the_trained_samples_over_the_ratio_rounded_up(recipe: Recipe) -> None:
    """In exact arithmetic: 21 / 0.35 is 60, whatever binary fractions make of it."""
    trained = recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size
    ratio = Fraction(str(recipe.select.ratio))
    needed = next(n for n in range(int(trained / ratio) - 1, 10**9) if n * ratio >= trained)  # the smallest n that is enough
    assert block_sizes(recipe) == [trained] + [needed] * (recipe.pretrain.stages - 1)


def test_sizes_as_literals() -> None:
    assert block_sizes(recipe_of(steps=100, batch=32, stages=3, ratio=0.2)) == [3_200, 16_000, 16_000]
    assert block_sizes(recipe_of(steps=7, batch=3, stages=2, ratio=0.35)) == [21, 60]
    assert block_sizes(recipe_of(steps=1, batch=1, stages=2, ratio=0.3)) == [1, 4]
    assert block_sizes(recipe_of(steps=5, batch=2, stages=1, ratio=0.1)) == [10]
    assert block_sizes(recipe_of(steps=5, batch=2, stages=4, ratio=1.0)) == [10] * 4


@given(recipe=recipes, spare=st.integers(0, 50))
def test_blocks_are_disjoint_and_of_their_sizes(recipe: Recipe, spare: int) -> None:
    sizes = block_sizes(recipe)
    assume(sum(sizes) < 20_000)
    samples = sum(sizes) + spare
    blocks = make_blocks(recipe, samples)
    found = [blocks.candidates(stage) for stage in range(len(sizes))]
    assert [len(block) for block in found] == sizes == [blocks.size(stage) for stage in range(len(sizes))]
    together = np.concatenate(found)
    assert len(np.unique(together)) == len(together) == samples - spare
    assert together.min() >= 0
    assert together.max() < samples
    assert together.dtype == np.int64
    if spare == 0:
        assert sorted(together.tolist()) == list(range(samples))  # all samples are candidates of some stage


@given(data=st.data())
def test_a_part_of_a_block_is_a_slice_of_it(data: st.DataObject) -> None:
    blocks = make_blocks(recipe_of(seed=data.draw(st.integers(0, 3))), 200)
    stage = data.draw(st.integers(0, 2))
    whole = blocks.candidates(stage).tolist()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.none() | st.integers(start, len(whole) + 5))
    assert blocks.candidates(stage, start, stop).tolist() == whole[start:stop]


def test_blocks_depend_on_the_seed_and_the_samples_alone() -> None:
    one = make_blocks(recipe_of(seed=1), 500)
    assert one.candidates(2).tolist() == Blocks(500, one.bounds, 1).candidates(2).tolist()
    other = make_blocks(recipe_of(seed=2), 500)
    assert other.bounds == one.bounds
    assert np.count_nonzero(one.candidates(2) == other.candidates(2)) < 5
    longer = make_blocks(recipe_of(seed=1, stages=5), 500)  # a run that is made longer has read the same before
    assert [longer.candidates(stage).tolist() for stage in range(3)] == [one.candidates(stage).tolist() for stage in range(3)]


def test_a_block_is_spread_over_the_corpus() -> None:
    """A corpus ordered by source gives every block its share of each (5 standard deviations of the hypergeometric)."""
    blocks = make_blocks(recipe_of(steps=50, batch=10, ratio=0.5, seed=3), 5_000)
    for stage in range(3):
        block, size = blocks.candidates(stage), blocks.size(stage)
        deviation = (size * 0.1 * 0.9 * (5_000 - size) / 4_999) ** 0.5
        tenths = np.bincount(block // 500, minlength=10)
        assert np.abs(tenths - size / 10).max() < 5 * deviation


def test_a_corpus_that_is_too_small_is_refused_with_needed_and_found() -> None:
    recipe = recipe_of(steps=100, batch=32, stages=3, ratio=0.2)
    assert make_blocks(recipe, 35_200).bounds == (0, 3_200, 19_200, 35_200)
    with pytest.raises(CorpusTooSmallError) as caught:
        make_blocks(recipe, 35_199)
    message = str(caught.value)
    assert "has 35,199 samples of 16 tokens" in message
    assert "3 stages of 100 steps x 32 samples at select.ratio 0.2" in message
    assert "need 35,200 (563,200 tokens)" in message
