"""The n-gram influence model through the steps that fit it and score with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from synthetic_run import build_data, build_step, make_recipe

from mates.engine.config import FitConfig, Recipe
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import open_corpus
from mates.engine.distributed import World
from mates.engine.influence.fit import PREDICTIONS_FILE, fit_stage
from mates.engine.influence.model import open_model
from mates.engine.influence.ngrams import WEIGHTS_FILE, best_ridge, ngram_features
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
    build_data(made)
    for verb in ("select", "pretrain", "evaluate"):
        build_step(made, Step(verb, "shared", 0))
    build_step(made, Step("probe", "mates", 1))
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


def test_scores_are_the_saved_models_predictions(recipe: Recipe) -> None:
    layout, corpus = layout_of(recipe), open_train_corpus(recipe)
    tokenizer, _ = open_tokenizer(layout.tokenizer)
    model = open_model(layout.influence_model("mates", 1), recipe, tokenizer, WORLD.device)
    ids = make_blocks(recipe, corpus.samples).candidates(1)
    found = open_scores(layout.scores("mates", 1), corpus.fingerprint)
    scores = found.read()
    assert np.array_equal(scores[:, 0], model.predict(corpus.windows(ids)[:, :-1]))
    one_by_one = np.concatenate([model.predict(corpus.windows(ids[row : row + 1])[:, :-1]) for row in range(20)])
    assert np.array_equal(scores[:20, 0], one_by_one)
    assert found.manifest.cost.flops == make_plan(recipe, "mates").flops["score"] / (recipe.pretrain.stages - 1)


def test_weights_of_another_size_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    from mates.engine.influence.ngrams import NgramModel

    np.save(tmp_path / WEIGHTS_FILE, np.zeros(10))
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS_FILE}: 10 weights, expected 262145"):
        NgramModel.load(tmp_path)
