"""FLOPs to accuracy: the ratio against hand-computed values, intervals, censoring, the gate, arms of a tier, and what is written."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from synthetic_run import COSTS, REFERENCE, build, build_data, build_step, make_recipe, metrics

from mates.engine.config import Recipe, RecipeError
from mates.engine.layout import layout_of
from mates.engine.loop import STAGE_VERBS, Step, step_request
from mates.engine.pretrain.vigilance import STOPPED
from mates.launchers.recipe import write_recipe
from mates.preprocess import artifact
from mates.preprocess.inputs import InputError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import experiment
import flops_to_accuracy
import pieces
from comparison import (
    PARTS,
    SELECTION,
    Arm,
    Crossing,
    Row,
    bootstrap_interval,
    flops_to_reach,
    gate,
    last_stage,
    mean_and_error,
    median,
    minus_random,
    overhead,
    ratio_to_baseline,
    value_at,
)
from experiment import MEASURED, TIERS, Run, load_tier, measured, runs_of
from flops_to_accuracy import half_width, main, markdown, parse, parse_tier
from surroundings import without_paths

LOSS = "lambada.loss_nats"


def arm(method: str, points: list[tuple[float, float]], seed: int = 0, **changes: Any) -> Arm:
    """An arm from (total FLOPs, loss) of its stages; all that is not pretraining is the probe's."""
    rows = [
        Row(
            seed=seed,
            arm=method,
            method=method,
            stage=stage,
            flops=dict.fromkeys(PARTS, 0.0) | {"pretrain": 1e12 * (stage + 1), "probe": flops - 1e12 * (stage + 1)},
            seconds=dict.fromkeys(PARTS, 0.0) | {"pretrain": 45.0, "fit": 15.0},
            pretrain_tokens=100 * (stage + 1),
            metrics={LOSS: loss},
        )
        for stage, (flops, loss) in enumerate(points)
    ]
    return replace(Arm(seed=seed, name=method, method=method, stage0=f"stage0-{seed}", test_sets={"holdout": "h"}, rows=rows), **changes)


# --- the ratio -----------------------------------------------------------------------------------------------------


def test_interpolation_is_linear_in_loss_and_logarithmic_in_flops() -> None:
    # half of the way from 5 to 4 nats is the geometric mean of 1e12 and 4e12
    found = flops_to_reach(4.5, [1e12, 4e12], [5.0, 4.0])
    assert found.flops == pytest.approx(2e12, rel=1e-12)
    # a quarter of the way from 4 to 3 nats, from 4e12 to 64e12: 4e12 · 16^(1/4)
    assert flops_to_reach(3.75, [1e12, 4e12, 64e12], [5.0, 4.0, 3.0]).flops == pytest.approx(8e12, rel=1e-12)


def test_a_target_on_a_point_is_that_point() -> None:
    assert flops_to_reach(4.0, [1e12, 4e12], [5.0, 4.0]).flops == pytest.approx(4e12)
    assert flops_to_reach(5.0, [1e12, 4e12], [5.0, 4.0]).flops == 1e12


def test_the_first_crossing_counts() -> None:
    assert flops_to_reach(4.5, [1e12, 4e12, 8e12, 9e12], [5.0, 4.0, 6.0, 3.0]).flops == pytest.approx(2e12)


def test_a_loss_that_is_not_reached_is_censored() -> None:
    assert flops_to_reach(3.0, [1e12, 4e12], [5.0, 4.0]) == Crossing(censored="not reached")
    assert flops_to_reach(6.0, [1e12, 4e12], [5.0, 4.0]) == Crossing(censored="before the first evaluation")


def test_ratio_is_per_seed_with_median_and_range() -> None:
    arms = []
    for seed, final in enumerate([4.0, 3.0, 3.5]):  # of mates, where random ends at 4 nats after 4e12 FLOPs
        arms.append(arm("random", [(1e12, 5.0), (4e12, 4.0)], seed))
        arms.append(arm("mates", [(1e12, 5.0), (4e12, final)], seed))
    found = ratio_to_baseline(arms, "mates", LOSS)
    expected = [1.0, 2e12 / 4e12, 4 ** (1 / 1.5) / 4]  # at the end, half of the way, two thirds of the way
    assert [seed["ratio"] for seed in found["per_seed"]] == pytest.approx(expected)
    assert found["median"] == pytest.approx(expected[2])
    assert found["range"] == pytest.approx([0.5, 1.0])
    assert found["reached"] == 3


def test_censored_seeds_count_in_the_median_and_have_no_number() -> None:
    arms = []
    for seed, final in enumerate([4.5, 3.0, 4.25]):
        arms.append(arm("random", [(1e12, 5.0), (4e12, 4.0)], seed))
        arms.append(arm("mates", [(1e12, 5.0), (4e12, final)], seed))
    found = ratio_to_baseline(arms, "mates", LOSS)
    assert [seed["censored"] for seed in found["per_seed"]] == ["not reached", None, "not reached"]
    assert [seed["ratio"] for seed in found["per_seed"]] == [None, pytest.approx(0.5), None]
    assert (found["reached"], found["median"]) == (1, None)
    assert found["range"] == [pytest.approx(0.5), None]
    json.dumps(found, allow_nan=False)


def test_selection_is_paid_for() -> None:
    arms = [arm("random", [(1e12, 5.0), (2e12, 4.0)]), arm("mates", [(1e12, 5.0), (3e12, 4.0)])]
    assert ratio_to_baseline(arms, "mates", LOSS)["median"] == pytest.approx(1.5)


def majority(n: int, share: float) -> float:
    """Chance that most of n (odd) draws are of a kind that has a share of what is drawn from."""
    return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n // 2 + 1, n + 1))


@pytest.mark.parametrize("n", [3, 5, 7, 9])
def test_the_bootstrap_interval_is_that_of_order_statistics(n: int) -> None:
    # the median of n resampled values is at most the j-th smallest where most of them are among the j smallest
    values = [0.5 + 0.1 * rank for rank in range(n)]
    low = next(values[j - 1] for j in range(1, n + 1) if majority(n, j / n) >= 0.025)
    high = next(values[j - 1] for j in range(1, n + 1) if majority(n, j / n) >= 0.975)
    assert bootstrap_interval(values[::-1]) == (low, high)


def test_one_seed_has_no_interval_and_censored_seeds_can_be_its_ends() -> None:
    assert bootstrap_interval([0.5]) is None
    assert bootstrap_interval([0.5, math.inf, 0.7]) == (0.5, math.inf)
    found = ratio_to_baseline([arm("random", [(1e12, 5.0), (4e12, 4.0)]), arm("mates", [(1e12, 5.0), (4e12, 3.0)])], "mates", LOSS)
    assert (found["median"], found["low"], found["high"]) == (pytest.approx(0.5), None, None)


def test_a_median_beside_a_censored_ratio_is_censored() -> None:
    assert median([0.5, 0.7]) == pytest.approx(0.6)
    assert median([0.5, math.inf]) == math.inf
    assert median([0.0, 0.5]) == 0.0
    assert median([math.inf, 0.5, 0.7]) == 0.7


def test_the_band_is_students_t() -> None:
    # of two values: 12.706 (the 97.5% point for one degree of freedom) · standard deviation / √2
    assert half_width([1.0, 3.0]) == pytest.approx(12.7062047 * math.sqrt(2) / math.sqrt(2), rel=1e-6)


def test_the_plot_tells_arms_and_metrics_apart(tmp_path: Path) -> None:
    methods = ["random", "mates", "mates-topk", "mates-static", "dsir", "semdedup", "quality", "perplexity", "ratings"]
    points = [(1e12, 5.0), (3e12, 4.0)]
    arms = [arm(method, points) for method in methods]
    for one in arms:
        for row in one.rows:
            row.metrics.update({f"{REFERENCE}.{name}": 1.0 for name in ("loss_nats", "accuracy")} | {"holdout_loss_nats": 2.0})
    recipe = make_recipe(tmp_path)
    figure = flops_to_accuracy.plot(recipe, arms)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [f"held-out {REFERENCE} loss (nats)", f"held-out {REFERENCE} accuracy (share)", "held-out text loss (nats)"]
    lines = {str(line.get_label()): line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}
    assert list(lines) == [f"{method} (1 seed)" for method in methods]
    assert len({line.get_color() for line in lines.values()}) == len(methods)
    dashed = [label.partition(" ")[0] for label, line in lines.items() if line.get_linestyle() == "--"]
    assert dashed == methods[4:]  # those that ask no model


def test_values_at_equal_flops_lie_on_the_same_lines() -> None:
    flops, losses = [1e12, 4e12, 64e12], [5.0, 4.0, 3.0]
    assert value_at(2e12, flops, losses) == pytest.approx(4.5)
    assert value_at(8e12, flops, losses) == pytest.approx(3.75)
    assert flops_to_reach(3.75, flops, losses).flops == pytest.approx(8e12)
    assert value_at(64e12, flops, losses) == 3.0
    assert value_at(64.1e12, flops, losses) is None
    assert value_at(0.9e12, flops, losses) is None


def test_differences_at_equal_flops_are_paired_and_censored() -> None:
    arms = []
    for seed, offset in enumerate([0.0, 1.0]):
        arms.append(arm("random", [(1e12, 5.0 + offset), (2e12, 4.0 + offset)], seed))
        # at random's 2e12 FLOPs half of the way from 5 to 3.5 nats
        arms.append(arm("mates", [(1e12, 5.0 + offset), (4e12, 3.5 + offset)], seed))
    arms += [arm("random", [(1e12, 5.0), (2e12, 4.0)], 2), arm("mates", [(1e12, 5.0), (1.9e12, 3.0)], 2)]
    found = minus_random(arms, "mates")[LOSS]
    assert found["equal_flops"] == {"mean": pytest.approx(0.25), "standard_error": pytest.approx(0, abs=1e-12), "n": 2, "censored": 1}
    assert found["equal_tokens"]["mean"] == pytest.approx((-0.5 - 0.5 - 1.0) / 3)
    assert found["equal_tokens"]["standard_error"] == pytest.approx(math.sqrt(1 / 12) / math.sqrt(3))


def test_overhead_is_a_share_of_the_total() -> None:
    found = overhead([arm("mates", [(1e12, 5.0), (2.5e12, 4.0)])], "mates")
    assert found["overhead_share"] == pytest.approx(0.5 / 2.5)
    assert found["overhead_share_of_time"] == pytest.approx(15 / 60)
    assert {part: values["share"] for part, values in found["overhead"].items()} == {"probe": 0.2, "fit": 0.0, "score": 0.0, "select": 0.0}


def test_mean_and_standard_error_by_hand() -> None:
    assert mean_and_error([1.0, 2.0, 3.0]) == {"mean": 2.0, "standard_error": pytest.approx(1 / math.sqrt(3)), "n": 3}
    assert mean_and_error([1.5]) == {"mean": 1.5, "standard_error": None, "n": 1}


def test_differences_are_taken_within_a_seed() -> None:
    arms = [arm("random", [(1e12, 5.0)], 0), arm("random", [(1e12, 3.0)], 1)]
    arms += [arm("mates", [(1e12, 2.9)], 1), arm("mates", [(1e12, 4.9)], 0)]
    difference = last_stage(arms, "mates")[LOSS]["minus_random"]
    assert difference["mean"] == pytest.approx(-0.1)
    assert difference["standard_error"] == pytest.approx(0, abs=1e-12)


# --- the gate ------------------------------------------------------------------------------------------------------


def pair(**changes: Any) -> list[Arm]:
    points = [(1e12, 5.0), (2.5e12, 4.0)]
    return [arm("random", points), arm("mates", points, **changes)]


def edited(change: Callable[[Row], Row]) -> list[Arm]:
    """A pair whose second arm's last row is changed."""
    first, second = pair()
    return [first, replace(second, rows=[*second.rows[:-1], change(second.rows[-1])])]


def test_the_gate_is_open_for_equal_arms() -> None:
    assert gate(pair(), 2) == []


@pytest.mark.parametrize(
    ("arms", "reason"),
    [
        (
            [pair()[0], replace(pair()[1], rows=pair()[1].rows[:1])],
            "mates: no complete evaluation and costs of stage 1",
        ),
        (pair(stage0="another"), "do not share one stage-0 checkpoint"),
        ([replace(a, stage0=None) for a in pair()], "do not share one stage-0 checkpoint"),
        (pair(test_sets={"holdout": "another"}), "different test sets"),
        (edited(lambda row: replace(row, metrics={LOSS: math.nan})), "lambada.loss_nats not finite"),
        (edited(lambda row: replace(row, flops=row.flops | {"probe": math.inf})), "total_flops not finite"),
        (edited(lambda row: replace(row, flops=row.flops | {"pretrain": 2.1e12})), "stage 1: pretraining differs"),
        (edited(lambda row: replace(row, pretrain_tokens=201)), "stage 1: pretraining differs"),
        (edited(lambda row: replace(row, metrics=row.metrics | {"more": 1.0})), "random: it was evaluated without more, which others have"),
    ],
)
def test_the_gate_names_what_may_not_be_compared(arms: list[Arm], reason: str) -> None:
    problems = gate(arms, 2)
    assert len(problems) == 1
    assert reason in problems[0]


def test_an_arm_without_evaluations_is_named() -> None:
    assert "seed 0 mates: no complete evaluation and costs of stage 0, 1" in gate(pair(rows=[]), 2)[0]


# --- command line and results --------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> tuple[Path, Recipe]:
    from mates.launchers.recipe import dump_recipe

    recipe = make_recipe(tmp_path / "source")
    path = tmp_path / "small.yaml"
    path.write_text(dump_recipe(recipe))
    return path, recipe


def test_seeds_have_their_own_run_and_one_data_folder(recipe_file: tuple[Path, Recipe], tmp_path: Path) -> None:
    own = ["--methods", "random,mates-topk", "--seeds", "2", "--out", str(tmp_path / "out")]
    options, recipes = parse([str(recipe_file[0]), "--pretrain.lr", "0.002", *own, "--probe.samples", "50"])
    assert options.results.parts[-2:] == ("benchmarks", "results")
    assert [recipe.seed for recipe in recipes] == [0, 1]
    assert [recipe.run_dir for recipe in recipes] == [str(tmp_path / "out" / f"seed-{k}") for k in (0, 1)]
    assert {recipe.data_dir for recipe in recipes} == {str(tmp_path / "out" / "data")}
    assert {(r.pretrain.lr, r.probe.samples, tuple(r.methods)) for r in recipes} == {(0.002, 50, ("random", "mates-topk"))}


@pytest.mark.parametrize("options", [["--methods", "mates"], ["--methods", "random,mate"], ["--seeds", "0"]])
def test_bad_options_are_refused(recipe_file: tuple[Path, Recipe], options: list[str]) -> None:
    with pytest.raises(RecipeError, match=options[0]):
        parse([str(recipe_file[0]), *options])


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """``run_recipe`` leaves a synthetic run: the same artifacts, without training."""
    monkeypatch.setattr("mates.launchers.run.run_recipe", build)


@pytest.mark.usefixtures("untrained")
def test_results_hold_what_the_artifacts_say(recipe_file: tuple[Path, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    arguments = [str(recipe_file[0]), "--seeds", "2", "--out", str(tmp_path / "out"), "--results", str(results)]
    assert main(arguments) == 0
    name = "flops_to_accuracy_small"
    assert sorted(path.name for path in results.iterdir()) == [f"{name}.{form}" for form in ("csv", "json", "png", "svg")]
    with (results / f"{name}.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 2 * 2 * 3
    chosen = COSTS["probe"].flops + COSTS["fit"].flops + COSTS["score"].flops
    line = next(line for line in lines if (line["seed"], line["method"], line["stage"]) == ("1", "mates", "2"))
    assert float(line["total_flops"]) == 3e12 + 2 * chosen
    assert float(line["selection_flops"]) == 2 * chosen
    expected = metrics(replace(recipe_file[1], seed=1), "mates", 2)
    assert float(line[f"{REFERENCE}.loss_nats"]) == expected[f"{REFERENCE}.loss_nats"]
    text = (results / f"{name}.json").read_text()
    assert str(tmp_path) not in text
    found = json.loads(text)
    assert found["flops_ratio"]["mates"]["reached"] == 2
    assert f"median {found['flops_ratio']['mates']['median']:.3f}" in capsys.readouterr().out
    assert found["last_stage"]["mates"][f"{REFERENCE}.loss_nats"]["n"] == 2
    assert found["recipe"]["corpus"]["inputs"] == ["corpus.jsonl"]
    assert set(found["versions"]) == {"python", "torch", "deepspeed", "transformers", "numpy"}


@pytest.mark.usefixtures("untrained")
def test_a_closed_gate_writes_nothing(
    recipe_file: tuple[Path, Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(recipe: Recipe) -> None:
        build(recipe)
        artifact.unmake(layout_of(recipe).evaluation("mates", 1))

    monkeypatch.setattr("mates.launchers.run.run_recipe", broken)
    results = tmp_path / "results"
    arguments = [str(recipe_file[0]), "--seeds", "1", "--out", str(tmp_path / "out"), "--results", str(results)]
    assert main(arguments) == 1
    assert "seed 0 mates: no complete evaluation and costs of stage 1" in capsys.readouterr().err
    assert not results.exists()


# --- tiers ---------------------------------------------------------------------------------------------------------

STAGES = 11


@pytest.fixture
def tier_file(tmp_path: Path) -> Path:
    """A tier over made-up text, with two arms of one method."""
    recipe = make_recipe(tmp_path / "source")
    values = asdict(recipe)
    values["pretrain"] |= {"stages": STAGES, "steps_per_stage": 5}
    for name in ("run_dir", "data_dir", "methods"):
        del values[name]
    arms = {"random": {}, "mates": {}, "mates-linear": {"method": "mates", "probe.method": "linear", "select.ratio": 0.25}}
    path = tmp_path / "made-up.yaml"
    path.write_text(yaml.safe_dump({"recipe": values, "arms": arms}))
    return path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs of tiers leave synthetic artifacts; the list says which steps were made."""
    made: list[str] = []

    def run_apart(run: Run, workers: int, until: float | None) -> int:
        if until is not None and run.arm is not None and run.arm.name == "mates-linear":
            return STOPPED
        if run.arm is None:
            build_data(run.recipe)
        for step in run.steps():
            if step.verb in STAGE_VERBS and not step_request(run.recipe, step).find():
                build_step(run.recipe, step)
                made.append(f"{run}: {step}")
        return 0

    monkeypatch.setattr(experiment, "run_apart", run_apart)
    return made


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots stay empty, which is most of the time that results take."""
    monkeypatch.setattr(flops_to_accuracy, "plot", lambda *_, **__: Figure(figsize=(1, 1)))


def call(tier_file: Path, *more: str) -> int:
    """The benchmark, on a tier."""
    folder = tier_file.parent
    return main(["--tier", str(tier_file), "--out", str(folder / "out"), "--results", str(folder / "results"), *more])


def found_in(tier_file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tier_file.parent / "results" / "flops_to_accuracy_made-up.json").read_text())
    return found


def test_arms_share_stage_0_and_results_say_what_each_costs(tier_file: Path, built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "2", "--arms", "random,mates,mates-linear") == 0
    out, results = tier_file.parent / "out", tier_file.parent / "results"
    assert sorted(path.name for path in (out / "seed-0").iterdir()) == ["mates", "mates-linear", "random", "shared-run"]
    assert (out / "seed-0" / "mates" / "shared").resolve() == (out / "seed-0" / "shared-run" / "shared").resolve()
    assert sum("stage 0" in step.partition(":")[2] for step in built) == 2 * 3
    found, name = found_in(tier_file), "flops_to_accuracy_made-up"
    assert sorted(path.name for path in results.iterdir()) == [f"{name}.{form}" for form in ("csv", "json", "md", "png", "svg")]
    assert (found["tier"], found["seeds"], list(found["arms"])) == ("made-up", [0, 1], ["mates", "mates-linear", "random"])
    assert found["arms"]["mates-linear"]["changes"] == {"method": "mates", "probe.method": "linear", "select.ratio": 0.25}
    with (results / f"{name}.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert len(lines) == 2 * 3 * STAGES
    for line in lines:
        for unit in ("flops", "seconds"):
            parts = {part: float(line[f"{part}_{unit}"]) for part in PARTS}
            assert float(line["total_flops" if unit == "flops" else "seconds"]) == pytest.approx(sum(parts.values()), rel=1e-12)
            chosen = int(line["stage"]) if line["arm"] != "random" else 0
            assert parts["probe"] == pytest.approx(chosen * getattr(COSTS["probe"], unit))
        assert float(line["selection_flops"]) == pytest.approx(sum(float(line[f"{part}_flops"]) for part in SELECTION))
    share = found["overhead_share"]
    overhead_of = 10 * sum(COSTS[part].flops for part in ("probe", "fit", "score"))
    assert share == pytest.approx(overhead_of / (overhead_of + STAGES * COSTS["pretrain"].flops))
    assert found["arms"]["mates"]["overhead_share"] == share
    assert share == pytest.approx(math.fsum(part["share"] for part in found["arms"]["mates"]["overhead"].values()))
    assert found["flops_ratio"]["median"] == found["arms"]["mates"]["flops_ratio"]["median"]
    text = found["arms"]["mates"]["flops_ratio_of"]
    assert list(text) == ["holdout_loss_nats"]  # it gets worse by 1/32 a stage of selection: never reached
    assert [seed["censored"] for seed in text["holdout_loss_nats"]["per_seed"]] == ["not reached"] * 2
    assert str(tier_file.parent) not in json.dumps(found)
    table = (results / f"{name}.md").read_text()
    assert f"{found['flops_ratio']['median']:.3f}" in table
    assert [line.split("|")[1].strip() for line in table.splitlines()] == ["arm", "---", "random", "mates", "mates-linear"]
    assert f"{found['flops_ratio']['median']:.3f}" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_seeds_and_arms_are_added_without_doing_anything_again(tier_file: Path, built: list[str]) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    before = {path: path.stat().st_mtime_ns for path in (tier_file.parent / "out").rglob("manifest.json")}
    made = len(built)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates-linear") == 0
    assert {step.partition(":")[0] for step in built[made:]} == {"seed 0 mates-linear"}
    made = len(built)
    assert call(tier_file, "--seeds", "2", "--arms", "random,mates") == 0
    assert {step.partition(":")[0] for step in built[made:]} == {"seed 1 stage 0", "seed 1 random", "seed 1 mates"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = found_in(tier_file)  # also of the arm that was not asked for last, of the one seed that has it
    assert {name: values["seeds"] for name, values in found["arms"].items()} == {"random": [0, 1], "mates": [0, 1], "mates-linear": [0]}
    made = len(built)
    assert call(tier_file, "--seeds", "2", "--arms", "random,mates") == 0
    assert len(built) == made


@pytest.mark.usefixtures("undrawn")
def test_results_are_extended_where_their_runs_are_not(tier_file: Path, built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "2", "--arms", "random,mates") == 0
    shutil.rmtree(tier_file.parent / "out")
    before, made = found_in(tier_file), len(built)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates,mates-linear", "--extend") == 0
    assert {step.partition(":")[0] for step in built[made:]} == {"seed 0 stage 0", "seed 0 mates-linear"}
    found = found_in(tier_file)
    assert {name: values["seeds"] for name, values in found["arms"].items()} == {"random": [0, 1], "mates": [0, 1], "mates-linear": [0]}
    assert {name: found["arms"][name] for name in before["arms"]} == before["arms"]
    assert [run for run in found["runs"] if run["arm"] != "mates-linear"] == before["runs"]
    assert "seed 1 mates, commit " in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_without_being_asked_results_are_not_read(tier_file: Path, built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "2", "--arms", "random,mates") == 0
    shutil.rmtree(tier_file.parent / "out")
    made = len(built)
    assert call(tier_file, "--seeds", "2", "--extend", "--arms", "random,mates") == 0
    assert len(built) == made
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    assert {step.partition(":")[0] for step in built[made:]} == {"seed 0 stage 0", "seed 0 random", "seed 0 mates"}
    assert found_in(tier_file)["seeds"] == [0]
    assert capsys.readouterr().err.splitlines()[-2:] == ["  seed 1 random", "  seed 1 mates"]


@pytest.mark.usefixtures("undrawn")
def test_arms_of_another_stage_0_do_not_extend_results(tier_file: Path, built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    shutil.rmtree(tier_file.parent / "out")
    path = tier_file.parent / "results" / "flops_to_accuracy_made-up.json"
    path.write_text(path.read_text().replace(found_in(tier_file)["runs"][0]["stage0"], "0" * 64))
    before, made = path.read_text(), len(built)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates,mates-linear", "--extend") == 1
    assert {step.partition(":")[0] for step in built[made:]} == {"seed 0 stage 0"}
    assert "that of the runs to be extended 000000000000" in capsys.readouterr().out
    assert found_in(tier_file)["runs"] == json.loads(before)["runs"]
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates,mates-linear") == 0


@pytest.mark.usefixtures("built", "undrawn")
def test_results_of_another_recipe_are_not_extended(tier_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates-linear") == 0
    capsys.readouterr()
    assert call(tier_file, "--seeds", "1", "--extend", "--pretrain.lr", "0.5") == 2
    assert re.search(r"pretrain\.lr: found 0\.5, expected 0\.\d+, which the results in .* are of", capsys.readouterr().err)
    tier_file.write_text(tier_file.read_text().replace("select.ratio: 0.25", "select.ratio: 0.75"))
    assert call(tier_file, "--seeds", "1", "--extend") == 2
    assert "arms.mates-linear.select.ratio: found 0.75, expected 0.25" in capsys.readouterr().err
    tier_file.write_text(tier_file.read_text().replace("mates-linear:", "mates-quick:"))
    assert call(tier_file, "--seeds", "1", "--extend") == 2
    assert "arms: found 'mates, mates-quick, random', expected mates-linear, random, which" in capsys.readouterr().err


@pytest.mark.usefixtures("built", "undrawn")
def test_a_changed_table_is_not_extended(tier_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    table = tier_file.parent / "results" / "flops_to_accuracy_made-up.csv"
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    assert call(tier_file, "--seeds", "1", "--extend") == 1
    assert f"{table}: not the table of flops_to_accuracy_made-up.json" in capsys.readouterr().err
    table.write_text(whole)
    path = table.with_suffix(".json")
    path.write_text(json.dumps({key: value for key, value in found_in(tier_file).items() if key != "runs"}))
    assert call(tier_file, "--seeds", "1", "--extend") == 1
    assert f"{path}: results of an earlier version" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_budget_stops_and_what_is_complete_is_reported(tier_file: Path, built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--seeds", "1", "--arms", "random,mates,mates-linear")
    assert call(tier_file, *arguments, "--budget-minutes", "1") == STOPPED
    assert "seed 0 mates-linear: 10 of 11 stages are not complete" in capsys.readouterr().err
    assert set(found_in(tier_file)["arms"]) == {"random", "mates"}
    made = len(built)
    assert call(tier_file, *arguments, "--report-only") == 0
    assert len(built) == made
    assert call(tier_file, *arguments) == 0
    assert set(found_in(tier_file)["arms"]) == {"random", "mates", "mates-linear"}


def test_data_can_be_made_alone_and_carried(tier_file: Path, tmp_path: Path) -> None:
    assert call(tier_file, "--data-only") == 0
    out = tier_file.parent / "out"
    assert [path.name for path in out.iterdir()] == ["data"]
    pieces.pack(out / "data", tmp_path / "pieces", 50_000)
    pieces.unpack(tmp_path / "pieces", tmp_path / "elsewhere" / "data")
    run = runs_of(load_tier(str(tier_file)), ["random"], 1, tmp_path / "elsewhere")[0]
    for source in (tier_file.parent / "source").iterdir():
        source.unlink()
    with pytest.raises(InputError, match="no such file"):
        experiment.make_data(run.recipe)
    assert experiment.is_unpacked(run.recipe)
    assert not experiment.is_unpacked(runs_of(load_tier(str(tier_file)), ["random"], 1, out)[0].recipe)
    other = replace(run.recipe, tokenizer=replace(run.recipe.tokenizer, vocab_size=401))
    with pytest.raises(RecipeError, match=r"tokenizer.vocab_size: found 401, expected 400, which the unpacked data"):
        experiment.is_unpacked(other)
    assert step_request(run.recipe, Step("select", "shared", 0)).find() is None, "its inputs are there"
    assert all(artifact.verify(tmp_path / "elsewhere" / "data" / part) for part in ("tokenizer", "corpus/train", "reference/test"))


@pytest.mark.usefixtures("built", "undrawn")
def test_results_of_another_recipe_are_not_overwritten(tier_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "1") == 0
    before = found_in(tier_file)
    assert call(tier_file, "--seeds", "1", "--pretrain.lr", "0.5") == 2
    assert "give another --results" in capsys.readouterr().err
    assert found_in(tier_file) == before
    elsewhere = ("--report-only", "--results", str(tier_file.parent / "others"))
    assert call(tier_file, "--seeds", "1", "--pretrain.lr", "0.5", *elsewhere) == 1
    error = capsys.readouterr().err
    assert "seed 0 mates: 11 of 11 stages are not complete" in error
    assert "no results were written" in error


def test_runs_of_another_recipe_are_named(tier_file: Path) -> None:
    run = runs_of(load_tier(str(tier_file)), ["mates"], 1, tier_file.parent / "out")[1]
    assert experiment.other_settings(run) is None
    run.folder.mkdir(parents=True)
    write_recipe(run.folder / experiment.RUN_RECIPE, run.recipe)
    assert experiment.other_settings(run) is None
    other = replace(run, recipe=replace(run.recipe, probe=replace(run.recipe.probe, samples=41)))
    assert re.match(r"probe\.samples: found 41, expected \d+, which .*mates was made by", experiment.other_settings(other) or "")


def test_a_tier_without_its_text_says_so(tier_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(experiment, "SHARED_DATA", tier_file.parent / "none")
    inputs = f"--corpus.inputs=[{tier_file.parent}/none/web/*.zst]"
    assert call(tier_file, "--seeds", "1", inputs) == 2
    assert re.search(r"SHARED_DATA: no folder .*none for .*\*.zst; expected .*--corpus.inputs", capsys.readouterr().err)


def test_a_tier_of_ones_own_extends_another(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: cpu\nrecipe: {corpus: {inputs: [/data/web]}}\narms: {mine: {method: mates, select.ratio: 0.3}}\n")
    tier, base = load_tier(str(mine)), load_tier("cpu")
    assert set(tier.arms) == {*base.arms, "mine"}
    assert tier.recipe["corpus"]["inputs"] == ["/data/web"]
    assert tier.recipe["pretrain"] == base.recipe["pretrain"]
    mine.write_text("extends: none\n")
    with pytest.raises(RecipeError, match=r"extends: found 'none', expected a tier beside it or in "):
        load_tier(str(mine))
    mine.write_text("recipe: {}\n")
    with pytest.raises(RecipeError, match=r"mine.yaml: arms: found None, expected a mapping"):
        load_tier(str(mine))


def test_without_any_complete_run_nothing_is_written(tier_file: Path, built: list[str]) -> None:
    assert call(tier_file, "--report-only") == 1
    assert not built
    assert not (tier_file.parent / "results").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_measured_run_needs_its_weights_no_more(tier_file: Path, built: list[str]) -> None:
    tier_file.write_text(tier_file.read_text() + "prune: true\n")
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    folder = tier_file.parent / "out" / "seed-0" / "mates"
    assert not list(folder.glob("mates/*/checkpoint"))
    assert (folder / "shared" / "stage0" / "checkpoint").is_dir()
    made, found = len(built), found_in(tier_file)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    assert len(built) == made
    assert found_in(tier_file)["arms"] == found["arms"]


@pytest.mark.usefixtures("built", "undrawn")
def test_a_measured_run_is_one_wherever_its_text_lies_and_whatever_it_does_not_use(tier_file: Path) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    for run in runs_of(load_tier(str(tier_file)), ["random", "mates"], 1, tier_file.parent / "out"):
        if run.arm is None:
            continue
        shutil.rmtree(run.folder / run.arm.method)
        corpus = replace(run.recipe.corpus, inputs=[f"/elsewhere/{Path(path).name}" for path in run.recipe.corpus.inputs])
        assert len(measured(replace(run, recipe=replace(run.recipe, corpus=corpus))).rows) == STAGES
        other = replace(run, recipe=replace(run.recipe, probe=replace(run.recipe.probe, samples=41)))
        assert (len(measured(other).rows) == STAGES) == (run.arm.name == "random")


@pytest.mark.usefixtures("built", "undrawn")
@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": {}, "arm": {}}', '{"rec'])
def test_a_damaged_measurement_is_named(tier_file: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    path = tier_file.parent / "out" / "seed-0" / "mates" / MEASURED
    path.write_text(content.replace('"recipe": {}', f'"recipe": {json.dumps(artifact.read_json(path)["recipe"])}'))
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 1
    assert f"{path}: cannot be read" in capsys.readouterr().err


@pytest.mark.usefixtures("built", "undrawn")
def test_other_folders_among_the_seeds_are_passed_over(tier_file: Path) -> None:
    (tier_file.parent / "out" / "seed-old").mkdir(parents=True)
    assert call(tier_file, "--seeds", "1", "--arms", "random") == 0


@pytest.mark.usefixtures("built")
def test_results_stay_whole_where_writing_them_fails(tier_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops_to_accuracy, "save_figure", lambda *_: None)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    before = {path.name: path.read_bytes() for path in (tier_file.parent / "results").iterdir()}

    def full(*_: Any) -> None:
        raise artifact.DiskFullError("full")

    monkeypatch.setattr(flops_to_accuracy, "save_figure", full)
    assert call(tier_file, "--seeds", "2", "--arms", "random,mates") == 1
    assert {path.name: path.read_bytes() for path in (tier_file.parent / "results").iterdir()} == before


@pytest.mark.usefixtures("built", "undrawn")
@pytest.mark.parametrize(
    "change",
    [
        lambda found: [],
        lambda found: found | {"runs": None},
        lambda found: {key: value for key, value in found.items() if key != "table_blake3"},
        lambda found: found | {"arms": {"mates": {}}},
        lambda found: found | {"recipe": None},
    ],
)
def test_files_that_are_no_results_are_named(tier_file: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], Any]) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    path = next((tier_file.parent / "results").glob("*.json"))
    artifact.write_json(path, change(artifact.read_json(path)))
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates", "--extend") == 1
    assert f"{path}: no results of this benchmark" in capsys.readouterr().err


@pytest.mark.usefixtures("built", "undrawn")
def test_results_without_their_table_are_named(tier_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    path = next((tier_file.parent / "results").glob("*.csv"))
    path.unlink()
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates", "--extend") == 1
    assert f"{path}: no such file" in capsys.readouterr().err


def test_a_recipes_results_do_not_overwrite_a_tiers(
    recipe_file: tuple[Path, Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    kept = results / f"flops_to_accuracy_{recipe_file[0].stem}.json"
    kept.write_text('{"tier": "small", "recipe": {}}')
    assert main([str(recipe_file[0]), "--results", str(results), "--out", str(tmp_path / "out"), "--seeds", "1"]) == 2
    assert f"expected 'small', which the results in {results} are of; give another --results" in capsys.readouterr().err
    assert kept.read_text() == '{"tier": "small", "recipe": {}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found 'NoneType', expected a mapping"),
        ("[]", "found 'list', expected a mapping"),
        ("a: [", "cannot be read as a tier"),
        ("extends: bad", "bad.yaml: extends: found 'bad', expected a tier that does not extend this one"),
        ("extends: cpu\narms: {mine: mates}", "arms.mine: found 'mates', expected a mapping"),
        ("extends: cpu\narms: {3: {method: mates}}", "arms: found 3, expected a name"),
        ("extends: cpu\narms: {..: {method: mates}}", "arms: found '..', expected a name"),
        ("extends: cpu\narms: {mates: {3: 4}}", "arms.mates: found 3, expected values of probe"),
        ("extends: cpu\narms: {mates: {probe: {after_decay: false}}}", "arms.mates: found 'probe', expected values of probe"),
        ("extends: cpu\narms: {mates: {select.materialize: true}}", "arms.mates: found 'select.materialize', expected values of probe"),
        ("extends: cpu\nworkers: '2'", "workers: found '2', expected a whole number"),
        ("extends: cpu\nprune: 'no'", "prune: found 'no', expected true or false"),
        ("extends: cpu\nrecipe: {run_dir: here}", "recipe.run_dir: found 'here', expected nothing"),
    ],
)
def test_files_that_are_no_tiers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert main(["--tier", str(tmp_path / "bad.yaml"), "--results", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("built", "undrawn")
def test_a_run_of_other_settings_is_not_taken_for_measured(tier_file: Path) -> None:
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    run = next(run for run in runs_of(load_tier(str(tier_file)), ["mates"], 1, tier_file.parent / "out") if run.arm)
    assert (run.folder / MEASURED).is_file()
    other = replace(run, recipe=replace(run.recipe, probe=replace(run.recipe.probe, samples=41)))
    assert len(measured(run).rows) == STAGES
    assert [row.stage for row in measured(other).rows] == [0]


@pytest.mark.usefixtures("built", "undrawn")
def test_fields_that_are_new_to_recipes_take_nothing_from_what_was_measured(tier_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured runs and results of an earlier version are those of the same recipe with the new field's default."""
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    run = next(run for run in runs_of(load_tier(str(tier_file)), ["mates"], 1, tier_file.parent / "out") if run.arm)
    kept = artifact.read_json(run.folder / MEASURED)
    del kept["recipe"]["probe"]["generic"]
    artifact.write_json(run.folder / MEASURED, kept)
    assert len(measured(run).rows) == STAGES
    path = next((tier_file.parent / "results").glob("*.json"))
    found = artifact.read_json(path)
    del found["recipe"]["probe"]["generic"]
    artifact.write_json(path, found)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 0
    found["recipe"]["probe"]["generic"] = True
    artifact.write_json(path, found)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 2
    assert "probe.generic: found False, expected True" in capsys.readouterr().err
    found["recipe"]["probe"]["long_gone"] = True
    artifact.write_json(path, found)
    assert call(tier_file, "--seeds", "1", "--arms", "random,mates") == 2
    assert f"{path} is of an earlier version, its recipe cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["pretrain.lr", "probe.after_decay", "evaluate.decay_steps"])
def test_an_arm_may_not_change_stage_0(tier_file: Path, change: str) -> None:
    tier_file.write_text(tier_file.read_text().replace("probe.method:", f"{change}:"))
    with pytest.raises(RecipeError, match=r"all arms share stage 0"):
        load_tier(str(tier_file))


@pytest.mark.parametrize(
    "options",
    [
        ["--arms", "mates"],
        ["--arms", "random,mate"],
        ["--seeds", "0"],
        ["--tier", "none"],
        ["--pretrain.stages", "10"],
        ["--launch.processes", "2"],
        ["--workers", "0"],
        ["--budget-minutes", "0"],
    ],
)
def test_bad_options_of_tiers_are_refused(tier_file: Path, options: list[str]) -> None:
    with pytest.raises(RecipeError, match=options[0].removeprefix("--")):
        parse_tier(["--tier", str(tier_file), *options])


@pytest.mark.parametrize("name", sorted(path.stem for path in TIERS.glob("*.yaml")))
def test_every_tier_is_one(name: str, tmp_path: Path) -> None:
    tier = load_tier(name)
    assert {"random", "mates", "mates-static", "dsir", "semdedup", "quality", "perplexity"} <= set(tier.arms)
    runs = runs_of(tier, list(tier.arms), 1, tmp_path)
    assert len(runs) == 1 + len(tier.arms)
    recipes = {run.arm.name: run.recipe for run in runs if run.arm}
    for method in ("exact", "linear", "centred", "frozen", "corrected"):
        assert any(recipe.probe.method == method for recipe in recipes.values())
    for model in ("ngram", "encoder", "cascade"):
        assert any(recipe.fit.model == model for recipe in recipes.values())
    assert all(recipe.pretrain.stages > 10 for recipe in recipes.values())
    assert all(recipe.corpus.metadata_fields == ["source"] for recipe in recipes.values())


def test_a_table_in_markdown() -> None:
    assert markdown([["arm", "seeds"], ["random", "3"]]) == "| arm | seeds |\n|---|--:|\n| random | 3 |\n"


def test_absolute_paths_lose_their_folders() -> None:
    value = {
        "inputs": ["/data/web/c4.jsonl", "sample"],
        "path": "~/tokenizers/neox",
        "lr": 0.1,
        "name": "a/b",
        "none": None,
    }
    expected = {"inputs": ["c4.jsonl", "sample"], "path": "neox", "lr": 0.1, "name": "a/b", "none": None}
    assert without_paths(value) == expected
