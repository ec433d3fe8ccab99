"""The order of steps: what a run does, one line a step. Every step also runs alone, and is skipped where its artifact fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mates.engine.baselines.scorers import OF_CHECKPOINT
from mates.engine.config import Recipe
from mates.engine.evaluate.stage import evaluate_request
from mates.engine.influence.fit import fit_request
from mates.engine.influence.score import score_request
from mates.engine.layout import SHARED
from mates.engine.pretrain.stage import pretrain_request
from mates.engine.probe.stage import probe_request
from mates.engine.select.methods import earlier_models, label_stages, model_stage, needs_influences, needs_scores, uses_influences
from mates.engine.select.stage import select_request
from mates.preprocess.artifact import ArtifactError, Request

DATA_VERBS = ("sample-corpus", "tokenizer", "preprocess", "reference")
STAGE_VERBS = ("probe", "fit", "score", "select", "pretrain", "evaluate")
DISTRIBUTED_VERBS = ("pretrain", "probe", "fit", "score", "evaluate")


@dataclass(frozen=True)
class Step:
    """One step of a run; ``method`` and ``stage`` are None for steps that no stage owns."""

    verb: str
    method: str | None = None
    stage: int | None = None

    def __str__(self) -> str:
        return self.verb if self.method is None else f"{self.verb} {self.method} stage {self.stage}"


def stage_steps(recipe: Recipe, method: str, stage: int) -> Iterator[Step]:
    """Steps of one stage of one method."""
    if needs_influences(recipe, method, stage):
        yield from (Step(verb, method, stage) for verb in ("probe", "fit"))
    if needs_scores(method, stage):
        yield Step("score", method, stage)
    yield from (Step(verb, method, stage) for verb in ("select", "pretrain", "evaluate"))


def run_steps(recipe: Recipe) -> Iterator[Step]:
    """All steps of a run, in an order in which each finds what it needs."""
    yield from (Step(verb) for verb in DATA_VERBS)
    yield from stage_steps(recipe, SHARED, 0)
    for stage in range(1, recipe.pretrain.stages):
        for method in recipe.methods:
            yield from stage_steps(recipe, method, stage)
    yield Step("report")


def needed_steps(recipe: Recipe, step: Step) -> Iterator[Step]:
    """The stages' steps whose artifacts a step reads."""
    verb, method, stage = step.verb, step.method, step.stage
    assert method is not None
    assert stage is not None
    parent = Step("pretrain", SHARED if stage == 1 else method, stage - 1)
    if verb == "probe":
        yield replace(parent, verb="evaluate") if recipe.probe.after_decay else parent
    elif verb == "fit":
        yield from (replace(step, verb="probe", stage=probed) for probed in label_stages(recipe, stage))
        if recipe.fit.warm_starts and (earlier := earlier_models(recipe, stage)):
            yield replace(step, stage=earlier[0])
    elif verb == "score" and uses_influences(method, stage):
        yield Step("fit", method, model_stage(recipe, method, stage))
    elif verb == "score" and method in OF_CHECKPOINT:
        yield parent
    elif verb == "select" and needs_scores(method, stage):
        yield replace(step, verb="score")
    elif verb == "pretrain":
        yield replace(step, verb="select")
        if stage > 0:
            yield parent
    elif verb == "evaluate":
        yield replace(step, verb="pretrain")


def check_needed(recipe: Recipe, step: Step) -> None:
    """ArtifactError where a step that comes before has not been done, or was done with other settings."""
    for before in needed_steps(recipe, step):
        request = step_request(recipe, before)
        if not request.find():
            command = f"mates {before.verb} RECIPE --method {before.method} --stage {before.stage}"
            raise ArtifactError(f"{request.directory}: {before} comes before {step} and is not done; run `{command}`, or `mates run`")


def step_request(recipe: Recipe, step: Step) -> Request:
    """The artifact that a stage's step is asked for. ArtifactError where its inputs are missing or damaged."""
    requests = {
        "probe": probe_request,
        "fit": fit_request,
        "score": score_request,
        "select": select_request,
        "pretrain": pretrain_request,
        "evaluate": evaluate_request,
    }
    if step.method is None or step.stage is None:
        raise ValueError(f"{step}: only a stage's steps have one artifact")
    return requests[step.verb](recipe, step.method, step.stage)
