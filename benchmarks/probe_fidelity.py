"""Claim: cheap estimates rank samples as exact influences do, at every checkpoint, and the tool tells where they do not.

    python benchmarks/probe_fidelity.py [--run_dir DIR] [--samples 128] [--dotted.name VALUE ...]

Trains a model on the web text of the shared data folder beside the checkout (random data, three stages), and at the end of each stage
probes the same number of samples by every method of ``mates probe`` and exactly, with LAMBADA items as reference. Early, middle and
late checkpoints are at a constant learning rate, as the probe of a run finds them. Gate: every influence is finite and exact influences
differ from sample to sample. The table gives Spearman's and Pearson's correlation with exact influences and 95% bootstrap intervals,
plain gradient dot products (sgd) among them, and the oracle's own reliability. One more row is linear from bf16 gradients. Training
that is finished is skipped when the benchmark is run again.

Writes ``probe_fidelity.json`` into ``--results``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from surroundings import REPOSITORY, SHARED_DATA, surroundings, without_paths

from mates.engine import distributed
from mates.engine.config import (
    CorpusConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    ProbeConfig,
    Recipe,
    ReferenceConfig,
    TokenizerConfig,
)
from mates.preprocess import artifact

CLAIM = "Cheap estimates rank samples as exact influences do, at every checkpoint, and the tool tells where they do not."
STAGES = 3


def recipe_of(options: argparse.Namespace) -> Recipe:
    """What is trained and probed."""
    return Recipe(
        run_dir=str(options.run_dir),
        seed=options.seed,
        methods=["random"],
        corpus=CorpusConfig(inputs=[str(options.text)], pool_share=0.05, holdout_share=0.01),
        tokenizer=TokenizerConfig(vocab_size=options.vocab_size),
        reference=ReferenceConfig(source=str(options.reference), name="lambada", items=options.items, test_items=64),
        model=ModelConfig(hidden_size=128, layers=4, heads=4, max_positions=options.length),
        pretrain=PretrainConfig(
            sequence_length=options.length,
            batch_size=32,
            micro_batch_size=16,
            stages=STAGES,
            steps_per_stage=options.steps,
            warmup_steps=20,
            precision="fp32",
            zero_stage=0,
            checkpoint_every=options.steps,
        ),
        probe=ProbeConfig(method="linear", samples=options.samples, fidelity_samples=options.samples, subset_items=16),
        evaluate=EvaluateConfig(decay_steps=0, holdout_samples=64),
    )


def measure(recipe: Recipe) -> list[dict[str, Any]]:
    """The fidelity report of each checkpoint."""
    from mates.engine.layout import layout_of
    from mates.engine.probe.stage import probe_stage
    from mates.launchers.run import run_recipe

    run_recipe(recipe)
    rows = []
    world = distributed.join(timeout_minutes=30, threads=0)
    try:
        for stage in range(1, STAGES + 1):
            info = probe_stage(recipe, world, "random", stage).info
            info["fidelity"]["methods"]["linear, bf16"] = in_bf16(recipe, world, stage)
            checkpoint = artifact.load(layout_of(recipe).probed("random", stage, after_decay=False))
            rows.append({"step": checkpoint.info["step"], "influences": info["influences"], "fidelity": info["fidelity"]})
    finally:
        distributed.leave()
    return rows


def in_bf16(recipe: Recipe, world: distributed.World, stage: int) -> dict[str, Any]:
    """Fidelity of linear influences from bf16 gradients to the exact ones in fp32, of the labels that are there."""
    from mates.engine.layout import layout_of
    from mates.engine.probe.fidelity import fidelity_of
    from mates.engine.probe.stage import FIDELITY_FILE, LABELS_FILE, influence_column, probe_stage

    directory, name = layout_of(recipe).labels("random", stage), recipe.reference.name
    exact = pq.read_table(directory / FIDELITY_FILE)
    in_order = exact["sample_id"].to_numpy()
    bf16 = replace(recipe, probe=replace(recipe.probe, method="linear", precision="bf16", fidelity_samples=0))
    kept = directory.with_name(f"{directory.name}-fp32")
    shutil.rmtree(kept, ignore_errors=True)
    directory.rename(kept)
    try:
        probe_stage(bf16, world, "random", stage)
        labels = pq.read_table(directory / LABELS_FILE)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        kept.rename(directory)
    order = np.argsort(labels["sample_id"].to_numpy())
    assert (labels["sample_id"].to_numpy()[order] == in_order).all(), "every sample is probed exactly"
    values = labels[influence_column(name)].to_numpy()[order]
    return {name: fidelity_of(values, exact[f"exact.{name}"].to_numpy(), recipe.seed).as_json()}


def gate(rows: list[dict[str, Any]]) -> None:
    """SystemExit 1 where a figure is missing."""
    for row in rows:
        for method, references in row["fidelity"]["methods"].items():
            for name, found in references.items():
                if found["spearman"] is None:
                    sys.exit(f"probe_fidelity: gate: step {row['step']}, {method}, {name}: no correlation; nothing was written")


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table for a terminal."""
    for row in rows:
        for name, whole in row["fidelity"]["reliability"].items():
            own = row["influences"][name]
            yield (
                f"step {row['step']}: {name} loss {own['baseline_loss_nats']:.3f} nats, influences {own['mean_nats']:+.2e} "
                f"± {own['sd_nats']:.2e}, oracle reliability {whole['value']:.3f} ({whole['low']:.3f} to {whole['high']:.3f})"
            )
            for method, references in row["fidelity"]["methods"].items():
                rank, line = references[name]["spearman"], references[name]["pearson"]
                yield (
                    f"  {method.ljust(12)}  Spearman {rank['value']:.3f} ({rank['low']:.3f} to {rank['high']:.3f})"
                    f"  Pearson {line['value']:.3f} ({line['low']:.3f} to {line['high']:.3f})"
                )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    add = parser.add_argument
    add("--run_dir", type=Path, default=Path("runs/probe-fidelity"), help="where the run goes; finished work in it is skipped")
    add("--text", type=Path, default=SHARED_DATA / "web", help="files or folder of documents")
    add("--reference", type=Path, default=SHARED_DATA / "lambada" / "lambada_test.jsonl", help="passages in LAMBADA's form")
    add("--items", type=int, default=256, help="items of the reference")
    add("--samples", type=int, default=128, help="samples probed at each checkpoint")
    add("--steps", type=int, default=400, help="optimizer steps of a stage")
    add("--length", type=int, default=256, help="tokens of a sample")
    add("--vocab_size", type=int, default=4096, help="entries of the tokenizer that is trained")
    add("--seed", type=int, default=1, help="seed of everything")
    add("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="where the JSON goes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    options = parse(arguments)
    recipe = recipe_of(options)
    rows = measure(recipe)
    gate(rows)
    settings = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    found = surroundings() | {"claim": CLAIM, "settings": settings, "checkpoints": rows}
    artifact.write_json(options.results / "probe_fidelity.json", without_paths(found))
    print("\n".join(lines(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
