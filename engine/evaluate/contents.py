"""What the report shows, read from a run's artifacts. Whatever is not complete is None or left out, never made up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from mates.engine.config import Recipe
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.index import read_index
from mates.engine.evaluate.zero_shot import AVERAGED, TASKS_FILE
from mates.engine.influence.fit import PREDICTIONS_FILE, agreement, findings
from mates.engine.influence.model import joining
from mates.engine.influence.score import open_scores
from mates.engine.layout import SHARED, layout_of
from mates.engine.ledger import Ledger, cumulative_flops
from mates.engine.pretrain import checkpoint
from mates.engine.probe.stage import label_weights, read_labels
from mates.engine.select.methods import model_stage, uses_influences
from mates.preprocess import artifact
from mates.preprocess.metadata import document_rows
from mates.preprocess.tokenizer import Tokenizer, open_tokenizer

EXAMPLES = 5
DOCUMENT_BREAK = "\n\n--- next document ---\n\n"
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # not allowed in HTML

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

SHOWN = 1 << 20
SHOWN_VALUES = 20  # of a metadata field


@dataclass(frozen=True, kw_only=True)
class Point:
    """An evaluation: FLOPs of pretraining and selection until then, and the metrics by their names in the artifact."""

    stage: int
    flops: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Training losses [steps] in nats of one arm's stages that follow each other; ``first_step`` steps came before."""

    arm: str
    first_step: int
    losses: Floats


@dataclass(frozen=True, kw_only=True)
class Example:
    """A probed sample; ``influence_sd`` is in SD from the mean of the stage's probes, None where all are equal."""

    sample_id: int
    influence_nats: float
    influence_sd: float | None
    text: str
    url: str | None


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Oracle influences [n] in nats of a stage, the method that they were measured by, how faithful every method is (as the labels'
    manifest says; None where that was not asked for), and the samples at both ends."""

    influence_nats: Floats
    method: str
    fidelity: Mapping[str, Any] | None
    helpful: list[Example]
    harmful: list[Example]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Test part of an influence model: oracle and prediction [n], both in SD of the training labels.

    The correlations are None where they are not defined.
    """

    oracle_sd: Floats
    predicted_sd: Floats
    spearman: float | None
    pearson: float | None
    label_mean_nats: float
    label_sd_nats: float
    label_curve: list[Mapping[str, float | None]]
    """Of an n-gram model by number of training labels: ``labels``, ``spearman``, ``pearson``."""
    findings: list[str]
    """Further sentences about its worth."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Scores in SD of the labels: of candidates [n], at most a million of them, and of the selected ones among these [k]; whether there
    are more."""

    candidates: Floats
    selected: Floats
    is_part: bool = False


@dataclass(frozen=True, kw_only=True)
class StageView:
    """How the data of one stage of one method was chosen."""

    method: str
    stage: int
    chosen_by: int
    """The stage whose influence model chose: this one, or an earlier one that was probed for."""
    probes: Probes | None
    fit: Fit | None
    selection: Selection | None


def arm_of(method: str, stage: int) -> str:
    """The arm that a stage of a method belongs to: stage 0 is shared."""
    return SHARED if stage == 0 else method


def metrics_of(recipe: Recipe, ledger: Ledger, method: str, stage: int) -> dict[str, float] | None:
    """Metrics of an evaluation, or None where it is not complete."""
    if not ledger.done("evaluate", arm_of(method, stage), stage):
        return None
    info = artifact.load(layout_of(recipe).evaluation(method, stage), "evaluation").info
    return {name: value for name, value in info.items() if isinstance(value, int | float)}


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One measure of one zero-shot task: for each method ``value``, ``stderr`` and ``n``, or None where it is not complete."""

    task: str
    metric: str
    cells: list[Mapping[str, float] | None]


def task_rows(recipe: Recipe, ledger: Ledger) -> list[TaskRow]:
    """Zero-shot results of every method at its last stage, the means over tasks last; empty where the recipe asks for none."""
    last, found = recipe.pretrain.stages - 1, list[dict[str, Mapping[str, Any]] | None]()
    for method in recipe.methods:
        path = layout_of(recipe).evaluation(arm_of(method, last), last)
        done = ledger.done("evaluate", arm_of(method, last), last) and bool(recipe.evaluate.tasks)
        results = artifact.read_json(path / TASKS_FILE) if done else None
        tasks = {name: task["metrics"] for name, task in results["tasks"].items()} | {"mean": results["mean"]} if results else None
        found.append(tasks)
    return [
        TaskRow(task=task, metric=metric, cells=[None if tasks is None else tasks[task][metric] for tasks in found])
        for task in [*recipe.evaluate.tasks, "mean"]
        for metric in AVERAGED
        if any(tasks is not None and metric in tasks[task] for tasks in found)
    ]


@dataclass(frozen=True, kw_only=True)
class FieldRow:
    """Held-out loss in nats a token of the documents of one value, by method; None where it is not complete."""

    value: str
    tokens: int
    nats: list[float | None]


def field_rows(recipe: Recipe, ledger: Ledger) -> list[FieldRow]:
    """The held-out loss by ``evaluate.by`` at the last stage, of the values with most tokens."""
    last, found = recipe.pretrain.stages - 1, list[Mapping[str, Any] | None]()
    for method in recipe.methods:
        done = ledger.done("evaluate", arm_of(method, last), last) and recipe.evaluate.by is not None
        info = artifact.load(layout_of(recipe).evaluation(arm_of(method, last), last), "evaluation").info if done else {}
        found.append(info.get("holdout_by"))
    tokens: Mapping[str, int] = next((item["tokens"] for item in found if item), {})
    shown = sorted(tokens, key=lambda value: (-tokens[value], value))[:SHOWN_VALUES]
    nats = {value: [None if item is None else item["loss_nats"][value] for item in found] for value in shown}
    return [FieldRow(value=value, tokens=tokens[value], nats=nats[value]) for value in shown]


def evaluation_points(recipe: Recipe, ledger: Ledger, method: str) -> list[Point]:
    """A method's evaluations, stage by stage; those whose path is not complete are left out."""
    points = []
    for stage in range(recipe.pretrain.stages):
        metrics, flops = metrics_of(recipe, ledger, method, stage), cumulative_flops(ledger, method, stage)
        if metrics is not None and flops is not None:
            points.append(Point(stage=stage, flops=flops, metrics=metrics))
    return points


def loss_curves(recipe: Recipe, ledger: Ledger) -> list[Curve]:
    """Training losses of the shared stage and of each method's stages, as far as they are complete without a gap."""
    layout, steps = layout_of(recipe), recipe.pretrain.steps_per_stage
    curves = []
    for arm, stages in [(SHARED, range(1)), *((method, range(1, recipe.pretrain.stages)) for method in recipe.methods)]:
        losses = []
        for stage in stages:
            if not ledger.done("pretrain", arm, stage):
                break
            losses.append(checkpoint.read_losses(layout.checkpoint(arm, stage)))
        if losses:
            curves.append(Curve(arm=arm, first_step=stages.start * steps, losses=_believable(np.concatenate(losses))))
    return curves


def _believable(losses: Floats) -> Floats:
    """Of steps that were passed over, the loss may not be finite: show that of the step before."""
    known = np.maximum.accumulate(np.where(np.isfinite(losses), np.arange(len(losses)), 0))
    return losses[known]


def stage_views(recipe: Recipe, ledger: Ledger) -> list[StageView]:
    """Every stage that an influence model chooses, in the order of methods and stages."""
    views = []
    for method in recipe.methods:
        for stage in range(1, recipe.pretrain.stages):
            if uses_influences(method, stage):
                views.append(_stage_view(recipe, ledger, method, stage))
    return views


def _stage_view(recipe: Recipe, ledger: Ledger, method: str, stage: int) -> StageView:
    done = {verb: ledger.done(verb, method, stage) for verb in ("probe", "fit", "score", "select")}
    return StageView(
        method=method,
        stage=stage,
        chosen_by=model_stage(recipe, method, stage),
        probes=_probes(recipe, method, stage) if done["probe"] else None,
        fit=_fit(recipe, method, stage) if done["fit"] else None,
        selection=_selection(recipe, method, stage) if done["score"] and done["select"] else None,
    )


def _fit(recipe: Recipe, method: str, stage: int) -> Fit:
    """As the tasks' weights are now, which may be others than when the model was fitted."""
    directory, weights = layout_of(recipe).influence_model(method, stage), label_weights(recipe)
    info = artifact.load(directory, "influence model").info
    table = pq.read_table(directory / PREDICTIONS_FILE)
    part = np.array(table["part"].to_pylist())
    oracle, predicted = (np.stack([table[f"{name}.{task}"].to_numpy() for task in weights], 1) for name in ("oracle_nats", "predicted_sd"))
    nats = np.average(oracle, axis=1, weights=list(weights.values()))
    mean, sd = float(nats[part == "train"].mean()), float(nats[part == "train"].std())
    oracle_sd = (nats[part == "test"] - mean) / sd
    predicted_sd = predicted[part == "test"].astype(np.float64) @ joining(list(weights.values()), info["label_covariance_nats2"])
    same = info["label_weights"] == weights
    return Fit(
        oracle_sd=oracle_sd,
        predicted_sd=predicted_sd,
        label_mean_nats=mean,
        label_sd_nats=sd,
        label_curve=info["label_curve"],
        findings=list(findings(info)) if same else ["further figures of the fit are left out: they are for other weights of the tasks"],
        **(info["agreement"]["test"] if same else agreement(predicted_sd, oracle_sd)),
    )


def _selection(recipe: Recipe, method: str, stage: int) -> Selection:
    layout = layout_of(recipe)
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    scores = open_scores(layout.scores(method, stage), corpus.fingerprint)
    shown = min(scores.samples, SHOWN)  # candidates are in random order, and an index is in theirs: a part is a fair sample
    join = joining(list(label_weights(recipe).values()), scores.manifest.info["label_covariance_nats2"])
    means = scores.predicted(scores.read(0, shown))[0] @ join
    candidates = make_blocks(recipe, corpus.samples).candidates(stage, 0, shown)
    chosen = np.asarray(read_index(layout.index(method, stage), corpus.fingerprint).ids[:shown])
    return Selection(candidates=means, selected=means[np.isin(candidates, chosen)], is_part=shown < scores.samples)


# --- examples ------------------------------------------------------------------------------------------------------


def _probes(recipe: Recipe, method: str, stage: int) -> Probes:
    layout = layout_of(recipe)
    ids, nats, labels = read_labels(layout.labels(method, stage), label_weights(recipe))
    order = np.lexsort((ids, nats))
    count = min(EXAMPLES, len(ids) // 2)
    pool = open_corpus(layout.corpus("pool"), recipe.pretrain.sequence_length)
    tokenizer, _ = open_tokenizer(layout.tokenizer)
    shown = [*order[:count], *order[::-1][:count]]
    urls = dict(zip(shown, _urls(pool, [int(ids[row]) for row in shown]), strict=True))
    mean, sd = float(nats.mean()), float(nats.std())

    def example(row: int) -> Example:
        sample = int(ids[row])
        return Example(
            sample_id=sample,
            influence_nats=float(nats[row]),
            influence_sd=(float(nats[row]) - mean) / sd if sd > 0 else None,
            text=sample_text(pool, tokenizer, sample),
            url=urls[row],
        )

    return Probes(
        influence_nats=np.asarray(nats, np.float64),
        method=labels.info["method"],
        fidelity=labels.info.get("fidelity"),
        helpful=[example(row) for row in order[:count]],
        harmful=[example(row) for row in order[::-1][:count]],
    )


def sample_text(corpus: Corpus, tokenizer: Tokenizer, sample: int) -> str:
    """The text of a sample, a line marking where one document ends and the next begins."""
    tokens = corpus.windows(np.array([sample], np.int64))[0, :-1]
    ends = np.flatnonzero(tokens == tokenizer.end_of_document)
    pieces = [part[part != tokenizer.end_of_document] for part in np.split(tokens, ends)]
    text = DOCUMENT_BREAK.join(tokenizer.decode(piece.tolist()) for piece in pieces if len(piece))
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _urls(corpus: Corpus, samples: list[int]) -> list[str | None]:
    """Addresses of the documents that samples begin in, where addresses were kept."""
    found = [corpus.document_of(sample) for sample in samples]
    urls: dict[tuple[Path, int], str | None] = {}
    for directory in {directory for directory, _ in found}:
        numbers = [number for owner, number in found if owner == directory]
        rows = document_rows(directory, numbers)
        known = rows["url"].to_pylist() if "url" in rows.column_names else [None] * len(numbers)
        urls |= {(directory, number): url for number, url in zip(numbers, known, strict=True)}
    return [urls[document] for document in found]
