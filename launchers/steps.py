"""One step of a run in this process, alone or as one of several ranks. Heavy imports stay inside functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from mates.engine.config import Recipe, require
from mates.engine.pretrain.vigilance import StopSignals
from mates.engine.ranks import find_place

if TYPE_CHECKING:
    from mates.engine.distributed import World

INFLUENCE_VERBS = ("probe", "fit")
"""Verbs of methods that choose by influence."""
SCORING_VERBS = (*INFLUENCE_VERBS, "score")
"""Verbs of stages after the first."""


def data_step(name: str, recipe: Recipe) -> None:
    """Run one of the data steps."""
    from mates.engine.data import steps

    work: dict[str, Callable[[Recipe], Any]] = {
        "sample-corpus": steps.sample_corpus_step,
        "tokenizer": steps.tokenizer_step,
        "preprocess": steps.preprocess_step,
        "reference": steps.reference_step,
    }
    work[name](recipe)


def chosen_stage(recipe: Recipe, verb: str, method: str | None, stage: int) -> tuple[str, int]:
    """The method and stage that are meant. RecipeError for what the recipe does not have."""
    from mates.engine.config import INFLUENCE_METHODS
    from mates.engine.select.methods import needs_influences

    stages = list(range(1 if verb in SCORING_VERBS else 0, recipe.pretrain.stages))
    require(stage in stages, "--stage", stage, f"one of {stages} for {verb}")
    if stage == 0:
        require(method in (None, "shared"), "--method", method, "shared, which stage 0 belongs to")
        return "shared", 0
    known, why = list(recipe.methods), ""
    if verb in INFLUENCE_VERBS:
        every, choose = recipe.probe.every, [name for name in known if name in INFLUENCE_METHODS]
        known, why = [name for name in known if needs_influences(recipe, name, stage)], " that choose by influence"
        probed = [other for other in stages if any(needs_influences(recipe, name, other) for name in choose)]
        require(bool(known) or not choose, "--stage", stage, f"a stage with labels of its own: one of {probed} (probe.every is {every})")
    elif verb == "score":
        known, why = [name for name in known if name != "random"], " that choose by scores"
    if method in recipe.methods:
        why += f" ({method} needs no {verb} at stage {stage})"
    if method is None and len(known) == 1:
        return known[0], stage
    hint = "; how influences are measured is --probe.method" if verb == "probe" else ""
    require(method in known, "--method", method, f"one of the recipe's methods{why}: {', '.join(known)}{hint}")
    assert method is not None
    return method, stage


def stage_step(name: str, recipe: Recipe, method: str, stage: int, signals: StopSignals | None = None) -> None:
    """Run one step of a stage in this process, as one rank of however many the launcher started."""
    from mates.engine.loop import Step, check_needed

    step = Step(name, method, stage)
    if selects_alone(name):
        from mates.engine.select.stage import select_stage

        check_needed(recipe, step)
        select_stage(recipe, method, stage)
        return
    with joined(recipe) as world:
        ranks_step(world, name, recipe, method, stage, signals)


@contextmanager
def joined(recipe: Recipe) -> Iterator[World]:
    """This process among the ranks of a run's steps, of one or of several that follow each other: DeepSpeed cannot meet twice."""
    from mates.engine import distributed
    from mates.preprocess.workers import hold_worker_lock

    lock = hold_worker_lock(recipe.path())
    try:
        yield distributed.join(timeout_minutes=recipe.launch.timeout_minutes, threads=recipe.launch.threads)
    finally:
        distributed.leave()
        lock.close()


def ranks_step(world: World, name: str, recipe: Recipe, method: str, stage: int, signals: StopSignals | None = None) -> None:
    """Run one step of a stage as a rank of ``world``."""
    from mates.engine.loop import Step, check_needed

    world.same(lambda: check_needed(recipe, Step(name, method, stage)))
    _stage_work(name, signals)(recipe, world, method, stage)


def selects_alone(name: str) -> bool:
    """Whether a step is a selection by one process, which needs no process group for what takes seconds."""
    return name == "select" and find_place().size == 1


def _stage_work(name: str, signals: StopSignals | None) -> Callable[..., Any]:
    if name == "pretrain":
        from mates.engine.pretrain.stage import pretrain_stage

        return partial(pretrain_stage, signals=signals)
    if name == "probe":
        from mates.engine.probe.stage import probe_stage

        return probe_stage
    if name == "fit":
        from mates.engine.influence.fit import fit_stage

        return fit_stage
    if name == "score":
        from mates.engine.influence.score import score_stage

        return score_stage
    if name == "select":
        from mates.engine.select.stage import select_stage

        def select(recipe: Recipe, world: Any, method: str, stage: int) -> Any:
            return select_stage(recipe, method, stage, world)

        return select
    from mates.engine.evaluate.stage import evaluate_stage

    return evaluate_stage
