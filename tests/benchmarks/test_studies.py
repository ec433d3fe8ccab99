"""Studies of a tier's runs: their figures against the manifests of the steps, and figures worked out by hand."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from synthetic_run import COSTS, build_data, build_step, make_recipe

from mates.engine.distributed import World
from mates.engine.influence.fit import fit_stage
from mates.engine.influence.score import score_stage
from mates.engine.layout import layout_of
from mates.engine.loop import STAGE_VERBS
from mates.launchers.recipe import write_recipe
from mates.preprocess import artifact

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import experiment
import flops_to_accuracy
import studies
from experiment import Run
from surroundings import SHARED_DATA

STAGES, SEEDS = 11, 2
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def tier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tier whose runs have made-up checkpoints and labels, and real n-gram models, scores and selections."""
    folder = tmp_path_factory.mktemp("studies")
    values = asdict(make_recipe(folder / "source"))
    values["pretrain"] |= {"stages": STAGES, "steps_per_stage": 5}
    values["probe"] |= {"samples": 60}
    values["fit"] |= {"model": "ngram"}
    values["select"] |= {"ratio": 0.25, "temperature": 0.2}
    for name in ("run_dir", "data_dir", "methods"):
        del values[name]
    path = folder / "made-up.yaml"
    path.write_text(yaml.safe_dump({"recipe": values, "arms": {"random": {}, "mates": {}}}))
    for run in experiment.runs_of(experiment.load_tier(str(path)), ["random", "mates"], SEEDS, folder / "out"):
        build_run(run)
    return path


def build_run(run: Run) -> None:
    if run.arm is None:
        build_data(run.recipe)
    else:
        experiment.link_stage0(run)
    for step in run.steps():
        if step.verb == "fit":
            fit_stage(run.recipe, ALONE, "mates", step.stage or 0)
        elif step.verb == "score":
            score_stage(run.recipe, ALONE, "mates", step.stage or 0)
        elif step.verb in STAGE_VERBS:
            build_step(run.recipe, step)


def study(tier: Path, name: str, *more: str) -> dict[str, Any]:
    """A study's JSON; its pictures are there."""
    results = tier.parent / "results"
    common = ["--tier", str(tier), "--seeds", str(SEEDS), "--out", str(tier.parent / "out"), "--results", str(results)]
    assert studies.main([name, *common, *more]) == 0
    for suffix in ("png", "svg"):
        assert (results / f"study_{name}_made-up.{suffix}").stat().st_size > 1000
    found: dict[str, Any] = json.loads((results / f"study_{name}_made-up.json").read_text())
    assert {"machine", "versions", "git", "settings"} <= set(found)
    return found


def manifests(tier: Path) -> list[list[Mapping[str, Any]]]:
    """Of each seed's influence models, by stage."""
    runs = experiment.runs_of(experiment.load_tier(str(tier)), ["mates"], SEEDS, tier.parent / "out")
    return [
        [artifact.load(layout_of(run.recipe).influence_model("mates", stage)).info for stage in range(1, STAGES)] for run in runs if run.arm
    ]


def test_drift_has_each_models_agreement_with_its_own_labels_on_the_diagonal(tier: Path) -> None:
    found, infos = study(tier, "drift"), manifests(tier)
    assert found["seeds"] == SEEDS
    own = [statistics.fmean(info["agreement"]["test"]["spearman"] for info in stage) for stage in zip(*infos, strict=True)]
    chosen = [[info["selection"]["selected"] - info["selection"]["random"] for info in stage] for stage in zip(*infos, strict=True)]
    worth = [statistics.fmean(seeds) for seeds in chosen]
    assert found["fresh_model"] == {"spearman": pytest.approx(own), "selected_sd": pytest.approx(worth, abs=1e-6)}
    assert [found["spearman"][at][at] for at in range(STAGES - 1)] == pytest.approx(own)
    assert found["first_model"]["spearman"] == found["spearman"][0]
    one_stage_old = [found["spearman"][at][at + 1] for at in range(STAGES - 2)]
    assert found["spearman_by_age"]["1"] == pytest.approx(statistics.fmean(one_stage_old))


def test_selection_repeats_what_the_fits_said_of_their_own_ratio_and_temperature(tier: Path) -> None:
    runs = experiment.runs_of(experiment.load_tier(str(tier)), ["mates"], SEEDS, tier.parent / "out")
    options = studies.parse(["selection", "--tier", str(tier)])[0]
    looked_at = studies.Runs(tier=experiment.load_tier(str(tier)), out=tier.parent / "out", runs=tuple(runs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "RATIOS", (0.25,))
        patch.setattr(studies, "TEMPERATURES", (0.2,))
        figures = studies.selection(looked_at, options).figures
    infos = [info["selection"] for seed in manifests(tier) for info in seed]
    expected = statistics.fmean(info["sampled"] - info["random"] for info in infos)
    assert figures["chosen_minus_chance_sd"] == {"0.25": {"0.2": pytest.approx(expected, abs=1e-6)}}
    best = statistics.fmean(info["oracle"] - info["random"] for info in infos)
    assert figures["oracle_minus_chance_sd"] == {"0.25": pytest.approx(best, abs=1e-6)}
    assert figures["labels_per_point"] == SEEDS * (STAGES - 1)
    assert figures["sources_of_candidates"] == {"(none)": 1.0}


def test_overhead_is_what_the_ledger_says(tier: Path) -> None:
    found = study(tier, "overhead")
    runs = experiment.runs_of(experiment.load_tier(str(tier)), ["mates"], SEEDS, tier.parent / "out")
    spent = {"pretrain": STAGES * COSTS["pretrain"].flops, "probe": (STAGES - 1) * COSTS["probe"].flops}
    for verb, folder in (("fit", "influence_model"), ("score", "scores")):
        costs = [
            artifact.load(getattr(layout_of(run.recipe), folder)("mates", stage)).cost.flops
            for run in runs
            if run.arm
            for stage in range(1, STAGES)
        ]
        spent[verb] = sum(costs) / SEEDS
    parts = found["arms"]["mates"]["overhead"]
    for verb in ("probe", "fit", "score"):
        assert parts[verb]["share"] == pytest.approx(spent[verb] / sum(spent.values()), rel=1e-3)
    shares = found["over_pretraining_by_steps_per_stage"]
    by_steps = [shares[steps] for steps in sorted(shares, key=int)]
    assert by_steps == sorted(by_steps, reverse=True), "a probe of as many samples is a smaller part of a longer stage"


def test_cost_follows_the_formulas(tier: Path) -> None:
    found = study(tier, "cost")
    ways = {way: {row["model"]: row for row in rows} for way, rows in found["ways"].items()}
    linear = ways["linear probes, BERT-base"]
    # four of five stages are probed for: 80,000 × 8·N·T against 5 × 10,000 × 512 × 6·N·T, and 32 comparisons
    assert linear["pythia-6.9b"]["parts"]["probe"] == pytest.approx(4 * 80_000 * 8 / (5 * 10_000 * 512 * 6), rel=0.05)
    # five candidates a token through the 85M weights of BERT's blocks; 805M weights of the model's and its head
    assert linear["pythia-1b"]["parts"]["score"] == pytest.approx(0.8 * 5 * 2 * 85.1e6 / (6 * (805.7e6 + 2048 * 50304)), rel=0.1)
    shares = [row["over_pretraining"] for row in linear.values()]
    assert shares == sorted(shares, reverse=True), "an encoder is a smaller part of a larger model's training"
    assert set(found["formula_over_billed"]) == {"pretrain", "probe", "fit", "score"}


def test_without_complete_runs_nothing_is_written(tier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tier", str(tier), "--out", str(tmp_path / "none"), "--results", str(tmp_path)]
    assert studies.main(["drift", *arguments]) == 1
    command = f"benchmarks/flops_to_accuracy.py --tier {tier} --arms random,mates --seeds 3 --out {tmp_path}/none"
    assert f"seed 0 mates: 11 stages are not complete; run {command}, or" in capsys.readouterr().err
    assert list(tmp_path.glob("study*")) == []


def test_runs_of_other_settings_are_named(tier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in experiment.runs_of(experiment.load_tier(str(tier)), ["mates"], 1, tier.parent / "out"):
        if run.arm:
            write_recipe(run.folder / experiment.RUN_RECIPE, run.recipe)
    common = ["--tier", str(tier), "--seeds", "1", "--out", str(tier.parent / "out"), "--results", str(tmp_path)]
    assert studies.main(["drift", *common, "--probe.samples", "61"]) == 1
    assert "studies: drift: seed 0 mates: probe.samples: found 61, expected 60, which" in capsys.readouterr().err


def test_a_study_that_lacks_something_leaves_the_others_alone(tier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(yaml.safe_load(tier.read_text()) | {"arms": {"random": {}}}))
    assert studies.main(["all", "--tier", str(plain), "--out", str(tmp_path / "out"), "--results", str(tmp_path)]) == 1
    assert "studies: drift: tier plain has no arm mates, only random" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("study*.json")] == ["study_cost_plain.json"]


def test_figures_that_are_missing_are_named() -> None:
    assert studies.not_finite({"a": [1.0, float("nan")], "b": {"c": None}, "d": 2}) == [".a.1", ".b.c"]


def test_bad_options_are_refused(tier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert studies.main(["cost", "--tier", str(tier), "--seeds", "0"]) == 2
    assert "--seeds" in capsys.readouterr().err
    assert studies.main(["cost", "--tier", "none"]) == 2


@pytest.mark.slow
def test_studies_that_probe_again(tmp_path: Path) -> None:
    """On a tier that is really run: labels of a checkpoint again, by several references."""
    values = asdict(make_recipe(tmp_path / "source"))
    values["pretrain"] |= {"stages": STAGES, "steps_per_stage": 5, "precision": "fp32"}
    values["probe"] |= {"samples": 60, "method": "linear", "fidelity_samples": 0, "after_decay": True}
    values["reference"] |= {"loss_over": "passage"}
    values["fit"] |= {"model": "ngram", "earlier_labels": 1}
    for name in ("run_dir", "data_dir", "methods"):
        del values[name]
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"recipe": values, "arms": {"random": {}, "mates": {}}}))
    common = ["--tier", str(path), "--seeds", "1", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    assert flops_to_accuracy.main([*common, "--arms", "random,mates"]) == 0
    assert studies.main(["labels", *common, "--labels", "80", "--exact", "12", "--fewest", "10"]) == 0
    found = json.loads((tmp_path / "results" / "study_labels_tiny.json").read_text())
    assert found["stage"] == STAGES - 1
    assert sum(found["labels"].values()) == 80
    assert found["ngram"][-1]["labels"] == found["encoder"]["labels"] == found["labels"]["train"]
    assert found["labels_with_endless_reference"] == pytest.approx(found["reliability"]["value"] ** 0.5)
    assert found["reliability_by_reference_items"]["1280"] >= found["reliability"]["value"]
    assert (tmp_path / "out/studies/labels-80-12/seed-0/mates" / f"stage{STAGES - 2}" / "evaluation").resolve().is_dir()
    if not (SHARED_DATA / "eval").is_dir():
        pytest.skip("the shared data folder with the nine tasks is not beside the checkout")
    assert studies.main(["references", *common, "--samples", "40", "--items", "4"]) == 0
    found = json.loads((tmp_path / "results" / "study_references_tiny.json").read_text())
    for one in (found["early"], found["late"]):
        matrix = one["spearman"]
        assert one["names"][:2] == ["passages", "last words"]
        assert [matrix[at][at] for at in range(11)] == pytest.approx([1.0] * 11)
        assert all(matrix[row][column] == pytest.approx(matrix[column][row]) for row in range(11) for column in range(11))
