"""Claim: an influence model of under 2e7 FLOPs a token finds the samples that help; in front of it n-grams drop most of the candidates.

    python benchmarks/influence_models.py [--run_dir DIR] [--labels 8000] [--models ngram encoder cascade ...]

Trains a model on the web text of the shared data folder beside the checkout, probes samples at the end of a decay branch with LAMBADA
items as reference, and fits to the same labels the n-gram model, a small encoder from scratch, both with extra features, and the cascade.
Of each: Spearman and Pearson on test labels, the mean oracle influence of the fifth that it would select beside that of a random fifth and
of the best one (in SD of the labels), FLOPs of scoring, and samples scored in a second, all models in turn on the same samples, three
times. Gate: the labels agree with exact influences (Spearman of at least 0.95 on the compared samples), and the scores of the measured
samples are those of each alone. The share of 410M pretraining that probe, fit and score come to is reckoned by ``mates plan``'s formulas.
What is finished is skipped when the benchmark is run again.

Writes ``influence_models.json`` into ``--results``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import GateError, spread
from surroundings import REPOSITORY, SHARED_DATA, surroundings, without_paths

from mates.engine.config import (
    CorpusConfig,
    EvaluateConfig,
    FitConfig,
    Method,
    PretrainConfig,
    ProbeConfig,
    Recipe,
    ReferenceConfig,
    TokenizerConfig,
)
from mates.preprocess import artifact

CLAIM = "An influence model of under 2e7 FLOPs a token finds the samples that help; in front of it n-grams drop most of the candidates."
METHOD: Method = "mates"
STAGE = 1
LEAST_FIDELITY = 0.95
ROUNDS, TIMED = 3, 2048
Json = dict[str, Any]


def recipe_of(options: argparse.Namespace) -> Recipe:
    """What is trained and probed."""
    return Recipe(
        run_dir=str(options.run_dir),
        methods=[METHOD],
        corpus=CorpusConfig(inputs=[str(options.text)], pool_share=0.08, holdout_share=0.01, features=["length", "hash", "ngrams"]),
        tokenizer=TokenizerConfig(vocab_size=4096),
        reference=ReferenceConfig(source=str(options.reference), name="lambada", items=2000, test_items=512),
        pretrain=PretrainConfig(
            sequence_length=256,
            batch_size=32,
            micro_batch_size=16,
            stages=2,
            steps_per_stage=options.steps,
            warmup_steps=50,
            lr=2e-3,
            precision="fp32",
            checkpoint_every=200,
            zero_stage=1,
        ),
        probe=ProbeConfig(
            method="linear", samples=options.labels, after_decay=True, fidelity_samples=32, chunk_size=64, micro_batch_size=8
        ),
        evaluate=EvaluateConfig(decay_steps=80, holdout_samples=256),
    )


def models_of(options: argparse.Namespace) -> Mapping[str, FitConfig]:
    """The influence models, by name."""
    ngram = FitConfig(model="ngram")
    encoder = FitConfig(
        hidden_size=options.hidden_size,
        layers=options.layers,
        heads=max(1, options.hidden_size // 64),
        epochs=options.epochs,
        lr=options.lr,
        batch_size=32,
        chunk_tokens=256,
        max_chunks=1,
    )
    features: Any = {"features": ["difficulty", "relevance"]}
    return {
        "ngram": ngram,
        "ngram, difficulty": replace(ngram, features=["difficulty"]),
        "ngram, relevance": replace(ngram, features=["relevance"]),
        "ngram, both": replace(ngram, **features),
        "encoder": encoder,
        "encoder, both": replace(encoder, **features),
        "cascade": replace(encoder, model="cascade", **features),
    }


def make_labels(recipe: Recipe) -> artifact.Manifest:
    """All steps up to the labels; finished ones are skipped. GateError where they do not agree with exact influences."""
    from mates.engine.layout import SHARED, layout_of
    from mates.launchers.local import console_script, step_environment
    from mates.launchers.recipe import write_recipe

    path = recipe.path() / "influence-models.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_recipe(path, recipe)
    stages = [(verb, SHARED, 0) for verb in ("select", "pretrain", "evaluate")] + [("probe", METHOD, STAGE)]
    commands = [[verb] for verb in ("tokenizer", "preprocess", "reference")]
    commands += [[verb, "--method", method, "--stage", str(stage)] for verb, method, stage in stages]
    for verb, *more in commands:
        subprocess.run([console_script("mates"), verb, "--recipe", str(path), *more], env=step_environment(1), check=True)
    labels = artifact.load(layout_of(recipe).labels(METHOD, STAGE), "labels")
    fidelity = labels.info["fidelity"]["methods"]["linear"]["lambada"]["spearman"]["value"]
    if fidelity < LEAST_FIDELITY:
        raise GateError(f"the labels' Spearman with exact influences is {fidelity:.3f}, at least {LEAST_FIDELITY} is needed")
    return labels


def fit(recipe: Recipe, name: str, config: FitConfig) -> tuple[Recipe, artifact.Manifest]:
    """An influence model in a run folder of its own, over the same data and labels."""
    from mates.engine.distributed import World
    from mates.engine.influence.fit import fit_stage
    from mates.engine.layout import layout_of

    own = replace(recipe, run_dir=str(recipe.path() / "models" / name.replace(", ", "-")), data_dir=str(layout_of(recipe).data), fit=config)
    source, target = layout_of(recipe).labels(METHOD, STAGE), layout_of(own).labels(METHOD, STAGE)
    if not target.exists():
        shutil.copytree(source, target)
    return own, fit_stage(own, World(0, 1, torch.device("cpu")), METHOD, STAGE)


def throughput(recipes: Mapping[str, Recipe]) -> dict[str, list[float]]:
    """Samples a second of each model, in turn. GateError where a sample's score depends on the others."""
    from mates.engine.data.blocks import make_blocks
    from mates.engine.influence.model import Samples, open_model, predict
    from mates.engine.layout import layout_of
    from mates.engine.pretrain.stage import open_train_corpus
    from mates.preprocess.tokenizer import open_tokenizer

    some = next(iter(recipes.values()))
    corpus, (tokenizer, _) = open_train_corpus(some), open_tokenizer(layout_of(some).tokenizer)
    samples = Samples(corpus, make_blocks(some, corpus.samples).candidates(STAGE, 0, TIMED))
    device = torch.device("cpu")
    models = {name: open_model(layout_of(one).influence_model(METHOD, STAGE), one, tokenizer, device) for name, one in recipes.items()}
    for name, model in models.items():
        together = predict(model, samples[:64])
        apart = np.concatenate([predict(model, samples[row : row + 1]) for row in range(64)])
        if np.abs(together - apart).max() > 1e-5:
            raise GateError(f"{name}: scores differ by {np.abs(together - apart).max():.1e} SD when samples are scored one by one")
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            started = time.perf_counter()
            predict(model, samples)
            rates[name].append(len(samples) / (time.perf_counter() - started))
    return rates


def overhead_at_410m(flops_per_token: float) -> Json:
    """Selection's FLOPs over pretraining's of the paper's 410M recipe with this scorer and linear probes."""
    from mates.engine.flops import decoder_training
    from mates.engine.plan import make_plan
    from mates.engine.pretrain.shapes import resolve_shape
    from mates.launchers.recipe import load_recipe

    paper = load_recipe(REPOSITORY / "launchers" / "recipes" / "pythia-410m-c4.yaml")
    planned = make_plan(replace(paper, probe=replace(paper.probe, method="linear", fidelity_samples=32)), METHOD)
    chosen = paper.pretrain.stages - 1
    tokens = chosen * paper.pretrain.steps_per_stage * paper.pretrain.tokens_per_step / paper.select.ratio
    passes = 3.0 * paper.fit.epochs * chosen * paper.probe.samples * paper.pretrain.sequence_length
    shape = resolve_shape(paper.model)
    step = decoder_training(shape, 50_304, tokens=1, length=paper.pretrain.sequence_length)
    parts = {"probe": planned.flops["probe"], "fit": passes * flops_per_token, "score": tokens * flops_per_token}
    shares = {name: value / planned.flops["pretrain"] for name, value in parts.items()}
    return {"shares": shares, "total": sum(shares.values()), "training_flops_per_token": step}


def measure(options: argparse.Namespace) -> Json:
    """All models."""
    recipe = recipe_of(options)
    labels = make_labels(recipe)
    configs = {name: config for name, config in models_of(options).items() if not options.models or name in options.models}
    fitted = {name: fit(recipe, name, config) for name, config in configs.items()}
    rates = throughput({name: own for name, (own, _) in fitted.items()})
    length, rows = recipe.pretrain.sequence_length, {}
    for name, (_, manifest) in fitted.items():
        info = manifest.info
        rows[name] = {
            "agreement": info["agreement"],
            "selection_sd": info["selection"],
            "calibration": info["calibration"],
            "label_curve": info["label_curve"],
            "cascade": info.get("cascade"),
            "labels": info["labels"],
            "flops_per_sample": info["flops_per_sample"],
            "flops_per_token": info["flops_per_sample"] / length,
            "fit_seconds": manifest.cost.seconds,
            "samples_per_s": spread(rates[name]),
            "overhead_at_410m": overhead_at_410m(info["flops_per_sample"] / length),
        }
        print(line_of(name, rows[name]), flush=True)
    result = {
        "claim": CLAIM,
        "labels": labels.info,
        "models": rows,
        "settings": without_paths({name: str(value) for name, value in vars(options).items() if name not in ("run_dir", "results")}),
    }
    if {"cascade", "encoder, both"} <= set(rows):
        ratios = [ours / theirs for ours, theirs in zip(rates["cascade"], rates["encoder, both"], strict=True)]
        result["cascade_is_times_faster"] = spread(ratios)
        print(f"cascade: {result['cascade_is_times_faster']['median']:.2f} x as fast as the encoder", flush=True)
    return result | surroundings()


def line_of(name: str, row: Json) -> str:
    """A row for a terminal."""
    worth, test = row["selection_sd"], row["agreement"]["test"]
    text = (
        f"{name:<18} Spearman {test['spearman']:.3f}, selected {worth['selected']:+.3f} SD (random {worth['random']:+.3f}, oracle "
        f"{worth['oracle']:+.3f}), {row['flops_per_token']:.2e} FLOPs a token, {row['samples_per_s']['median']:.0f} samples/s, "
        f"{row['overhead_at_410m']['total']:.1%} of pretraining at 410M"
    )
    if row["cascade"]:
        text += f"; drops {row['cascade']['test_dropped_share']:.0%}, losing {row['cascade']['test_lost_influence']:.1%}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    add = parser.add_argument
    add("--run_dir", type=Path, default=REPOSITORY / "runs" / "influence-models", help="where the run and the models go")
    add("--text", type=Path, default=SHARED_DATA / "web", help="documents")
    add("--reference", type=Path, default=SHARED_DATA / "lambada" / "lambada_test.jsonl", help="passages in LAMBADA's form")
    add("--labels", type=int, default=8000, help="probed samples")
    add("--steps", type=int, default=800, help="training steps before the probe")
    add("--hidden_size", type=int, default=128, help="of the encoder from scratch")
    add("--layers", type=int, default=2, help="of the encoder from scratch")
    add("--epochs", type=int, default=3, help="of fitting the encoder")
    add("--lr", type=float, default=1e-3, help="of fitting the encoder")
    add("--models", nargs="*", help="some of the models only, by name")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if not options.text.exists() or not options.reference.exists():
        parser.error(f"{options.text} or {options.reference} is not there; say --text and --reference")
    artifact.write_json(options.results / "influence_models.json", measure(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
