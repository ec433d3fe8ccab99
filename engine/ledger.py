"""The ledger: what every step of a run cost, read from the manifests that the steps left.

FLOPs follow the formulas of :mod:`mates.engine.flops`; seconds are wall-clock seconds of a step's own work; tokens are
those that a step read. A step that is not complete has no cost (None), and neither has any sum that it belongs to:
nothing unknown counts as zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mates.engine.config import Recipe
from mates.engine.layout import SHARED, layout_of
from mates.engine.loop import DATA_VERBS, STAGE_VERBS, Step, run_steps, step_request
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, ArtifactMismatchError, Cost, Manifest

PHASES: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("pretrain",),
    "selection": ("probe", "fit", "score", "select"),
    "evaluation": ("evaluate",),
    "data": DATA_VERBS,
}
TRAINING = ("pretrain", "selection")  # the phases that a method's compute is made of
NOT_DONE = "not done yet"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One step: its cost, or None and why there is none; fingerprints of the artifacts that it made, by name."""

    step: Step
    cost: Cost | None
    missing: str | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Costs of a method's path, the shared stage 0 included, by phase; None where a step of the phase is missing."""

    pretrain: Cost | None
    selection: Cost | None
    evaluation: Cost | None
    data: Cost | None

    @property
    def overhead_share(self) -> float | None:
        """FLOPs of selection over FLOPs of pretraining."""
        if self.pretrain is None or self.selection is None or self.pretrain.flops == 0:
            return None
        return self.selection.flops / self.pretrain.flops


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All steps of a run in the order of the loop."""

    methods: tuple[str, ...]
    stages: int
    entries: tuple[Entry, ...]

    def path(self, method: str, stage: int | None = None) -> list[Entry]:
        """A method's stage steps, the shared stage 0 included, up to and including ``stage`` (or the last)."""
        last = self.stages - 1 if stage is None else stage
        own = (SHARED, method)
        return [e for e in self.entries if e.step.stage is not None and e.step.stage <= last and e.step.method in own]

    def totals(self, method: str) -> Totals:
        """What a method's path cost, by phase."""
        steps = [*self.path(method), *(entry for entry in self.entries if entry.step.method is None)]
        return Totals(**{name: _sum(e.cost for e in steps if e.step.verb in verbs) for name, verbs in PHASES.items()})

    def cost(self, method: str, verb: str) -> Cost | None:
        """What one verb cost over a method's path; None where a step is missing or the path has none."""
        costs = [entry.cost for entry in self.path(method) if entry.step.verb == verb]
        return _sum(costs) if costs else None

    def entry(self, verb: str, method: str | None = None, stage: int | None = None) -> Entry | None:
        """The entry of a step; None where the run has no such step."""
        wanted = Step(verb, method, stage)
        return next((entry for entry in self.entries if entry.step == wanted), None)

    def done(self, verb: str, method: str | None = None, stage: int | None = None) -> bool:
        """Whether the run has this step and it is complete."""
        entry = self.entry(verb, method, stage)
        return entry is not None and entry.cost is not None

    @property
    def missing(self) -> list[Entry]:
        """Steps that are not complete."""
        return [entry for entry in self.entries if entry.cost is None]


def cumulative_cost(ledger: Ledger, method: str, stage: int, phases: Iterable[str] = TRAINING) -> Cost | None:
    """Cost of a method's path up to and including ``stage``; None where a step of these phases is missing."""
    verbs = [verb for phase in phases for verb in PHASES[phase]]
    return _sum(entry.cost for entry in ledger.path(method, stage) if entry.step.verb in verbs)


def cumulative_flops(ledger: Ledger, method: str, stage: int) -> float | None:
    """FLOPs of pretraining and selection up to and including ``stage``.

    Evaluation, its decay branches included, is left out for every method alike, and so are the data steps, which are
    shared and count no FLOPs.
    """
    cost = cumulative_cost(ledger, method, stage)
    return None if cost is None else cost.flops


def _sum(costs: Iterable[Cost | None]) -> Cost | None:
    """The sum, or None where one is None."""
    total = Cost()
    for cost in costs:
        if cost is None:
            return None
        total = Cost(flops=total.flops + cost.flops, seconds=total.seconds + cost.seconds, tokens=total.tokens + cost.tokens)
    return total


# --- from manifests ------------------------------------------------------------------------------------------------


def write_ledger(recipe: Recipe) -> Ledger:
    """Collect a run's costs and write ``ledger.json`` atomically. The run may be unfinished."""
    ledger = collect(recipe)
    artifact.write_json(layout_of(recipe).ledger, as_json(ledger))
    return ledger


def collect(recipe: Recipe) -> Ledger:
    """The ledger of a recipe's run, finished or not.

    A step counts as done where the loop would skip it: its artifact is complete and undamaged, made from the inputs and
    with the settings that the recipe asks for.
    """
    from mates.engine.data.steps import uses_sample

    steps = [step for step in run_steps(recipe) if step.verb in (*DATA_VERBS, *STAGE_VERBS)]
    if not uses_sample(recipe):
        steps.remove(Step("sample-corpus"))
    return Ledger(
        methods=tuple(recipe.methods),
        stages=recipe.pretrain.stages,
        entries=tuple(_entry(recipe, step) for step in steps),
    )


def _entry(recipe: Recipe, step: Step) -> Entry:
    from mates.engine.data.blocks import CorpusTooSmallError
    from mates.preprocess.inputs import InputError

    try:
        manifests = _data_manifests(recipe, step.verb) if step.method is None else _stage_manifest(recipe, step)
    except ArtifactMismatchError:
        return Entry(step=step, cost=None, missing="made with other settings or from other inputs than the recipe's")
    except (ArtifactError, CorpusTooSmallError, InputError) as error:
        return Entry(step=step, cost=None, missing=str(error))
    if None in manifests.values():
        return Entry(step=step, cost=None, missing=NOT_DONE)
    found = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    cost = _sum(manifest.cost for manifest in found.values())
    return Entry(step=step, cost=cost, fingerprints={name: manifest.fingerprint for name, manifest in found.items()})


def _data_manifests(recipe: Recipe, verb: str) -> dict[str, Manifest | None]:
    """The artifacts of a data step."""
    from mates.preprocess.corpus import SPLITS

    layout = layout_of(recipe)
    folders: dict[str, dict[str, tuple[Path, str]]] = {
        "sample-corpus": {"sample-corpus": (layout.sample_corpus, "sample-corpus")},
        "tokenizer": {"tokenizer": (layout.tokenizer, "tokenizer")},
        "preprocess": {f"corpus/{split}": (layout.corpus(split), "corpus") for split in SPLITS},
        "reference": {f"reference/{half}": (layout.reference(half), "reference") for half in ("train", "test")},
    }
    folders["reference"] |= {f"reference/{task.name}": (layout.further_reference(task.name), "reference") for task in recipe.reference.more}
    return {name: _load(*place) for name, place in folders[verb].items()}


def _load(directory: Path, kind: str) -> Manifest | None:
    return artifact.load(directory, kind) if (directory / artifact.MANIFEST_NAME).is_file() else None


def _stage_manifest(recipe: Recipe, step: Step) -> dict[str, Manifest | None]:
    """The artifact of a stage's step."""
    assert step.method is not None, "data steps have no stage"
    assert step.stage is not None, "data steps have no stage"
    directory = layout_of(recipe).of_step(step.verb, step.method, step.stage)
    if not (directory / artifact.MANIFEST_NAME).is_file():  # its inputs may not exist yet, so no request could be made
        return {step.verb: None}
    return {step.verb: step_request(recipe, step).find()}


# --- to JSON -------------------------------------------------------------------------------------------------------


def as_json(ledger: Ledger) -> dict[str, Any]:
    """What ``ledger.json`` holds; null stands for steps, and sums over steps, that are not complete."""
    return {
        "format": 1,
        "steps": [
            {
                "verb": entry.step.verb,
                "method": entry.step.method,
                "stage": entry.step.stage,
                "cost": entry.cost and asdict(entry.cost),
                "missing": entry.missing,
                "fingerprints": dict(entry.fingerprints),
            }
            for entry in ledger.entries
        ],
        "methods": {method: _method_json(ledger, method) for method in ledger.methods},
    }


def _method_json(ledger: Ledger, method: str) -> dict[str, Any]:
    totals = ledger.totals(method)
    return asdict(totals) | {
        "overhead_share": totals.overhead_share,
        "cumulative_flops": [cumulative_flops(ledger, method, stage) for stage in range(ledger.stages)],
    }
