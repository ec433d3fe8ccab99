"""Claim: model-chosen data reaches a held-out reference loss with fewer FLOPs than random data, selection included.

    python benchmarks/flops_to_accuracy.py RECIPE --methods random,mates --seeds 5 [--out DIR] [--dotted.name VALUE ...]

Every seed runs all methods from one stage-0 checkpoint, in ``OUT/seed-K``; all seeds share the data in ``OUT/data``.
Finished work is skipped, so an interrupted benchmark continues. A gate comes before any figure: all evaluations are
there and finite, and at each stage all methods had the same pretraining FLOPs and tokens, from the same stage-0
checkpoint, measured on the same test sets; else nothing is written and the exit code is 1.

The figure of merit is a method's FLOPs to reach random's final held-out reference loss, over random's own FLOPs; below
1 the method is cheaper. Evaluations are joined by straight lines in (loss, log FLOPs). A method that never gets there
has no ratio. FLOPs and seconds are cumulative over pretraining and selection, the shared stage 0 included; evaluation
and data preparation are left out for every method alike.

Writes ``flops_to_accuracy_RECIPE.{json,csv,png,svg}`` into ``--results``.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib as mpl
from matplotlib.figure import Figure
from surroundings import REPOSITORY, surroundings, without_paths

from mates.engine.config import Method, Recipe, RecipeError, require
from mates.engine.evaluate.contents import metrics_of
from mates.engine.evaluate.figures import SERIES, flops_unit, series_number
from mates.engine.layout import layout_of
from mates.engine.ledger import Ledger, collect, cumulative_cost
from mates.launchers.recipe import parse_with, recipe_parser
from mates.preprocess import artifact

CLAIM = "Model-chosen data reaches random data's final held-out reference loss with fewer FLOPs, selection included."
BASELINE = "random"

Censored = Literal["not reached", "before the first evaluation"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """An evaluation of one method of one seed; costs are cumulative over its path."""

    seed: int
    method: str
    stage: int
    total_flops: float
    pretrain_flops: float
    selection_flops: float
    pretrain_tokens: int
    seconds: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method of one seed: its evaluations, and fingerprints of its stage-0 checkpoint and test sets."""

    seed: int
    method: str
    stage0: str | None
    test_sets: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """FLOPs at which a loss is first reached, or why that is not known."""

    flops: float | None = None
    censored: Censored | None = None


# --- measurement ---------------------------------------------------------------------------------------------------


def measure(recipe: Recipe) -> list[Arm]:
    """What a seed's artifacts say. Steps that are not complete are left out; the gate then names them."""
    ledger = collect(recipe)
    return [_arm(recipe, ledger, method) for method in recipe.methods]


def _arm(recipe: Recipe, ledger: Ledger, method: str) -> Arm:
    stages = range(recipe.pretrain.stages)
    rows = [row for stage in stages if (row := _row(recipe, ledger, method, stage)) is not None]
    test_sets: dict[str, str] = {}
    for row in rows:
        inputs = artifact.load(layout_of(recipe).evaluation(method, row.stage), "evaluation").inputs
        test_sets |= {name: value for name, value in inputs.items() if name != "checkpoint"}
    return Arm(seed=recipe.seed, method=method, stage0=_stage0(recipe, method), test_sets=test_sets, rows=rows)


def _row(recipe: Recipe, ledger: Ledger, method: str, stage: int) -> Row | None:
    metrics = metrics_of(recipe, ledger, method, stage)
    total = cumulative_cost(ledger, method, stage)
    pretrain = cumulative_cost(ledger, method, stage, ["pretrain"])
    if metrics is None or total is None or pretrain is None:
        return None
    return Row(
        seed=recipe.seed,
        method=method,
        stage=stage,
        total_flops=total.flops,
        pretrain_flops=pretrain.flops,
        selection_flops=total.flops - pretrain.flops,
        pretrain_tokens=pretrain.tokens,
        seconds=total.seconds,
        metrics={name: value for name, value in metrics.items() if isinstance(value, float)},  # the rest are counts
    )


def _stage0(recipe: Recipe, method: str) -> str | None:
    """Fingerprint of the stage-0 checkpoint that a method's own first stage says it continued from."""
    layout = layout_of(recipe)
    try:
        if recipe.pretrain.stages == 1:
            return artifact.load(layout.checkpoint(method, 0), "checkpoint").fingerprint
        return artifact.load(layout.checkpoint(method, 1), "checkpoint").inputs["parent"]
    except artifact.ArtifactError:
        return None


# --- gate ----------------------------------------------------------------------------------------------------------


def gate(arms: Sequence[Arm], stages: int) -> list[str]:
    """Why the arms may not be compared, a line each; none where they may."""
    problems = [problem for arm in arms for problem in _gate_arm(arm, stages)]
    for seed in sorted({arm.seed for arm in arms}):
        problems += _gate_seed(seed, [arm for arm in arms if arm.seed == seed], stages)
    if len({tuple(sorted(arm.test_sets.items())) for arm in arms}) > 1:
        problems.append("the arms were evaluated on different test sets")
    return problems


def _gate_arm(arm: Arm, stages: int) -> Iterator[str]:
    name = f"seed {arm.seed} {arm.method}"
    missing = sorted(set(range(stages)) - {row.stage for row in arm.rows})
    if missing:
        yield f"{name}: no complete evaluation and costs of stage {', '.join(map(str, missing))}"
    for row in arm.rows:
        bad = [key for key, value in numbers_of(row).items() if not math.isfinite(value)]
        if bad:
            yield f"{name} stage {row.stage}: {', '.join(bad)} not finite"
        if not row.pretrain_flops > 0:
            yield f"{name} stage {row.stage}: {row.pretrain_flops} pretraining FLOPs"


def _gate_seed(seed: int, arms: Sequence[Arm], stages: int) -> Iterator[str]:
    if len({arm.stage0 for arm in arms}) > 1 or arms[0].stage0 is None:
        found = ", ".join(f"{arm.method} {(arm.stage0 or 'none')[:12]}" for arm in arms)
        yield f"seed {seed}: the methods do not share one stage-0 checkpoint ({found})"
    for stage in range(stages):
        rows = [row for arm in arms for row in arm.rows if row.stage == stage]
        if len({(row.pretrain_flops, row.pretrain_tokens) for row in rows}) > 1:
            found = ", ".join(f"{r.method} {r.pretrain_flops:.6g} FLOPs, {r.pretrain_tokens} tokens" for r in rows)
            yield f"seed {seed} stage {stage}: pretraining differs between methods ({found})"


# --- figures of merit ----------------------------------------------------------------------------------------------


def flops_to_reach(target: float, flops: Sequence[float], losses: Sequence[float]) -> Crossing:
    """FLOPs at which the line through the evaluations first comes down to ``target``: straight in (loss, log FLOPs)."""
    if losses[0] <= target:
        return Crossing(flops=flops[0]) if losses[0] == target else Crossing(censored="before the first evaluation")
    for after in range(1, len(losses)):
        before = after - 1
        if losses[after] <= target:
            part = (losses[before] - target) / (losses[before] - losses[after])
            return Crossing(flops=math.exp((1 - part) * math.log(flops[before]) + part * math.log(flops[after])))
    return Crossing(censored="not reached")


def ratio_to_baseline(arms: Sequence[Arm], method: str, metric: str) -> dict[str, Any]:
    """FLOPs to reach the baseline's final loss over the baseline's FLOPs: each seed, median and range.

    A censored seed counts in the median as what it is, above all measured ratios or below them; a median or a bound
    that falls on one is None.
    """
    seeds, ordered = [], []
    for arm in (arm for arm in arms if arm.method == method):
        final = next(other for other in arms if (other.seed, other.method) == (arm.seed, BASELINE)).rows[-1]
        target, losses = final.metrics[metric], [row.metrics[metric] for row in arm.rows]
        crossing = flops_to_reach(target, [row.total_flops for row in arm.rows], losses)
        ratio = None if crossing.flops is None else crossing.flops / final.total_flops
        ordered.append(ratio or (math.inf if crossing.censored == "not reached" else 0.0))
        seeds.append({"seed": arm.seed, "target": target, "ratio": ratio, "censored": crossing.censored})
    median, low, high = (value if 0 < value < math.inf else None for value in (statistics.median(ordered), min(ordered), max(ordered)))
    reached = sum(seed["ratio"] is not None for seed in seeds)
    return {"metric": metric, "per_seed": seeds, "reached": reached, "median": median, "range": [low, high]}


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error of the mean (None for a single value) and number of values."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "n": len(values)}


def last_stage(arms: Sequence[Arm], method: str) -> dict[str, dict[str, Any]]:
    """Mean and standard error over seeds of each number at the last stage, and of its difference from the baseline."""
    own = {arm.seed: numbers_of(arm.rows[-1]) for arm in arms if arm.method == method}
    base = {arm.seed: numbers_of(arm.rows[-1]) for arm in arms if arm.method == BASELINE}
    return {
        name: mean_and_error([own[seed][name] for seed in own])
        | {"minus_random": mean_and_error([own[seed][name] - base[seed][name] for seed in own])}
        for name in next(iter(own.values()))
    }


def numbers_of(row: Row) -> dict[str, float]:
    """What is averaged over seeds."""
    return {"total_flops": row.total_flops, "seconds": row.seconds} | row.metrics


# --- results -------------------------------------------------------------------------------------------------------


def table(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The tidy table: a line an evaluation, a column a metric."""
    lines = [asdict(row) for arm in arms for row in arm.rows]
    return [line | line.pop("metrics") for line in lines]


def summary(recipe: Recipe, arms: Sequence[Arm]) -> dict[str, Any]:
    """What the JSON holds."""
    metric = f"{recipe.reference.name}.loss_nats"
    shown = {key: value for key, value in asdict(recipe).items() if key not in ("run_dir", "data_dir", "seed")}
    return surroundings() | {
        "claim": CLAIM,
        "table": table(arms),
        "last_stage": {method: last_stage(arms, method) for method in recipe.methods},
        "flops_ratio": {m: ratio_to_baseline(arms, m, metric) for m in recipe.methods if m != BASELINE},
        "recipe": without_paths(shown),
    }


def write_results(folder: Path, name: str, recipe: Recipe, arms: Sequence[Arm]) -> dict[str, Any]:
    """Write NAME.json, .csv, .png and .svg; returns what the JSON holds."""
    found = summary(recipe, arms)
    artifact.write_json(folder / f"{name}.json", found)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(found["table"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found["table"])
    with artifact.atomic_file(folder / f"{name}.csv") as handle:
        handle.write(lines.getvalue().encode())
    with mpl.rc_context({"svg.hashsalt": name, "font.size": 9}):
        figure = plot(recipe, arms)
        _save(figure, folder / f"{name}.png", dpi=150)
        _save(figure, folder / f"{name}.svg", metadata={"Date": None})
    return found


def _save(figure: Figure, path: Path, **options: Any) -> None:
    with artifact.atomic_file(path) as handle:
        figure.savefig(handle, format=path.suffix[1:], **options)


def plot(recipe: Recipe, arms: Sequence[Arm]) -> Figure:
    """Metrics against total FLOPs: seeds faint, means over seeds bold."""
    name = recipe.reference.name
    panels = [
        (f"{name}.loss_nats", f"held-out {name} loss (nats)"),
        (f"{name}.accuracy", f"held-out {name} accuracy (share)"),
        ("holdout_loss_nats", "held-out text loss (nats)"),
    ]
    unit, unit_name = flops_unit(max(row.total_flops for arm in arms for row in arm.rows))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, 3), panels, strict=True):
        for method in recipe.methods:
            lines = [_line(arm, metric, unit) for arm in arms if arm.method == method]
            colour = SERIES[series_number(recipe.methods, method)]
            for flops, values in lines:
                axes.plot(flops, values, color=colour, alpha=0.3, lw=1)
            flops, values = ([statistics.fmean(stage) for stage in zip(*side, strict=True)] for side in zip(*lines, strict=True))
            axes.plot(flops, values, color=colour, lw=2.4, marker="o", ms=4, label=f"{method}, mean of {len(lines)}")
        axes.set(xlabel=f"total compute, selection included ({unit_name})", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _line(arm: Arm, metric: str, unit: float) -> tuple[list[float], list[float]]:
    return [row.total_flops / unit for row in arm.rows], [row.metrics[metric] for row in arm.rows]


def report_lines(recipe: Recipe, found: dict[str, Any]) -> Iterator[str]:
    """The table and the ratios for a terminal."""
    name = recipe.reference.name
    columns = [f"{name}.loss_nats", f"{name}.accuracy", "holdout_loss_nats", "total_flops", "seconds"]
    yield "".join(["method".ljust(14), *(column.rjust(26) for column in columns)])
    for method, numbers in found["last_stage"].items():
        yield "".join([method.ljust(14), *(_with_error(numbers[column]).rjust(26) for column in columns)])
    for method, ratio in found["flops_ratio"].items():
        median, low, high = ("censored" if v is None else f"{v:.3f}" for v in (ratio["median"], *ratio["range"]))
        reached = f"reached by {ratio['reached']} of {len(ratio['per_seed'])} seeds"
        text = f"{method}: FLOPs to reach random's final {name} loss, over random's"
        yield f"{text}: median {median}, range {low} to {high}, {reached}"


def _with_error(value: dict[str, Any]) -> str:
    error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.2g}"
    return f"{value['mean']:.5g}{error}"


# --- command line --------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[Recipe]]:
    """Own options, and the recipe of each seed. RecipeError for a bad recipe or option."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="recipe file, before everything else; dotted overrides may follow")
    parser.add_argument("--methods", default="random,mates", help="methods, parted by commas; random is among them")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted up from the recipe's own")
    parser.add_argument("--out", type=Path, help="folder of the runs (default runs/flops_to_accuracy_RECIPE)")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of results")
    options, overrides = parser.parse_known_args(arguments)
    base, _ = parse_with(recipe_parser("run", ""), [str(options.recipe), *overrides])
    methods, known = options.methods.split(","), get_args(Method)
    require(set(methods) <= set(known), "--methods", options.methods, f"some of {', '.join(known)}")
    require(BASELINE in methods, "--methods", options.methods, f"{BASELINE} among them, which others are held against")
    require(options.seeds >= 1, "--seeds", options.seeds, "at least 1")
    out = options.out or Path("runs") / f"flops_to_accuracy_{options.recipe.stem}"
    base = replace(base, methods=methods, data_dir=str(out / "data"))
    return options, [replace(base, seed=k, run_dir=str(out / f"seed-{k}")) for k in range(base.seed, base.seed + options.seeds)]


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 the gate is closed or a step failed, 2 a bad recipe or option."""
    from mates.launchers.verbs import run_recipe, user_errors

    try:
        options, recipes = parse(sys.argv[1:] if arguments is None else arguments)
        for recipe in recipes:
            run_recipe(recipe)
    except RecipeError as error:
        print(f"flops_to_accuracy: {error}", file=sys.stderr)
        return 2
    except user_errors() as error:
        print(f"flops_to_accuracy: {error}", file=sys.stderr)
        return 1
    arms = [arm for recipe in recipes for arm in measure(recipe)]
    problems = gate(arms, recipes[0].pretrain.stages)
    if problems:
        print("\n  ".join(["flops_to_accuracy: not comparable, nothing was written:", *problems]), file=sys.stderr)
        return 1
    found = write_results(options.results, f"flops_to_accuracy_{options.recipe.stem}", recipes[0], arms)
    print("\n".join(report_lines(recipes[0], found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
