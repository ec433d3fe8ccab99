"""Claim: model-chosen data reaches a held-out reference loss with fewer FLOPs than random data, selection included.

    python benchmarks/flops_to_accuracy.py --tier cpu --seeds 3 --arms random,mates,mates-static [--budget-minutes M] [--report-only]
    python benchmarks/flops_to_accuracy.py RECIPE --methods random,mates --seeds 5 [--out DIR] [--dotted.name VALUE ...]

The first form runs arms of a tier (``benchmarks/tiers``): an arm is a method with recipe values of its own. The second runs methods of any
recipe. Either way all arms of a seed start from one stage-0 checkpoint, all seeds share the data in ``OUT/data``, and finished work is
skipped: an interrupted benchmark continues, and more seeds or arms can be added later. A tier's results are made from all runs that are
complete, whichever were asked for this time; ``--budget-minutes`` stops between steps (exit code 75), to go on later. ``--extend`` adds
arms or seeds to results whose runs are on another machine, or gone: it takes those as complete. An arm that is added to a seed must start
from the same stage-0 checkpoint, to the bit, which takes the same versions, kind of processor and threads.

A gate comes before any figure: all evaluations of the runs are there and finite, and at each stage all arms had the same pretraining FLOPs
and tokens, from the same stage-0 checkpoint, measured on the same test sets; else nothing is written and the exit code is 1.

The figure of merit is an arm's FLOPs to reach random's final held-out reference loss, over random's own FLOPs; below 1 the arm is cheaper.
A run of a tier is evaluated at ten stages or more after stage 0, each at the end of a decay branch from the stage's checkpoint; evaluations
are joined by straight lines in (loss, log FLOPs). An arm that never gets there is censored: it counts as above all others, and has no
number. FLOPs and seconds are cumulative over pretraining and selection, the shared stage 0 included; evaluation, its branches and data
preparation are left out for every arm alike, except that a branch whose end is probed is billed to the probe.

Tiers also compare at equal tokens (the last stage) and at equal total FLOPs (random's final ones, an arm's metric interpolated on the same
lines), differences paired by seed. Intervals of ratios are 95% bootstrap intervals over seeds; bands of a tier's plot are 95%
intervals of the mean by Student's t.

Writes ``flops_to_accuracy_NAME.{json,csv,png,svg}`` into ``--results``, NAME being the recipe's or the tier's, and for a tier a table in
``flops_to_accuracy_NAME.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import matplotlib as mpl
from blake3 import blake3
from comparison import (
    BASELINE,
    COVERED,
    Arm,
    Json,
    Row,
    gate,
    last_stage,
    measure,
    minus_random,
    missing_stages,
    overhead,
    ratio_to_baseline,
)
from exits import exit_code
from experiment import (
    Run,
    Tier,
    bring_to_end,
    load_tier,
    make_data,
    measured,
    of_this_version,
    other_settings,
    require_same,
    require_text,
    runs_of,
)
from matplotlib.figure import Figure
from plots import STYLE, save_figure
from scipy import stats
from surroundings import REPOSITORY, surroundings, without_paths

from mates.engine.config import INFLUENCE_METHODS, Method, Recipe, RecipeError, require
from mates.engine.evaluate.figures import SERIES, flops_unit, series_number
from mates.engine.pretrain.vigilance import STOPPED
from mates.launchers.recipe import parse_with, recipe_parser
from mates.preprocess import artifact

CLAIM = "Model-chosen data reaches random data's final held-out reference loss with fewer FLOPs, selection included."
MAIN_ARM = "mates"
LEAST_EVALUATIONS = 10


# --- results -------------------------------------------------------------------------------------------------------


def table(arms: Sequence[Arm]) -> list[Json]:
    """The tidy table: a line an evaluation, a column a part's FLOPs or seconds, or a metric."""
    return [row.line() for arm in arms for row in arm.rows]


def names_of(arms: Sequence[Arm]) -> list[str]:
    """Names of the arms, in order."""
    return list(dict.fromkeys(arm.name for arm in arms))


def loss_of(recipe: Recipe) -> str:
    """The metric that the claim is about."""
    return f"{recipe.reference.name}.loss_nats"


def further_losses(recipe: Recipe) -> list[str]:
    """Losses that ratios are told of besides: whether what is gained on the task's answers is lost elsewhere."""
    return ([f"{recipe.reference.name}.passage_loss_nats"] if recipe.evaluate.passages else []) + ["holdout_loss_nats"]


def shown(recipe: Recipe) -> Any:
    """A recipe as results show it."""
    return without_paths({key: value for key, value in asdict(recipe).items() if key not in ("run_dir", "data_dir", "seed")})


def summary(recipe: Recipe, arms: Sequence[Arm]) -> Json:
    """What the JSON of a recipe's methods holds."""
    return surroundings() | {
        "claim": CLAIM,
        "table": table(arms),
        "last_stage": {method: last_stage(arms, method) for method in recipe.methods},
        "flops_ratio": {m: ratio_to_baseline(arms, m, loss_of(recipe)) for m in recipe.methods if m != BASELINE},
        "recipe": shown(recipe),
    }


def tier_summary(tier: Tier, recipe: Recipe, arms: Sequence[Arm]) -> Json:
    """What the JSON of a tier holds; ``flops_ratio`` and ``overhead_share`` at the top are those of the arm ``mates``."""
    found: Json = {}
    for name in names_of(arms):
        runs = [arm for arm in arms if arm.name == name]
        found[name] = {
            "changes": changes_of(tier, name),
            "seeds": [run.seed for run in runs],
            "last_stage": last_stage(arms, name),
            "minus_random": minus_random(arms, name),
            "flops_ratio": ratio_to_baseline(arms, name, loss_of(recipe)),
            "flops_ratio_of": {loss: ratio_to_baseline(arms, name, loss) for loss in further_losses(recipe)},
            **overhead(arms, name),
        }
    main = found.get(MAIN_ARM)
    made = [
        {"arm": arm.name, "seed": arm.seed, "stage0": arm.stage0, "test_sets": arm.test_sets, "surroundings": arm.surroundings}
        for arm in arms
    ]
    return surroundings() | {
        "claim": CLAIM,
        "tier": tier.name,
        "seeds": sorted({arm.seed for arm in arms}),
        "evaluations": recipe.pretrain.stages,
        "flops_ratio": main and {key: main["flops_ratio"][key] for key in ("median", "low", "high", "censored")},
        "overhead_share": main and main["overhead_share"],
        "arms": found,
        "runs": made,
        "recipe": shown(recipe),
    }


def write_results(folder: Path, name: str, recipe: Recipe, arms: Sequence[Arm], found: Json, *, bands: bool = False) -> None:
    """Write NAME.json, .csv, .png and .svg; ``bands`` as for :func:`plot`."""
    rows = table(arms)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    lines = text.getvalue().encode()
    with mpl.rc_context(STYLE):
        save_figure(plot(recipe, arms, bands=bands), folder, name)
    with artifact.atomic_file(folder / f"{name}.csv") as handle:  # it and the JSON belong together: what can fail comes before
        handle.write(lines)
    artifact.write_json(folder / f"{name}.json", found | {"table_blake3": blake3(lines).hexdigest()})


def read_results(folder: Path, tier: Tier) -> list[Arm]:
    """The runs that a tier's results hold. ArtifactError where they are not whole, RecipeError where they have other arms than the tier."""
    try:
        return _read_results(folder, tier)
    except (AttributeError, KeyError, TypeError) as error:
        raise _not_results(folder / f"{tier.results_name}.json", error) from error


def _not_results(path: Path, error: Exception) -> artifact.ArtifactError:
    return artifact.ArtifactError(
        f"{path}: no results of this benchmark ({error!r}); take it and its .csv from one commit, or give another --results"
    )


def _read_results(folder: Path, tier: Tier) -> list[Arm]:
    name = tier.results_name
    path = folder / f"{name}.json"
    if not path.is_file():
        raise artifact.ArtifactError(f"{path}: no such file; name the folder of the results with --results, or leave out --extend")
    found = artifact.read_json(path)
    if "runs" not in found:
        raise artifact.ArtifactError(
            f"{path}: results of an earlier version, without `runs`; write them again where the runs are (--report-only)"
        )
    if not (folder / f"{name}.csv").is_file():
        raise artifact.ArtifactError(f"{folder / name}.csv: no such file, {path.name} belongs to it; take both files from one commit")
    table = (folder / f"{name}.csv").read_bytes()
    if blake3(table).hexdigest() != found["table_blake3"]:
        raise artifact.ArtifactError(
            f"{folder / name}.csv: not the table of {path.name} (another BLAKE3 digest); take both files from one commit"
        )
    what = _whose_results(folder)
    require(set(found["arms"]) <= set(tier.arms), "arms", ", ".join(tier.arms), f"{', '.join(found['arms'])}, {what}")
    for arm, values in found["arms"].items():
        require_same(values["changes"], changes_of(tier, arm), what, f"arms.{arm}.")
    rows = [Row.from_line(line) for line in csv.DictReader(io.StringIO(table.decode()))]
    return [
        Arm(
            seed=run["seed"],
            name=run["arm"],
            method=tier.arms[run["arm"]].method,
            stage0=run["stage0"],
            test_sets=run["test_sets"],
            rows=sorted((row for row in rows if (row.seed, row.arm) == (run["seed"], run["arm"])), key=lambda row: row.stage),
            surroundings=run["surroundings"],
        )
        for run in found["runs"]
    ]


def spare_results(folder: Path, name: str, recipe: Recipe, tier: str | None = None) -> None:
    """RecipeError where results of another recipe, or of a tier and not of a recipe, would be overwritten."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return
    try:
        found = artifact.read_json(path)
        made_by, kept = found.get("tier"), dict(found["recipe"])
    except (AttributeError, KeyError, TypeError) as error:
        raise _not_results(path, error) from error
    require(made_by == tier, "--tier", tier, f"{made_by!r}, {_whose_results(folder)}")
    try:
        made = of_this_version(kept)
    except RecipeError as error:
        require(
            tier is None, "--results", str(folder), f"another folder: {path} is of an earlier version, its recipe cannot be read ({error})"
        )
        print(f"flops_to_accuracy: {path} is of an earlier version, whose recipe cannot be read; it will be replaced", file=sys.stderr)
    else:
        require_same(_compared(made), _compared(of_this_version(shown(recipe))), _whose_results(folder))


def _whose_results(folder: Path) -> str:
    return f"which the results in {folder} are of; give another --results"


def changes_of(tier: Tier, arm: str) -> Json:
    """An arm's method and own recipe values, as results show them."""
    return {"method": tier.arms[arm].method, **without_paths(dict(tier.arms[arm].changes))}


def _compared(recipe: Mapping[str, Any]) -> Json:
    return {key: value for key, value in recipe.items() if key not in ("launch", "seed")}


# --- plot ----------------------------------------------------------------------------------------------------------


def plot(recipe: Recipe, arms: Sequence[Arm], *, bands: bool = False) -> Figure:
    """Metrics against total FLOPs: seeds faint, means over seeds bold, with ``bands`` their 95% intervals by Student's t.

    Arms that choose by influences are solid, others dashed. A dotted line is where random data ends.
    """
    name, names = recipe.reference.name, names_of(arms)
    panels = [
        (f"{name}.loss_nats", f"held-out {name} loss (nats)"),
        (f"{name}.passage_loss_nats", f"held-out {name}, whole passages (nats)")
        if recipe.evaluate.passages
        else (f"{name}.accuracy", f"held-out {name} accuracy (share)"),
        ("holdout_loss_nats", "held-out text loss (nats)"),
    ]
    unit, unit_name = flops_unit(max(row.total_flops for arm in arms for row in arm.rows))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    subplots = figure.subplots(1, len(panels))
    for axes, (metric, label) in zip(subplots, panels, strict=True):
        for arm_name in names:
            runs = [arm for arm in arms if arm.name == arm_name]
            lines = [_line(arm, metric, unit) for arm in runs]
            colour = SERIES[series_number(names, arm_name)]
            dashes = "-" if runs[0].method in (BASELINE, *INFLUENCE_METHODS) else "--"
            for flops, values in lines:
                axes.plot(flops, values, color=colour, alpha=0.3, lw=1, ls=dashes)
            flops, values = ([statistics.fmean(stage) for stage in zip(*side, strict=True)] for side in zip(*lines, strict=True))
            in_legend = f"{arm_name} ({len(lines)} seed{'s' * (len(lines) > 1)})"
            axes.plot(flops, values, color=colour, lw=2, ls=dashes, marker="o", ms=3.5, label=in_legend)
            if arm_name == BASELINE:
                axes.axhline(values[-1], color=colour, lw=1, ls=":")
            if bands and len(lines) > 2:  # of two, Student's t is 13 standard errors
                widths = [half_width(stage) for stage in zip(*(values for _, values in lines), strict=True)]
                low, high = ([value + sign * width for value, width in zip(values, widths, strict=True)] for sign in (-1, 1))
                axes.fill_between(flops, low, high, color=colour, alpha=0.12, lw=0)
        axes.set(xlabel=f"total compute, selection included ({unit_name})", ylabel=label)
        axes.grid(alpha=0.3)
    shown = subplots[0].get_legend_handles_labels()
    figure.legend(*shown, loc="outside lower center", ncols=min(len(names), 5), handlelength=3.5, frameon=False)
    return figure


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of a mean, by Student's t."""
    return float(stats.t.ppf((1 + COVERED) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _line(arm: Arm, metric: str, unit: float) -> tuple[list[float], list[float]]:
    return [row.total_flops / unit for row in arm.rows], [row.metrics[metric] for row in arm.rows]


# --- words ---------------------------------------------------------------------------------------------------------


def report_lines(recipe: Recipe, found: Json) -> Iterator[str]:
    """The table and the ratios of a recipe's methods for a terminal."""
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


def tier_table(recipe: Recipe, found: Json) -> list[list[str]]:
    """Heads, then a line an arm."""
    loss = loss_of(recipe)
    name = recipe.reference.name
    heads = [
        "arm",
        "seeds",
        f"{name} loss, last stage (nats)",
        "minus random, equal tokens",
        "minus random, equal FLOPs",
        "FLOPs to random's final loss, over random's",
        *(["the same of whole passages"] if recipe.evaluate.passages else []),
        "the same of text",
        "text loss minus random, equal tokens",
        "selection's share of total FLOPs (probe, fit, score)",
        "of total time",
    ]
    return [heads, *(_tier_line(arm, values, loss, further_losses(recipe)) for arm, values in found["arms"].items())]


def _tier_line(arm: str, values: Json, loss: str, further: Sequence[str]) -> list[str]:
    line = [arm, str(len(values["seeds"])), _with_error(values["last_stage"][loss])]
    ratios = [_ratio_text(ratio) for ratio in (values["flops_ratio"], *(values["flops_ratio_of"][name] for name in further))]
    if arm == BASELINE:
        return [*line, "", "", *ratios, "", "0%", "0%"]
    difference = values["minus_random"][loss]
    parts = ", ".join(f"{100 * values['overhead'][part]['share']:.1f}" for part in ("probe", "fit", "score"))
    return [
        *line,
        _with_error(difference["equal_tokens"], "+.4f"),
        _with_error(difference["equal_flops"], "+.4f") + _censored(difference["equal_flops"]["censored"]),
        *ratios,
        _with_error(values["minus_random"][further[-1]]["equal_tokens"], "+.4f"),
        f"{100 * values['overhead_share']:.1f}% ({parts})",
        f"{100 * values['overhead_share_of_time']:.1f}%",
    ]


def _ratio_text(ratio: Json) -> str:
    if {seed["censored"] for seed in ratio["per_seed"]} == {"not reached"}:
        return "never"
    median, low, high = ("censored" if value is None else f"{value:.3f}" for value in (ratio["median"], ratio["low"], ratio["high"]))
    return (median if len(ratio["per_seed"]) == 1 else f"{median} [{low}, {high}]") + _censored(ratio["censored"])


def _censored(count: int) -> str:
    return f" ({count} censored)" if count else ""


def _with_error(value: Json, form: str = ".5g") -> str:
    if value["mean"] is None:
        return "censored"
    error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.2g}"
    return f"{value['mean']:{form}}{error}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table for a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "--:|" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


# --- command line --------------------------------------------------------------------------------------------------


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[Recipe]]:
    """Own options, and the recipe of each seed. RecipeError for a bad recipe or option."""
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False, epilog="Arms of a tier: --tier cpu --help")
    parser.add_argument("recipe", type=Path, help="recipe file, before everything else; dotted overrides may follow")
    parser.add_argument("--methods", default="random,mates", help="methods, parted by commas; random is among them")
    _add_common(parser, "runs/flops_to_accuracy_RECIPE")
    options, overrides = parser.parse_known_args(arguments)
    base, _ = parse_with(recipe_parser("run", ""), [str(options.recipe), *overrides])
    methods, known = options.methods.split(","), get_args(Method)
    require(set(methods) <= set(known), "--methods", options.methods, f"some of {', '.join(known)}")
    require(BASELINE in methods, "--methods", options.methods, f"{BASELINE} among them, which others are held against")
    require(options.seeds >= 1, "--seeds", options.seeds, "at least 1")
    out = options.out or Path("runs") / f"flops_to_accuracy_{options.recipe.stem}"
    base = replace(base, methods=methods, data_dir=str(out / "data"))
    return options, [replace(base, seed=k, run_dir=str(out / f"seed-{k}")) for k in range(base.seed, base.seed + options.seeds)]


def _add_common(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted up from the recipe's own (default %(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder of the runs (default {out})")
    parser.add_argument(
        "--results", type=Path, default=REPOSITORY / "benchmarks" / "results", help="folder of results (default %(default)s)"
    )


def parse_tier(arguments: list[str]) -> tuple[argparse.Namespace, Tier, list[Run]]:
    """Own options, the tier, and its runs. RecipeError for a bad tier, recipe or option."""
    epilog = "Also any recipe value by its dotted name, for all arms, at each call. Exit code 75: stopped by --budget-minutes."
    parser = argparse.ArgumentParser(description=CLAIM, allow_abbrev=False, epilog=epilog)
    parser.add_argument("--tier", required=True, help="name of a file in benchmarks/tiers, or a YAML file like them")
    parser.add_argument("--arms", default="random,mates", help="arms that the tier's file defines, parted by commas (default %(default)s)")
    parser.add_argument("--budget-minutes", type=float, help="begin no step after this many minutes; the same command goes on later")
    parser.add_argument("--workers", type=int, help="runs side by side, instead of the tier's")
    parser.add_argument("--report-only", action="store_true", help="run nothing: results of what is complete")
    parser.add_argument(
        "--data-only", action="store_true", help="make the tier's data, which pieces.py can carry elsewhere, and nothing else"
    )
    parser.add_argument(
        "--extend", action="store_true", help="take the runs that --results holds, wherever they were made, and run what is not among them"
    )
    _add_common(parser, "runs/flops_to_accuracy_TIER")
    options, overrides = parser.parse_known_args(arguments)
    tier = load_tier(options.tier)
    arms = options.arms.split(",")
    require(
        set(arms) <= set(tier.arms), "--arms", ", ".join(sorted(set(arms) - set(tier.arms))), f"arms of the tier: {', '.join(tier.arms)}"
    )
    require(BASELINE in arms, "--arms", options.arms, f"{BASELINE} among them, which others are held against")
    require(len(set(arms)) == len(arms), "--arms", options.arms, "each arm once")
    require(options.seeds >= 1, "--seeds", options.seeds, "at least 1")
    options.workers = tier.workers if options.workers is None else options.workers
    require(options.workers >= 1, "--workers", options.workers, "at least 1")
    budget = options.budget_minutes
    require(budget is None or budget > 0, "--budget-minutes", budget, "more than 0")
    options.out = options.out or Path("runs") / tier.results_name
    runs = runs_of(tier, arms, options.seeds, options.out, overrides)
    stages = runs[0].recipe.pretrain.stages
    require(stages > LEAST_EVALUATIONS, "pretrain.stages", stages, f"at least {LEAST_EVALUATIONS} after stage 0, for ratios to be read off")
    options.overrides = overrides
    return options, tier, runs


def complete_arms(tier: Tier, options: argparse.Namespace, runs: Sequence[Run], taken: Sequence[Arm] = ()) -> tuple[list[Arm], list[str]]:
    """All arms that are complete below ``--out`` or ``taken`` from results, of seeds whose random is, whether they were asked for now or
    not; and why others are left out, a line each."""
    asked = {str(run) for run in runs}
    first = runs[0].recipe.seed
    names = (path.name.removeprefix("seed-") for path in options.out.glob("seed-*"))
    there = [int(name) for name in names if name.isdecimal()]
    seeds = max([options.seeds, *(seed - first + 1 for seed in there)])
    found = {str(arm): arm for arm in taken}
    left_out = []
    arms = [name for name in tier.arms if any(options.out.glob(f"seed-*/{name}")) or any(run.arm and run.arm.name == name for run in runs)]
    for run in runs_of(tier, arms, seeds, options.out, options.overrides):
        if run.arm is None or str(run) in found:
            continue
        if not run.folder.is_dir():
            left_out += [f"{run}: not begun"] if str(run) in asked else []
            continue
        arm = measured(run)
        missing = missing_stages(arm, run.recipe.pretrain.stages)
        if not missing:
            found[str(arm)] = arm
        else:
            left_out.append(f"{run}: " + (other_settings(run) or f"{len(missing)} of {run.recipe.pretrain.stages} stages are not complete"))
    whole = {arm.seed for arm in found.values() if arm.name == BASELINE}
    left_out += [f"{arm}: {BASELINE} of this seed is not complete" for arm in found.values() if arm.seed not in whole]
    order = [BASELINE, *tier.arms]
    kept = [arm for arm in found.values() if arm.seed in whole]
    return sorted(kept, key=lambda arm: (order.index(arm.name), arm.seed)), left_out


def run_tier(arguments: list[str]) -> int:
    """The arms of a tier. Exit codes as :func:`main`, and 75: stopped after ``--budget-minutes``."""
    options, tier, runs = parse_tier(arguments)
    if options.data_only:
        make_data(runs[0].recipe)
        return 0
    spare_results(options.results, tier.results_name, runs[0].recipe, tier.name)
    taken = read_results(options.results, tier) if options.extend else []
    if taken:
        _tell("taken from the results, of which nothing is run here:", [f"{arm}, {_made_by(arm)}" for arm in taken])
    stopped, failed = 0, list[str]()
    if not options.report_only:
        require_text(runs[0].recipe)
        there = {str(arm) for arm in taken}
        stopped, failed = bring_to_end(
            [run for run in runs if str(run) not in there],
            workers=options.workers,
            prunes=tier.prune,
            budget_minutes=options.budget_minutes,
            stage0={arm.seed: arm.stage0 for arm in taken if arm.stage0},
        )
    arms, left_out = complete_arms(tier, options, runs, taken)
    _tell("left out:", left_out)
    is_written = bool(arms) and not close_gate(arms, runs[0].recipe.pretrain.stages)
    if is_written:
        write_tier(tier, runs[0].recipe, arms, options.results)
    else:
        print("flops_to_accuracy: no results were written", file=sys.stderr)
    _tell("failed, their own messages stand above:", failed)
    if stopped and not failed:
        return STOPPED
    return 0 if is_written and not failed else 1


def _tell(what: str, lines: Sequence[str]) -> None:
    if lines:
        print("\n  ".join([f"flops_to_accuracy: {what}", *lines]), file=sys.stderr)


def _made_by(arm: Arm) -> str:
    made = arm.surroundings
    return f"commit {((made.get('git') or {}).get('commit') or 'unknown')[:12]}, {made.get('machine', {}).get('cpu', 'machine unknown')}"


def write_tier(tier: Tier, recipe: Recipe, arms: Sequence[Arm], folder: Path) -> None:
    """Write a tier's results, and print their table."""
    name, found = tier.results_name, tier_summary(tier, recipe, arms)
    rows = tier_table(recipe, found)
    with contextlib.suppress(artifact.ArtifactError):
        old = artifact.read_json(folder / f"{name}.json").get("runs", [])
        gone = [
            f"seed {run['seed']} {run['arm']}" for run in old if (run["seed"], run["arm"]) not in {(arm.seed, arm.name) for arm in arms}
        ]
        _tell("no longer among the results, which held them (--extend keeps what is there):", gone)
    write_results(folder, name, recipe, arms, found, bands=True)
    with artifact.atomic_file(folder / f"{name}.md") as handle:
        handle.write(markdown(rows).encode())
    print("\n".join(aligned(rows)))


def close_gate(arms: Sequence[Arm], stages: int) -> bool:
    """Whether the gate is closed; it says why."""
    problems = gate(arms, stages)
    if problems:
        print("\n  ".join(["flops_to_accuracy: not comparable, nothing was written:", *problems]), file=sys.stderr)
    return bool(problems)


def run_methods(arguments: list[str]) -> int:
    """The methods of a recipe. Exit codes as :func:`main`."""
    from mates.launchers.run import run_recipe

    options, recipes = parse(arguments)
    spare_results(options.results, f"flops_to_accuracy_{options.recipe.stem}", recipes[0])
    for recipe in recipes:
        run_recipe(recipe)
    arms = [arm for recipe in recipes for arm in measure(recipe)]
    if close_gate(arms, recipes[0].pretrain.stages):
        return 1
    found = summary(recipes[0], arms)
    write_results(options.results, f"flops_to_accuracy_{options.recipe.stem}", recipes[0], arms, found)
    print("\n".join(report_lines(recipes[0], found)))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 1 the gate is closed or a step failed, 2 a bad recipe or option."""
    given = sys.argv[1:] if arguments is None else arguments
    work = run_tier if any(word.partition("=")[0] == "--tier" for word in given) else run_methods
    return exit_code("flops_to_accuracy", lambda: work(given))


if __name__ == "__main__":
    sys.exit(main())
