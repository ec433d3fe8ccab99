"""The plan's disk space against what the parts of a run take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import make_recipe

from mates.engine.config import Recipe, TaskConfig
from mates.engine.data.blocks import block_sizes
from mates.engine.plan import make_plan

CHECKPOINTS, SCORES = "checkpoints (all kept)", "scores and indices"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path, methods=["random", "mates", "dsir"])


def test_branches_that_are_probed_keep_weights_and_moments(recipe: Recipe) -> None:
    plain = make_plan(replace(recipe, probe=replace(recipe.probe, after_decay=False)), "mates")
    probed = make_plan(replace(recipe, probe=replace(recipe.probe, after_decay=True)), "mates")
    evaluations = 1 + 3 * (recipe.pretrain.stages - 1)
    assert probed.disk_bytes[CHECKPOINTS] - plain.disk_bytes[CHECKPOINTS] == 12 * plain.parameters * evaluations


def test_scores_are_of_each_method_that_has_some_and_of_each_task(recipe: Recipe) -> None:
    scores = 4 * sum(block_sizes(recipe))
    one = make_plan(recipe, "mates").disk_bytes[SCORES]
    random = make_plan(replace(recipe, methods=["random"]), "random").disk_bytes[SCORES]
    assert one - 3 * random == 2 * scores
    task = TaskConfig(name="other", format="lambada", source=recipe.reference.source, items=8)
    two = make_plan(replace(recipe, reference=replace(recipe.reference, more=[task])), "mates").disk_bytes[SCORES]
    assert two - one == scores
