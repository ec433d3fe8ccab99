"""The n-gram influence model through the steps that fit it and score with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from synthetic_run import build_shared, build_step, make_recipe

from mates.engine.config import FitConfig, Recipe
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import open_corpus
from mates.engine.distributed import World
from mates.engine.influence.bags import ngram_features
from mates.engine.influence.fit import PREDICTIONS_FILE, agreement, calibration, fit_request, fit_stage, selected_influence
from mates.engine.influence.model import Samples, open_model, predict
from mates.engine.influence.ngrams import WEIGHTS_FILE, best_ridge
from mates.engine.influence.score import open_scores, score_stage
from mates.engine.layout import layout_of
from mates.engine.loop import Step
from mates.engine.plan import make_plan
from mates.engine.pretrain.stage import open_train_corpus
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.tokenizer import open_tokenizer

WORLD = World(0, 1, torch.device("cpu"))
LENGTH = 32


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run up to the scores of stage 1."""
    made = make_recipe(tmp_path_factory.mktemp("ngram"), fit=FitConfig(model="ngram"))
    build_shared(made, ["mates"], ["probe"])
    fit_stage(made, WORLD, "mates", 1)
    score_stage(made, WORLD, "mates", 1)
    return made


def test_predictions_are_the_ridge_regressions(recipe: Recipe) -> None:
    directory = layout_of(recipe).influence_model("mates", 1)
    manifest, table = artifact.verify(directory, "influence model"), pq.read_table(directory / PREDICTIONS_FILE)
    part, nats = np.array(table["part"].to_pylist()), table["oracle_nats"].to_numpy()
    rows = {name: np.flatnonzero(part == name) for name in ("train", "validation", "test")}
    pool = open_corpus(layout_of(recipe).corpus("pool"), LENGTH)
    features = ngram_features(pool.windows(table["sample_id"].to_numpy())[:, :-1])
    train = nats[rows["train"]]
    expected = best_ridge(features, (nats - train.mean()) / train.std(), rows["train"], rows["validation"]).predict(features)
    assert table["predicted_sd"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert manifest.info["model"] == "ngram"
    assert manifest.info["label_sd_nats"] == train.std()
    assert manifest.info["flops_per_sample"] == 2 * (2 * LENGTH - 1)
    assert set(manifest.info["agreement"]) == set(rows)


def test_what_the_choice_is_worth_by_hand() -> None:
    oracle = np.array([3.0, -1.0, 0.0, 2.0, -4.0, 1.0, 5.0, -2.0, 6.0, 7.0])
    predicted = np.array([0.0, -1.0, 5.0, 5.0, 5.0, 5.0, 5.0, -2.0, 5.0, 5.0])
    found = selected_influence(predicted, oracle, 0.2, 1e-3)
    assert found == {"selected": -1.5, "sampled": -1.5, "random": pytest.approx(1.7), "oracle": -3.0}
    assert selected_influence(oracle, oracle, 0.5, 1.0)["selected"] == selected_influence(predicted, oracle, 0.5, 1.0)["oracle"]


def test_what_a_sample_is_worth_lies_between_the_best_and_chance() -> None:
    oracle = np.random.default_rng(0).normal(size=5_000)
    worth = [selected_influence(oracle, oracle, 0.2, temperature)["sampled"] for temperature in (0.01, 0.5, 2.0, 1e3)]
    assert worth == sorted(worth)
    assert worth[0] == pytest.approx(np.sort(oracle)[:1000].mean(), abs=0.01)
    assert worth[-1] == pytest.approx(oracle.mean(), abs=0.02)
    assert calibration(oracle / 2 - 1, oracle) == {"slope": pytest.approx(2.0), "intercept": pytest.approx(2.0)}
    assert calibration(np.ones(10), oracle) == {"slope": None, "intercept": None}


def test_the_choice_on_test_labels_is_reported(recipe: Recipe) -> None:
    directory = layout_of(recipe).influence_model("mates", 1)
    info, table = artifact.load(directory).info, pq.read_table(directory / PREDICTIONS_FILE)
    test = np.array(table["part"].to_pylist()) == "test"
    targets = (table["oracle_nats"].to_numpy()[test] - info["label_mean_nats"]) / info["label_sd_nats"]
    expected = selected_influence(table["predicted_sd"].to_numpy()[test].astype(np.float64), targets, 0.5, 0.5)
    close = {name: pytest.approx(value, abs=1e-6) for name, value in expected.items()}
    assert info["selection"] == {"ratio": 0.5, "temperature": 0.5} | close
    assert info["drift"] is None


def test_drift_is_the_agreement_with_the_stage_before(recipe: Recipe) -> None:
    for verb in ("select", "pretrain", "evaluate"):
        build_step(recipe, Step(verb, "mates", 1))
    build_step(recipe, Step("probe", "mates", 2))
    manifest = fit_stage(recipe, WORLD, "mates", 2)
    found = manifest.info["drift"]
    assert -1 <= found["spearman"] <= 1
    tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
    table = pq.read_table(layout_of(recipe).influence_model("mates", 2) / PREDICTIONS_FILE)
    test = np.array(table["part"].to_pylist()) == "test"
    pool = open_corpus(layout_of(recipe).corpus("pool"), LENGTH)
    samples = Samples(pool, table["sample_id"].to_numpy()[test])
    before = predict(open_model(layout_of(recipe).influence_model("mates", 1), recipe, tokenizer, WORLD.device), samples)
    assert found == {name: pytest.approx(value) for name, value in agreement(table["predicted_sd"].to_numpy()[test], before[:, 0]).items()}


def test_a_stage_is_fitted_without_a_model_of_the_stage_before(recipe: Recipe) -> None:
    fitted, hidden = (layout_of(recipe).influence_model("mates", stage) / artifact.MANIFEST_NAME for stage in (2, 1))
    fitted.unlink()
    aside = hidden.rename(hidden.with_suffix(".aside"))
    assert fit_stage(recipe, WORLD, "mates", 2).info["drift"] is None
    aside.rename(hidden)


def test_scores_are_the_saved_models_predictions(recipe: Recipe) -> None:
    layout, corpus = layout_of(recipe), open_train_corpus(recipe)
    tokenizer, _ = open_tokenizer(layout.tokenizer)
    model = open_model(layout.influence_model("mates", 1), recipe, tokenizer, WORLD.device)
    ids = make_blocks(recipe, corpus.samples).candidates(1)
    found = open_scores(layout.scores("mates", 1), corpus.fingerprint)
    scores = found.read()
    assert np.array_equal(scores, predict(model, Samples(corpus, ids)))
    one_by_one = np.concatenate([predict(model, Samples(corpus, ids[row : row + 1])) for row in range(20)])
    assert np.array_equal(scores[:20], one_by_one)
    assert found.manifest.cost.flops == make_plan(recipe, "mates").flops["score"] / (recipe.pretrain.stages - 1)


def test_weights_of_another_size_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    from mates.engine.influence.ngrams import NgramModel

    np.save(tmp_path / WEIGHTS_FILE, np.zeros((1, 10)))
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS_FILE}: 10 weights, expected 262145"):
        NgramModel.load(tmp_path)


def test_a_finished_model_is_found_where_its_pretrained_encoder_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    made = make_recipe(tmp_path, fit=FitConfig(encoder=str(folder)))
    build_shared(made, ["mates"], ["probe", "fit"])
    done = artifact.load(layout_of(made).influence_model("mates", 1), "influence model")
    assert "encoder" in done.inputs
    (folder / "config.json").unlink()
    folder.rmdir()
    assert fit_request(made, "mates", 1).find() == done
