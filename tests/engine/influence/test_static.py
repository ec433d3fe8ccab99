"""Which probes an influence model is made from, and which stages it chooses: the stage's own, all later ones, or some."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.sparse.linalg import lsmr
from synthetic_run import build, build_shared, build_step, make_recipe

from mates.engine.config import FitConfig, Recipe, RecipeError
from mates.engine.data.corpus import open_corpus
from mates.engine.distributed import World
from mates.engine.evaluate.report import write_report
from mates.engine.influence.bags import ngram_features
from mates.engine.influence.fit import PREDICTIONS_FILE, fit_stage, split_labels
from mates.engine.influence.ngrams import PENALTIES
from mates.engine.influence.score import open_scores, score_stage
from mates.engine.layout import layout_of
from mates.engine.loop import Step, needed_steps, run_steps, step_request
from mates.engine.plan import make_plan
from mates.engine.pretrain.stage import open_train_corpus
from mates.engine.probe.stage import read_influences
from mates.engine.select.stage import select_stage
from mates.launchers.steps import chosen_stage
from mates.preprocess import artifact

WORLD = World(0, 1, torch.device("cpu"))


def test_the_model_of_stage_1_scores_stage_2(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, methods=["mates", "mates-static"], fit=FitConfig(model="ngram"))
    build_shared(recipe, ["mates", "mates-static"], ["probe"])
    for method in recipe.methods:
        fit_stage(recipe, WORLD, method, 1)
        score_stage(recipe, WORLD, method, 1)
        build_step(recipe, Step("select", method, 1))
        build_step(recipe, Step("pretrain", method, 1))
    score_stage(recipe, WORLD, "mates-static", 2)
    select_stage(recipe, "mates-static", 2)
    layout, corpus = layout_of(recipe), open_train_corpus(recipe)
    model = artifact.load(layout.influence_model("mates-static", 1), "influence model")
    assert artifact.load(layout.scores("mates-static", 2), "scores").inputs["influence_model"] == model.fingerprint
    first, second = (open_scores(layout.scores("mates-static", stage), corpus.fingerprint) for stage in (1, 2))
    assert first.samples == second.samples
    assert not np.array_equal(first.read(), second.read()), "other candidates"
    same = [artifact.load(layout.index(method, 1), "selection index").fingerprint for method in recipe.methods]
    assert same[0] == same[1], "at stage 1 there is nothing to tell them apart"


def test_only_stage_1_is_probed(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, methods=["mates-static"])
    verbs = {stage: [step.verb for step in run_steps(recipe) if step.stage == stage] for stage in (1, 2)}
    assert verbs[1] == ["probe", "fit", "score", "select", "pretrain", "evaluate"]
    assert verbs[2] == ["score", "select", "pretrain", "evaluate"]
    assert list(needed_steps(recipe, Step("score", "mates-static", 2))) == [Step("fit", "mates-static", 1)]


def five_stages(folder: Path, every: int, **fit: object) -> Recipe:
    base = make_recipe(folder)
    return replace(
        base,
        methods=["mates"],
        pretrain=replace(base.pretrain, stages=5),
        probe=replace(base.probe, every=every),
        fit=FitConfig(model="ngram", **fit),  # type: ignore[arg-type]
    )


def test_a_model_chooses_until_the_next_probe(tmp_path: Path) -> None:
    recipe = five_stages(tmp_path, 2)
    steps = list(run_steps(recipe))
    for verb, stages in {"probe": [1, 3], "fit": [1, 3], "score": [1, 2, 3, 4]}.items():
        assert [step.stage for step in steps if step.verb == verb] == stages
    by = {stage: next(needed_steps(recipe, Step("score", "mates", stage))) for stage in (1, 2, 3, 4)}
    assert {stage: step.stage for stage, step in by.items()} == {1: 1, 2: 1, 3: 3, 4: 3}
    warm = list(needed_steps(replace(recipe, fit=FitConfig()), Step("fit", "mates", 3)))
    assert warm == [Step("probe", "mates", 3), Step("fit", "mates", 1)]
    build(recipe)
    models = [artifact.load(layout_of(recipe).scores("mates", stage), "scores").inputs["influence_model"] for stage in (1, 2, 3, 4)]
    assert models[0] == models[1] != models[2] == models[3]
    everywhere = replace(recipe, probe=replace(recipe.probe, every=1))
    assert make_plan(everywhere).flops["probe"] == 2 * make_plan(recipe).flops["probe"]
    labels = artifact.load(layout_of(recipe).labels("mates", 3), "labels")
    assert step_request(everywhere, Step("probe", "mates", 3)).find() == labels, "when the next probe comes says nothing about this one"


def test_labels_of_earlier_probes_are_trained_on_too(tmp_path: Path) -> None:
    """Against a ridge regression that is written out here: each probe's labels in its own SD, none that the new split tests on."""
    recipe = five_stages(tmp_path, 1, earlier_labels=2)
    build(recipe)
    for stage in (3, 4):
        shutil.rmtree(layout_of(recipe).influence_model("mates", stage))
    assert [step.stage for step in needed_steps(recipe, Step("fit", "mates", 4)) if step.verb == "probe"] == [4, 3, 2]
    info = fit_stage(recipe, WORLD, "mates", 4).info
    layout, pool = layout_of(recipe), open_corpus(layout_of(recipe).corpus("pool"), recipe.pretrain.sequence_length)
    ids, targets = [], []
    own: dict[str, np.ndarray] = {}
    for stage in (4, 3, 2):
        probed, values, _ = read_influences(layout.labels("mates", stage), [recipe.reference.name])
        parts = split_labels(probed, recipe.fit, recipe.seed)
        train = values[parts["train"], 0]
        ids.append(probed[parts["train"]])
        targets.append((train - train.mean()) / train.std())
        if stage == 4:
            own = {part: probed[rows] for part, rows in parts.items()}
            own |= {"all": probed, "sd": (values[:, 0] - train.mean()) / train.std()}
    assert info["earlier_labels"] == len(ids[1]) + len(ids[2])
    assert not set(np.concatenate(ids)) & (set(own["test"]) | set(own["validation"]))

    def ridge(penalty: float) -> np.ndarray:
        values = np.concatenate(targets)
        weights = lsmr(ngram_features(pool.windows(np.concatenate(ids))[:, :-1]), values - values.mean(), damp=penalty**0.5, maxiter=50)[0]
        return np.asarray(ngram_features(pool.windows(own["all"])[:, :-1]) @ weights + values.mean())

    validation = np.isin(own["all"], own["validation"])
    best = min((ridge(penalty) for penalty in PENALTIES), key=lambda found: float(((found - own["sd"])[validation] ** 2).mean()))
    table = pq.read_table(layout.influence_model("mates", 4) / PREDICTIONS_FILE)
    assert table["sample_id"].to_pylist() == own["all"].tolist()
    np.testing.assert_allclose(table["predicted_sd"].to_numpy(), best, rtol=0, atol=1e-6)


def test_models_from_before_labels_were_kept_are_found(tmp_path: Path) -> None:
    """What is not asked for is not among the settings."""
    recipe = five_stages(tmp_path, 1)
    build_shared(recipe, ["mates"], ["probe"])
    assert "earlier_labels" not in fit_stage(recipe, WORLD, "mates", 1).settings
    assert step_request(recipe, Step("fit", "mates", 1)).find()


def test_the_report_says_which_model_chose(tmp_path: Path) -> None:
    recipe = replace(five_stages(tmp_path, 2), methods=["random", "mates"])
    build(recipe)
    html = write_report(recipe).read_text()
    assert "not done yet" not in html
    for stage, by in ((2, 1), (4, 3)):
        assert f"Chosen by the influence model of stage {by}: nothing was probed for this one." in html.split(f"mates, stage {stage}<")[1]
    assert html.count("nothing was probed for this one") == 2
    assert "40 samples every 2 stages, exact" in html


def test_a_stage_without_labels_of_its_own_is_named(tmp_path: Path) -> None:
    recipe = five_stages(tmp_path, 2)
    assert chosen_stage(recipe, "probe", None, 3) == ("mates", 3)
    with pytest.raises(
        RecipeError, match=r"--stage: found 2, expected a stage with labels of its own: one of \[1, 3\] \(probe.every is 2\)"
    ):
        chosen_stage(recipe, "fit", "mates", 2)
    assert chosen_stage(recipe, "score", None, 2) == ("mates", 2)
