"""A whole run without training: real data steps, and stage artifacts that are committed with chosen contents."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mates.engine.config import (
    CorpusConfig,
    EvaluateConfig,
    FitConfig,
    ModelConfig,
    PretrainConfig,
    ProbeConfig,
    Recipe,
    ReferenceConfig,
    SelectConfig,
    TokenizerConfig,
)
from mates.engine.data import steps
from mates.engine.data.corpus import open_corpus
from mates.engine.evaluate.stage import METRICS_FILE
from mates.engine.influence.fit import PREDICTIONS_FILE, agreement, split_labels
from mates.engine.influence.score import shard_name
from mates.engine.layout import layout_of
from mates.engine.loop import STAGE_VERBS, Step, run_steps, step_request
from mates.engine.pretrain.checkpoint import LOSSES
from mates.engine.probe.stage import LABELS_FILE, influence_column, probed_samples
from mates.engine.select.methods import model_stage
from mates.engine.select.stage import select_stage
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, Request

EVIL = "<script>alert(1)</script>"
URL = "https://example.org/page?a=1&b=2"
REFERENCE = "made-up"

COSTS = {
    "pretrain": Cost(flops=1e12, seconds=100.0, tokens=3200),
    "probe": Cost(flops=2e10, seconds=10.0, tokens=1280),
    "fit": Cost(flops=3e9, seconds=4.0, tokens=7000),
    "score": Cost(flops=7e9, seconds=2.0, tokens=6400),
    "evaluate": Cost(flops=5e11, seconds=50.0, tokens=900),
}


def make_recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe over made-up text in ``folder``, with its run in ``folder/run``."""
    corpus, passages = _write_sources(folder)
    recipe = Recipe(
        run_dir=str(folder / "run"),
        methods=["random", "mates"],
        corpus=CorpusConfig(inputs=[str(corpus)], pool_share=0.15, holdout_share=0.1),
        tokenizer=TokenizerConfig(vocab_size=400, train_bytes=100_000),
        reference=ReferenceConfig(source=str(passages), name=REFERENCE, items=8, test_items=16),
        model=ModelConfig(hidden_size=32, layers=1, heads=2, max_positions=128),
        pretrain=PretrainConfig(sequence_length=32, batch_size=4, micro_batch_size=4, stages=3, steps_per_stage=25, warmup_steps=5),
        probe=ProbeConfig(samples=40),
        fit=FitConfig(hidden_size=32, epochs=1),
        select=SelectConfig(ratio=0.5),
        evaluate=EvaluateConfig(decay_steps=5, holdout_samples=8),
    )
    return replace(recipe, **changes)


def _write_sources(folder: Path) -> tuple[Path, Path]:
    corpus, passages = folder / "corpus.jsonl", folder / "passages.jsonl"
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = random.Random(7)
        words = ["".join(source.choices("abcdefgh", k=source.randint(2, 6))) for _ in range(200)]

        def text(length: int) -> str:
            return " ".join(word for _ in range(length) for word in (*source.choices(words, k=4), EVIL))

        rows = [{"text": f"{number} {text(12)}", "url": URL} for number in range(600)]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
        items = [{"text": f"{number} " + " ".join(source.choices(words, k=12))} for number in range(80)]
        passages.write_text("".join(json.dumps(item) + "\n" for item in items))
    return corpus, passages


def build(recipe: Recipe) -> None:
    """All steps of the recipe's run; data that is there is used."""
    build_data(recipe)
    for step in run_steps(recipe):
        if step.verb in STAGE_VERBS:
            build_step(recipe, step)


def build_data(recipe: Recipe) -> None:
    """Tokenizer, corpora and reference."""
    for step in (steps.tokenizer_step, steps.preprocess_step, steps.reference_step):
        step(recipe)


def build_shared(recipe: Recipe, methods: Sequence[str] = (), verbs: Sequence[str] = ()) -> None:
    """The data, stage 0, and steps of stage 1 of methods."""
    build_data(recipe)
    for verb in ("select", "pretrain", "evaluate"):
        build_step(recipe, Step(verb, "shared", 0))
    for method in methods:
        for verb in verbs:
            build_step(recipe, Step(verb, method, 1))


def build_step(recipe: Recipe, step: Step) -> None:
    """The artifact of a stage's step."""
    assert step.method is not None
    assert step.stage is not None
    if step.verb == "select":
        select_stage(recipe, step.method, step.stage)
        return
    request = step_request(recipe, step)
    request.directory.mkdir(parents=True, exist_ok=True)
    writers = {"pretrain": _pretrain, "probe": _probe, "fit": _fit, "score": _score, "evaluate": _evaluate}
    request.commit(info=writers[step.verb](recipe, request, step.method, step.stage), cost=COSTS[step.verb])


def metrics(recipe: Recipe, method: str, stage: int) -> dict[str, float]:
    """The metrics that an evaluation is given."""
    gain = 0.0 if method in ("shared", "random") else 0.125 * stage
    return {
        "holdout_loss_nats": 7.0625 - 0.5 * stage + gain / 4 + recipe.seed / 64,
        f"{REFERENCE}.loss_nats": 8.03125 - 0.75 * stage - gain + recipe.seed / 32,
        f"{REFERENCE}.accuracy": 0.0625 * (stage + 1),
        "holdout_samples": 8,
        "reference_items": 16,
    }


def losses(method: str, stage: int, steps_per_stage: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The training losses that a stage is given."""
    return 9.0 - stage - np.linspace(0, 1, steps_per_stage) + 0.01 * len(method)


def influences(recipe: Recipe, stage: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The oracle influences that a stage's probes are given, in nats."""
    return np.random.default_rng(stage).normal(-2e-4, 1e-3, recipe.probe.samples)


def _pretrain(recipe: Recipe, request: Request, method: str, stage: int) -> dict[str, Any]:
    np.save(request.directory / LOSSES, losses(method, stage, recipe.pretrain.steps_per_stage))
    return {"step": (stage + 1) * recipe.pretrain.steps_per_stage}


def _evaluate(recipe: Recipe, request: Request, method: str, stage: int) -> dict[str, Any]:
    found = metrics(recipe, method, stage)
    artifact.write_json(request.directory / METRICS_FILE, found)
    return found


def _probe(recipe: Recipe, request: Request, method: str, stage: int) -> dict[str, Any]:
    pool = open_corpus(layout_of(recipe).corpus("pool"), recipe.pretrain.sequence_length)
    ids, nats = probed_samples(recipe, pool.samples, stage), influences(recipe, stage)
    pq.write_table(pa.table({"sample_id": ids, influence_column(REFERENCE): nats}), request.directory / LABELS_FILE)
    return {"samples": len(ids), "references": [REFERENCE], "method": "linear", "fidelity": fidelity(stage)}


def fidelity(stage: int) -> dict[str, Any]:
    """The comparison with exact influences that a stage's labels are given."""
    rank, line = ({"value": value - stage / 100, "low": value - 0.1, "high": value} for value in (0.95, 0.96))
    methods: dict[str, Any] = {"linear": {REFERENCE: {"spearman": rank, "pearson": line}}}
    methods["sgd"] = {REFERENCE: {"spearman": None, "pearson": None}}
    return {"method": "linear", "samples": 32, "methods": methods, "reliability": {REFERENCE: rank}}


def _fit(recipe: Recipe, request: Request, method: str, stage: int) -> dict[str, Any]:
    table = pq.read_table(layout_of(recipe).labels(method, stage) / LABELS_FILE)
    ids, nats = table["sample_id"].to_numpy(), table[influence_column(REFERENCE)].to_numpy()
    noise = np.random.default_rng(100 + stage).normal(0, 1, len(ids))
    predicted = ((nats - nats.mean()) / nats.std() + noise).astype(np.float32)
    part = np.full(len(ids), "train", object)
    for name, rows in split_labels(ids, recipe.fit, recipe.seed).items():
        part[rows] = name
    columns = {"sample_id": ids, "part": part.tolist()}
    for suffix in ("", f".{REFERENCE}"):
        columns |= {f"oracle_nats{suffix}": nats, f"predicted_sd{suffix}": predicted}
    pq.write_table(pa.table(columns), request.directory / PREDICTIONS_FILE)
    train, test = nats[part == "train"], part == "test"
    return {
        "label_mean_nats": float(train.mean()),
        "label_sd_nats": float(train.std()),
        "label_covariance_nats2": [[float(train.var())]],
        "label_weights": {REFERENCE: 1.0},
        "agreement": {"test": agreement(predicted[test], nats[test])},
        "selection": {"ratio": recipe.select.ratio, "temperature": 0.5, "selected": -0.75, "sampled": -0.5, "random": 0.0, "oracle": -1.25},
        "drift": {"spearman": 0.875, "pearson": 0.5} if stage > 1 else None,
        "sensitivity": {},
        "label_curve": [
            {"labels": 10 * stage, "spearman": 0.25, "pearson": 0.5},
            {"labels": 20 * stage, "spearman": None, "pearson": None},
        ],
    }


def _score(recipe: Recipe, request: Request, method: str, stage: int) -> dict[str, Any]:
    low, high = request.settings["candidates"]
    scores = np.random.default_rng(200 + stage).normal(0, 0.7, (high - low, 1)).astype(np.float32)
    np.save(request.directory / shard_name(0), scores)
    covariance = artifact.load(layout_of(recipe).influence_model(method, model_stage(recipe, method, stage))).info["label_covariance_nats2"]
    about = {"references": [REFERENCE], "model": "encoder", "label_covariance_nats2": covariance}
    return about | {"samples": high - low, "dropped": 0, "mean_sd": scores.mean(0).tolist()}
