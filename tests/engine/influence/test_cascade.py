"""The cascade: what it drops, what that costs, and the scores of what is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import build_shared, make_recipe

from mates.engine.config import FitConfig, Recipe, ScoreConfig
from mates.engine.data.blocks import make_blocks
from mates.engine.data.index import read_index
from mates.engine.distributed import World
from mates.engine.influence.bags import BUCKETS
from mates.engine.influence.cascade import (
    CASCADE_FILE,
    DROPPED,
    SHARES,
    CascadeModel,
    best_weight,
    dropped_share,
    lost_influence,
    undropped,
)
from mates.engine.influence.encoder import EncoderModel, new_encoder
from mates.engine.influence.fit import fit_stage
from mates.engine.influence.inputs import CorpusIds
from mates.engine.influence.model import Samples, open_model, predict
from mates.engine.influence.ngrams import NgramModel, NgramRidge
from mates.engine.influence.score import open_scores, score_stage
from mates.engine.layout import layout_of
from mates.engine.pretrain.stage import open_train_corpus
from mates.engine.select.stage import select_stage
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError
from mates.preprocess.tokenizer import open_tokenizer

WORLD = World(0, 1, torch.device("cpu"))
FIT = FitConfig(model="cascade", hidden_size=32, epochs=1, cascade_loss=0.5, features=["difficulty", "relevance"])


def test_what_dropping_costs_by_hand() -> None:
    predicted = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    oracle = np.array([-4.0, 0.0, -2.0, 5.0, 6.0])  # mean 1; the best two by prediction have a mean of −2
    none, first = np.zeros(5, bool), np.array([True, False, False, False, False])
    assert lost_influence(predicted, none, oracle, 0.4) == 0
    assert lost_influence(predicted, first, oracle, 0.4) == pytest.approx((-1 - -2) / (1 - -2))
    assert lost_influence(predicted, ~none, oracle, 0.4) == 0  # all dropped alike: their order is left
    assert lost_influence(-predicted, first, oracle, 0.4) is None  # nothing gained
    assert dropped_share(-oracle, oracle[::-1].copy() * 0, oracle * 0, ratio=0.2, bound=0.5) == 0


@given(seed=st.integers(0, 1_000), ratio=st.sampled_from([0.1, 0.2, 0.5]), bound=st.floats(0, 0.3), noise=st.floats(0.1, 3))
def test_the_share_is_the_largest_that_keeps_to_the_bound(seed: int, ratio: float, bound: float, noise: float) -> None:
    source = np.random.default_rng(seed)
    oracle = source.normal(size=200)
    first, predicted = oracle + noise * source.normal(size=200), oracle + source.normal(size=200)
    found = dropped_share(first, predicted, oracle, ratio=ratio, bound=bound)
    costs = {share: lost_influence(predicted, first > np.quantile(first, 1 - share), oracle, ratio) for share in SHARES}
    assert found in (0.0, *SHARES)
    assert found <= 1 - ratio + 1e-9
    if None in costs.values():
        assert found == 0
        return
    assert all(cost is not None and cost <= bound for share, cost in costs.items() if share <= found)
    above = [share for share in SHARES if found < share <= 1 - ratio + 1e-9]
    assert not above or (costs[above[0]] or 0.0) > bound


@pytest.fixture
def model() -> CascadeModel:
    """Over tokens 0 … 99, of which the n-gram model weighs each."""
    torch.manual_seed(0)
    config = FitConfig(hidden_size=32, heads=2, chunk_tokens=16, max_chunks=2)
    encoder = EncoderModel(new_encoder(config, 100, 2).eval(), CorpusIds(config, 100), config, ScoreConfig(), torch.device("cpu"))
    source = np.random.default_rng(0)
    ridges = tuple(NgramRidge(source.normal(size=BUCKETS), 0.1) for _ in range(2))
    return CascadeModel(NgramModel(ridges), encoder, 0.0, np.array([0.5, 0.25]), 0.5, 0.25)


class Given:
    length = 32

    def __init__(self) -> None:
        self.windows = np.random.default_rng(1).integers(0, 100, (300, self.length + 1))

    def stored(self, ids: np.ndarray) -> np.ndarray:
        return np.asarray(self.windows[ids])


def test_what_is_kept_has_a_mean_of_scores_and_what_is_dropped_comes_last(model: CascadeModel) -> None:
    samples = Samples(Given(), np.arange(300))  # type: ignore[arg-type]
    rough, read, found = predict(model.ngrams, samples), predict(model.encoder, samples), predict(model, samples)
    dropped = rough @ model.join > model.threshold
    assert 50 < dropped.sum() < 250
    assert found[~dropped] == pytest.approx(0.25 * rough[~dropped] + 0.75 * read[~dropped], abs=1e-5)
    assert (found[dropped] > found[~dropped].max()).all()
    assert undropped(found, "cascade")[0][dropped] == pytest.approx(rough[dropped], abs=1e-3)
    assert undropped(found, "cascade")[1].tolist() == dropped.tolist()
    assert undropped(found, "dsir")[0] is found
    one_by_one = np.concatenate([predict(model, samples[row : row + 1]) for row in range(40)])
    assert one_by_one == pytest.approx(found[:40], abs=1e-5)


def test_the_weight_is_the_best_in_tenths() -> None:
    source = np.random.default_rng(3)
    truth, noise = source.normal(size=(400, 1)), source.normal(size=(2, 400, 1))
    first, second = ((truth + size * one).astype(np.float32) for size, one in zip((1.0, 0.5), noise, strict=True))
    found = best_weight(first, second, truth.astype(np.float32))
    errors = {tenth / 10: float(np.mean((tenth / 10 * first + (1 - tenth / 10) * second - truth) ** 2)) for tenth in range(11)}
    assert found == min(errors, key=lambda weight: errors[weight]) == pytest.approx(0.2, abs=0.11)  # variances 1 and 1/4
    assert best_weight(first, truth.astype(np.float32), truth.astype(np.float32)) == 0


def test_flops_are_of_the_share_that_is_read(model: CascadeModel) -> None:
    encoder, ngrams = model.encoder.forward_flops(10, 32), model.ngrams.forward_flops(10, 32)
    assert model.forward_flops(10, 32) == ngrams + 0.5 * encoder
    assert model.flops(10, 32, read=3) == ngrams + 0.3 * encoder
    assert ngrams == 2 * 2 * 10 * 63


def test_save_and_load(model: CascadeModel, tmp_path: Path) -> None:
    model.save(tmp_path)
    loaded = CascadeModel.load(tmp_path, model.encoder)
    samples = Samples(Given(), np.arange(50))  # type: ignore[arg-type]
    assert np.array_equal(predict(loaded, samples), predict(model, samples))
    (tmp_path / CASCADE_FILE).write_text('{"threshold": 1}')
    with pytest.raises(ArtifactError, match=r"cascade.json: .*; expected threshold, join, share and ngram_weight; fit the model again"):
        CascadeModel.load(tmp_path, model.encoder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run up to the labels of stage 1."""
    made = make_recipe(tmp_path_factory.mktemp("cascade"), fit=FIT)
    build_shared(made, ["mates"], ["probe"])
    return made


def test_through_the_steps(recipe: Recipe) -> None:
    manifest = fit_stage(recipe, WORLD, "mates", 1)
    layout, corpus = layout_of(recipe), open_train_corpus(recipe)
    assert manifest.info["model"] == "cascade"
    assert manifest.info["features"] == ["difficulty", "relevance.made-up"]
    assert [one["features"] for one in manifest.info["ablation"]] == [[], ["difficulty"], ["relevance.made-up"], manifest.info["features"]]
    assert 0 <= manifest.info["cascade"]["test_dropped_share"] <= 1
    assert abs(manifest.info["label_covariance_nats2"][0][0] - manifest.info["label_sd_nats"] ** 2) < 1e-15
    scores = score_stage(recipe, WORLD, "mates", 1)
    found = open_scores(layout.scores("mates", 1), corpus.fingerprint).read()
    tokenizer, _ = open_tokenizer(layout.tokenizer)
    model = open_model(layout.influence_model("mates", 1), recipe, tokenizer, WORLD.device)
    assert isinstance(model, CascadeModel)
    assert abs(scores.info["mean_sd"][0]) < DROPPED / 100
    assert np.mean(found > DROPPED / 2) == pytest.approx(model.share, abs=0.25)
    read = int((found < DROPPED / 2).sum())
    assert scores.info["dropped"] == len(found) - read
    assert scores.cost.flops == pytest.approx(model.flops(len(found), 32, read=read))
    for temperature in (0.5, 1_000.0):
        artifact.unmake(layout.index("mates", 1))
        asked = replace(recipe, select=replace(recipe.select, temperature=temperature))
        chosen = select_stage(asked, "mates", 1)
        assert abs(chosen.info["mean_score_candidates"]) < DROPPED / 100
        ids = read_index(layout.index("mates", 1), corpus.fingerprint).ids
        kept = make_blocks(recipe, corpus.samples).candidates(1)[found[:, 0] < DROPPED / 2]
        assert len(set(ids.tolist()) & set(kept.tolist())) == min(len(ids), len(kept))
    artifact.verify(layout.influence_model("mates", 1))
