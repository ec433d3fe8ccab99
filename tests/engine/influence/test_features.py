"""Extra features: against their definitions, through a save and a load, and made of samples that are not probed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_run import REFERENCE, build_data, build_shared, make_recipe

from mates.engine.baselines.dsir import Dsir
from mates.engine.baselines.ngram_lm import NgramLanguageModel
from mates.engine.baselines.quality import QualityClassifier
from mates.engine.config import CorpusConfig, FitConfig, ProbeConfig, Recipe
from mates.engine.data.corpus import open_corpus
from mates.engine.distributed import World
from mates.engine.influence.encoder import EncoderModel, load_encoder
from mates.engine.influence.features import (
    FEATURES_FILE,
    NO_FEATURES,
    ExtraFeatures,
    feature_inputs,
    item_tokens,
    make_features,
    unprobed_samples,
)
from mates.engine.influence.fit import fit_stage
from mates.engine.influence.model import Samples, open_model, predict
from mates.engine.layout import layout_of
from mates.engine.probe.stage import probed_samples
from mates.engine.reference.task import open_references
from mates.preprocess.artifact import ArtifactError, read_json, write_json
from mates.preprocess.tokenizer import open_tokenizer

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made = make_recipe(
        tmp_path_factory.mktemp("features"), fit=FitConfig(hidden_size=32, epochs=1, features=["difficulty", "relevance", "quality"])
    )
    build_shared(made, ["mates"], ["probe"])
    return made


def test_they_are_what_they_are_called(recipe: Recipe) -> None:
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    probed, others = probed_samples(recipe, pool.samples, 1), unprobed_samples(recipe, pool, 1)
    assert not set(probed.tolist()) & set(others.tolist())
    assert len(probed) + len(others) == pool.samples
    raw = pool.windows(others)[:, :-1]
    (reference,) = open_references(recipe)
    found = make_features(recipe, 1)
    assert found.names == ("difficulty", f"relevance.{REFERENCE}", f"quality.{REFERENCE}")
    windows = pool.windows(probed)[:, :-1]
    losses = NgramLanguageModel.fit([raw], pool.info("tokenizer")["vocab_size"]).losses(windows)
    weights = Dsir.fit(item_tokens(reference), [raw]).relevance(windows)
    joined = np.concatenate(list(item_tokens(reference)))
    positives, end = joined[: len(joined) // 32 * 32].reshape(-1, 32), pool.info("tokenizer")["end_of_document"]
    odds = -QualityClassifier.fit(positives, raw, end).scores(windows)
    expected = np.stack([losses, weights, odds], axis=1)
    expected = (expected - expected.mean(0)) / expected.std(0)
    values = found.compute(Samples(pool, probed))
    assert values.dtype == np.float32
    assert values == pytest.approx(expected, abs=1e-5)
    assert found.compute(Samples(pool, probed[3:5])).tolist() == values[3:5].tolist()
    assert sum(len(tokens) for tokens in item_tokens(reference)) == len(reference.tokens) + reference.items


def test_no_ngrams_are_counted_in_samples_that_a_model_is_fitted_to(tmp_path: Path) -> None:
    base = make_recipe(tmp_path, corpus=CorpusConfig(inputs=[str(tmp_path / "corpus.jsonl")], pool_share=0.4, holdout_share=0.1))
    recipe = replace(base, fit=FitConfig(features=["difficulty"], earlier_labels=2), pretrain=replace(base.pretrain, stages=5))
    build_data(recipe)
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    probed = {stage: set(probed_samples(recipe, pool.samples, stage).tolist()) for stage in (1, 2, 3, 4)}
    everything = set(range(pool.samples))
    assert set(unprobed_samples(recipe, pool, 4).tolist()) == everything - probed[4] - probed[3] - probed[2]
    assert set(unprobed_samples(recipe, pool, 1).tolist()) == everything - probed[1]
    rarely = replace(recipe, probe=replace(recipe.probe, every=3))
    assert set(unprobed_samples(rarely, pool, 4).tolist()) == everything - probed[4] - probed[1]


def test_save_and_load(recipe: Recipe, tmp_path: Path) -> None:
    found = make_features(recipe, 1)
    found.save(tmp_path)
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    samples = Samples(pool, np.arange(10))
    assert np.array_equal(ExtraFeatures.load(tmp_path).compute(samples), found.compute(samples))
    np.save(tmp_path / "features-standard.npy", np.zeros((2, 5)))
    with pytest.raises(ArtifactError, match=r"means and SDs of shape \(2, 5\), expected \(2, 3\); fit the model again"):
        ExtraFeatures.load(tmp_path)
    np.save(tmp_path / f"features-relevance.{REFERENCE}.npy", np.zeros(3))
    with pytest.raises(ArtifactError, match="extra features that cannot be read"):
        ExtraFeatures.load(tmp_path)


def test_columns_keep_their_order_whatever_the_tasks_are_called(recipe: Recipe, tmp_path: Path) -> None:
    """Weights and standards are of columns; a saved mapping has its keys in the order of the alphabet."""
    made = make_features(recipe, 1)
    (ratio,), (classifier,) = made.ratios.values(), made.classifiers.values()
    other = replace(classifier, weights=-2 * classifier.weights)
    flipped = Dsir(-3 * ratio.tables)
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    samples = Samples(pool, np.arange(10))
    both = ExtraFeatures(None, {"zebra": ratio, "apple": flipped}, {"zebra": classifier, "apple": other}).standardised(samples)
    both.save(tmp_path)
    found = ExtraFeatures.load(tmp_path)
    assert found.names == both.names == ("relevance.zebra", "relevance.apple", "quality.zebra", "quality.apple")
    assert np.array_equal(found.compute(samples), both.compute(samples))


def test_too_little_to_make_them_of_is_told(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mates.engine.baselines.quality.ITERATIONS", 1)
    with pytest.raises(ArtifactError, match=r"fit.features, stage 1: no optimum of the classifier after 1 iterations"):
        make_features(recipe, 1)


def test_models_from_before_classifiers_are_read(recipe: Recipe, tmp_path: Path) -> None:
    found = make_features(replace(recipe, fit=FitConfig(features=["difficulty", "relevance"])), 1)
    found.save(tmp_path)
    saved = read_json(tmp_path / FEATURES_FILE)
    write_json(tmp_path / FEATURES_FILE, {"features": saved["features"]})
    assert ExtraFeatures.load(tmp_path).names == ("difficulty", f"relevance.{REFERENCE}")


def test_none_leave_nothing_behind(recipe: Recipe, tmp_path: Path) -> None:
    assert make_features(replace(recipe, fit=FitConfig()), 1) is NO_FEATURES
    NO_FEATURES.save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert ExtraFeatures.load(tmp_path) is NO_FEATURES
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    assert NO_FEATURES.compute(Samples(pool, np.arange(7))).shape == (7, 0)


def test_a_pool_that_is_probed_whole_is_refused(recipe: Recipe) -> None:
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    greedy = replace(recipe, probe=ProbeConfig(samples=pool.samples - 3))
    with pytest.raises(ArtifactError, match=rf"3 samples in the pool beside the {pool.samples - 3} that are probed, at least 50"):
        unprobed_samples(greedy, pool, 1)


def test_an_encoder_sees_them(recipe: Recipe) -> None:
    """Its head has a column for each, through fit, save and load, and its predictions are those by hand."""
    fit_stage(recipe, WORLD, "mates", 1)
    directory = layout_of(recipe).influence_model("mates", 1)
    assert (directory / FEATURES_FILE).is_file()
    tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
    model = open_model(directory, recipe, tokenizer, WORLD.device)
    assert isinstance(model, EncoderModel)
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    samples = Samples(pool, np.arange(6))
    module = load_encoder(directory).eval()
    assert module.head.in_features == 32 + 3
    with torch.no_grad():
        pooled = module.encoder(input_ids=torch.from_numpy(pool.windows(samples.ids)[:, :-1])).last_hidden_state.mean(1)
        expected = module.head(torch.cat([pooled, torch.from_numpy(model.extra.compute(samples))], dim=1)).numpy()
    assert predict(model, samples) == pytest.approx(expected, abs=1e-5)
    assert model.forward_flops(1, 32) > replace(model, extra=NO_FEATURES).forward_flops(1, 32)


def test_other_references_make_another_model(recipe: Recipe) -> None:
    assert set(feature_inputs(recipe)) == {f"reference.{REFERENCE}", "pool"}
