"""The ledger: sums of what manifests say, and None wherever a step is not complete."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_run import COSTS, build, make_recipe

from mates.engine.config import CorpusConfig, Recipe
from mates.engine.layout import layout_of
from mates.engine.ledger import Ledger, collect, cumulative_flops, write_ledger
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = make_recipe(tmp_path_factory.mktemp("ledger"))
    build(recipe)
    return recipe


@pytest.fixture
def recipe(complete: Recipe, tmp_path: Path) -> Recipe:
    """A copy of the complete run that a test may damage."""
    shutil.copytree(complete.run_dir, tmp_path / "run")
    return replace(complete, run_dir=str(tmp_path / "run"))


def flops(cost: Cost | None) -> float:
    assert cost is not None
    return cost.flops


def test_totals_are_sums_over_a_methods_path(complete: Recipe) -> None:
    ledger = collect(complete)
    assert ledger.missing == []
    random, mates = ledger.totals("random"), ledger.totals("mates")
    assert flops(random.pretrain) == flops(mates.pretrain) == 3 * COSTS["pretrain"].flops  # the shared stage 0 and two own
    assert flops(random.evaluation) == 3 * COSTS["evaluate"].flops
    assert flops(random.selection) == 0
    chosen = COSTS["probe"].flops + COSTS["fit"].flops + COSTS["score"].flops
    assert flops(mates.selection) == 2 * chosen  # stage 0 is not chosen
    assert mates.selection is not None
    assert mates.selection.seconds >= 2 * (10 + 4 + 2)  # and what select took
    assert random.overhead_share == 0
    assert mates.overhead_share == pytest.approx(2 * chosen / (3 * COSTS["pretrain"].flops), rel=1e-12)


def test_data_is_what_the_data_manifests_say(complete: Recipe) -> None:
    layout = layout_of(complete)
    folders = [layout.tokenizer, *(layout.corpus(split) for split in ("train", "pool", "holdout"))]
    folders += [layout.reference(half) for half in ("train", "test")]
    expected = [artifact.load(folder).cost for folder in folders]
    data = collect(complete).totals("random").data
    assert data is not None
    assert data.seconds == pytest.approx(sum(cost.seconds for cost in expected))
    assert data.tokens == sum(cost.tokens for cost in expected)


def test_cumulative_flops_leave_evaluation_and_data_out(complete: Recipe) -> None:
    ledger = collect(complete)
    chosen = COSTS["probe"].flops + COSTS["fit"].flops + COSTS["score"].flops
    assert [cumulative_flops(ledger, "random", stage) for stage in range(3)] == [1e12, 2e12, 3e12]
    assert [cumulative_flops(ledger, "mates", stage) for stage in range(3)] == [1e12, 2e12 + chosen, 3e12 + 2 * chosen]


def test_a_step_that_is_not_done_is_none_and_makes_its_sums_none(recipe: Recipe) -> None:
    artifact.unmake(layout_of(recipe).labels("mates", 2))
    ledger = collect(recipe)
    assert [str(entry.step) for entry in ledger.missing] == ["probe mates stage 2", "fit mates stage 2"]
    probe = ledger.entry("probe", "mates", 2)
    assert probe is not None
    assert (probe.cost, probe.missing) == (None, "not done yet")
    mates = ledger.totals("mates")
    assert (mates.selection, mates.overhead_share) == (None, None)
    assert mates.pretrain == Cost(flops=3e12, seconds=300.0, tokens=9600)
    assert cumulative_flops(ledger, "mates", 1) is not None
    assert cumulative_flops(ledger, "mates", 2) is None
    assert cumulative_flops(ledger, "random", 2) == 3e12


def test_an_artifact_of_another_recipe_does_not_count(complete: Recipe) -> None:
    other = replace(complete, probe=replace(complete.probe, samples=50))
    ledger = collect(other)
    probe = ledger.entry("probe", "mates", 1)
    assert probe is not None
    assert probe.cost is None
    assert probe.missing is not None
    assert "other settings" in probe.missing
    assert {entry.step.method for entry in ledger.missing} == {"mates"}


def test_a_damaged_artifact_is_missing_and_named(recipe: Recipe) -> None:
    scores = layout_of(recipe).scores("mates", 1) / "scores-000000.npy"
    scores.write_bytes(scores.read_bytes()[:-4])
    entry = collect(recipe).entry("score", "mates", 1)
    assert entry is not None
    assert entry.cost is None
    assert entry.missing is not None
    assert "scores-000000.npy" in entry.missing


def test_a_run_that_has_not_begun_has_no_costs(complete: Recipe, tmp_path: Path) -> None:
    recipe = replace(complete, run_dir=str(tmp_path / "nothing"))
    ledger = write_ledger(recipe)
    assert len(ledger.missing) == len(ledger.entries)
    totals = ledger.totals("mates")
    assert (totals.pretrain, totals.selection, totals.evaluation, totals.data) == (None,) * 4


def test_the_file_holds_every_step_and_null_where_one_is_missing(recipe: Recipe) -> None:
    artifact.unmake(layout_of(recipe).evaluation("random", 2))
    ledger: Ledger = write_ledger(recipe)
    found = json.loads(layout_of(recipe).ledger.read_text())
    assert len(found["steps"]) == len(ledger.entries) == 3 + 3 + 2 * 3 + 2 * 6
    by_step = {(step["verb"], step["method"], step["stage"]): step for step in found["steps"]}
    assert by_step["evaluate", "random", 2]["cost"] is None
    assert by_step["probe", "mates", 1]["cost"] == {"flops": 2e10, "seconds": 10.0, "tokens": 1280}
    checkpoint = artifact.load(layout_of(recipe).checkpoint("shared", 0))
    assert by_step["pretrain", "shared", 0]["fingerprints"] == {"pretrain": checkpoint.fingerprint}
    assert found["methods"]["random"]["evaluation"] is None
    assert found["methods"]["random"]["overhead_share"] == 0
    assert found["methods"]["mates"]["cumulative_flops"] == [cumulative_flops(ledger, "mates", s) for s in range(3)]


def test_the_embedded_corpus_is_a_step_only_where_it_is_used(complete: Recipe) -> None:
    assert collect(complete).entry("sample-corpus") is None
    used = replace(complete, corpus=CorpusConfig(inputs=["sample"]))
    assert collect(used).entry("sample-corpus") is not None
