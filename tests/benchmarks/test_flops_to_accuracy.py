"""FLOPs to accuracy: the ratio against hand-computed values, censoring, the gate, and what is written."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import COSTS, REFERENCE, build, make_recipe, metrics

from mates.engine.config import Recipe, RecipeError
from mates.engine.layout import layout_of
from mates.launchers import verbs
from mates.preprocess import artifact

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from flops_to_accuracy import (
    Arm,
    Crossing,
    Row,
    flops_to_reach,
    gate,
    last_stage,
    main,
    mean_and_error,
    parse,
    ratio_to_baseline,
)
from surroundings import without_paths

LOSS = "lambada.loss_nats"


def arm(method: str, points: list[tuple[float, float]], seed: int = 0, **changes: Any) -> Arm:
    """An arm from (total FLOPs, loss) of its stages."""
    rows = [
        Row(
            seed=seed,
            method=method,
            stage=stage,
            total_flops=flops,
            pretrain_flops=1e12 * (stage + 1),
            selection_flops=flops - 1e12 * (stage + 1),
            pretrain_tokens=100 * (stage + 1),
            seconds=60.0,
            metrics={LOSS: loss},
        )
        for stage, (flops, loss) in enumerate(points)
    ]
    return replace(Arm(seed=seed, method=method, stage0=f"stage0-{seed}", test_sets={"holdout": "h"}, rows=rows), **changes)


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
        (edited(lambda row: replace(row, total_flops=math.inf)), "total_flops not finite"),
        (edited(lambda row: replace(row, pretrain_flops=2.1e12)), "stage 1: pretraining differs"),
        (edited(lambda row: replace(row, pretrain_tokens=201)), "stage 1: pretraining differs"),
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
    monkeypatch.setattr(verbs, "run_recipe", build)


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

    monkeypatch.setattr(verbs, "run_recipe", broken)
    results = tmp_path / "results"
    arguments = [str(recipe_file[0]), "--seeds", "1", "--out", str(tmp_path / "out"), "--results", str(results)]
    assert main(arguments) == 1
    assert "seed 0 mates: no complete evaluation and costs of stage 1" in capsys.readouterr().err
    assert not results.exists()


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
