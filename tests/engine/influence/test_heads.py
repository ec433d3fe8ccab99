"""Several reference tasks: a head for each, joined by weights when samples are selected, without another fit or another scoring."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from synthetic_run import REFERENCE, build_shared, make_recipe

from mates.engine.config import FitConfig, Recipe, ReferenceConfig, TaskConfig
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import open_corpus
from mates.engine.data.index import read_index
from mates.engine.distributed import World
from mates.engine.evaluate.contents import _fit
from mates.engine.influence.bags import ngram_features
from mates.engine.influence.encoder import load_encoder
from mates.engine.influence.features import feature_inputs, weighted_references
from mates.engine.influence.fit import PREDICTIONS_FILE, fit_request, fit_stage
from mates.engine.influence.model import joining
from mates.engine.influence.ngrams import best_ridge
from mates.engine.influence.score import open_scores, score_request, score_stage
from mates.engine.layout import layout_of
from mates.engine.loop import Step, step_request
from mates.engine.pretrain.stage import open_train_corpus
from mates.engine.probe.stage import LABELS_FILE, influence_column, probed_samples
from mates.engine.random import gumbel
from mates.engine.select.stage import select_stage
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost

WORLD = World(0, 1, torch.device("cpu"))
NAMES = [REFERENCE, "second", "third"]
WEIGHTS = (1.0, 2.0, 0.0)


def weighted(recipe: Recipe, weights: tuple[float, float, float]) -> Recipe:
    """The recipe with other weights of its tasks."""
    more = [replace(task, weight=weight) for task, weight in zip(recipe.reference.more, weights[1:], strict=True)]
    return replace(recipe, reference=replace(recipe.reference, weight=weights[0], more=more))


@pytest.fixture(scope="module", params=["ngram", "encoder"])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run up to the scores of stage 1, on two tasks that count and one that is measured only."""
    folder = tmp_path_factory.mktemp("heads")
    plain = make_recipe(folder, fit=FitConfig(model=request.param, hidden_size=32, epochs=2))
    source = plain.reference.source
    more = [TaskConfig(name=name, format="lambada", source=source, items=8) for name in NAMES[1:]]
    reference = ReferenceConfig(source=source, name=REFERENCE, items=8, test_items=16, more=more)
    made = weighted(replace(plain, reference=reference), WEIGHTS)
    build_shared(made)
    write_labels(made)
    fit_stage(made, WORLD, "mates", 1)
    score_stage(made, WORLD, "mates", 1)
    return made


def write_labels(recipe: Recipe) -> None:
    """Influences on each task that a few tokens explain, in part the same ones, of very different sizes."""
    pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
    ids, source = np.sort(probed_samples(recipe, pool.samples, 1)), np.random.default_rng(5)
    helps = source.normal(size=(3, 400))
    helps[1] += helps[0]
    windows = pool.windows(ids)[:, :-1]
    values = {influence_column(name): helps[row][windows].mean(1) * 10.0 ** -(2 * row) for row, name in enumerate(NAMES)}
    request = step_request(recipe, Step("probe", "mates", 1))
    request.directory.mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": ids, **values}), request.directory / LABELS_FILE)
    request.commit(info={"samples": len(ids), "references": NAMES, "method": "linear"}, cost=Cost())


def predictions(recipe: Recipe) -> tuple[Any, dict[str, Any], Any]:
    directory = layout_of(recipe).influence_model("mates", 1)
    table = pq.read_table(directory / PREDICTIONS_FILE)
    part = np.array(table["part"].to_pylist())
    rows = {name: np.flatnonzero(part == name) for name in ("train", "validation", "test")}
    return table, rows, artifact.verify(directory, "influence model").info


def test_each_task_has_a_model_of_its_own(recipe: Recipe) -> None:
    table, rows, info = predictions(recipe)
    assert info["references"] == NAMES[:2]
    for name in NAMES[:2]:
        nats, predicted = table[f"oracle_nats.{name}"].to_numpy(), table[f"predicted_sd.{name}"].to_numpy()
        test = rows["test"]
        expected = stats.spearmanr(predicted[test], nats[test]).statistic
        assert info["agreement_by_reference"][name]["spearman"] == pytest.approx(expected)
        if recipe.fit.model == "ngram":
            pool = open_corpus(layout_of(recipe).corpus("pool"), 32)
            features = ngram_features(pool.windows(table["sample_id"].to_numpy())[:, :-1])
            train = nats[rows["train"]]
            ridge = best_ridge(features, (nats - train.mean()) / train.std(), rows["train"], rows["validation"])
            assert predicted == pytest.approx(ridge.predict(features), abs=1e-5)
        else:
            assert load_encoder(layout_of(recipe).influence_model("mates", 1)).head.out_features == 2


def test_they_are_joined_as_the_weighted_mean_in_nats_would_be(recipe: Recipe) -> None:
    table, rows, info = predictions(recipe)
    columns = np.stack([table[f"oracle_nats.{name}"].to_numpy() for name in NAMES[:2]], axis=1)
    joined = columns @ np.array([1 / 3, 2 / 3])
    train = rows["train"]
    assert table["oracle_nats"].to_numpy() == pytest.approx(joined, rel=1e-12)
    assert (info["label_mean_nats"], info["label_sd_nats"]) == pytest.approx((joined[train].mean(), joined[train].std()), rel=1e-9)
    means, sds = columns[train].mean(0), columns[train].std(0)
    predicted = np.stack([table[f"predicted_sd.{name}"].to_numpy() for name in NAMES[:2]], axis=1)
    in_nats = (predicted * sds + means) @ np.array([1 / 3, 2 / 3])
    expected = (in_nats - info["label_mean_nats"]) / info["label_sd_nats"]
    assert table["predicted_sd"].to_numpy() == pytest.approx(expected, abs=1e-5)


def test_how_much_each_task_matters(recipe: Recipe) -> None:
    table, rows, info = predictions(recipe)
    test = rows["test"]
    oracle = {name: table[f"oracle_nats.{name}"].to_numpy()[test] for name in NAMES[:2]}
    joined = table["oracle_nats"].to_numpy()[test]
    left = {NAMES[0]: oracle["second"], "second": oracle[NAMES[0]]}
    for name, without in left.items():
        assert info["sensitivity"][name]["oracle_spearman"] == pytest.approx(stats.spearmanr(without, joined).statistic)


@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.0), (1.0, 0.01, 0.0), (0.001, 1.0, 0.0)])
def test_other_weights_need_another_selection_and_nothing_else(recipe: Recipe, weights: tuple[float, float, float]) -> None:
    changed = weighted(recipe, weights)
    assert fit_request(changed, "mates", 1).find() == fit_request(recipe, "mates", 1).find() is not None
    assert score_request(changed, "mates", 1).find() is not None
    layout, corpus = layout_of(changed), open_train_corpus(changed)
    artifact.unmake(layout.index("mates", 1))
    select_stage(changed, "mates", 1)
    if weights != WEIGHTS:
        with pytest.raises(ArtifactError, match="label_weights"):
            select_stage(recipe, "mates", 1)
    _, rows, _ = predictions(recipe)
    table = pq.read_table(layout.labels("mates", 1) / LABELS_FILE)
    nats = np.stack([table[influence_column(name)].to_numpy() for name in NAMES[:2]], axis=1)[rows["train"]]
    shares = np.array(weights[:2]) / sum(weights[:2])
    scores = open_scores(layout.scores("mates", 1), corpus.fingerprint).read().astype(np.float64)
    joined = scores @ (shares * nats.std(0)) / (nats @ shares).std()
    candidates = make_blocks(changed, corpus.samples).candidates(1)
    keys = -joined / changed.select.temperature + gumbel(candidates, changed.seed, "select", 1)
    expected = candidates[np.sort(np.argsort(-keys)[:100])]
    assert read_index(layout.index("mates", 1), corpus.fingerprint).ids.tolist() == expected.tolist()


def test_one_task_is_joined_as_it_is() -> None:
    assert joining([3.0], [[0.123]]).tolist() == [1.0]


def test_a_task_that_did_not_count_needs_another_fit(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="references"):
        fit_request(weighted(recipe, (1.0, 1.0, 1.0)), "mates", 1).find()


def test_the_report_is_as_the_weights_are_now(recipe: Recipe) -> None:
    changed = weighted(recipe, (1.0, 0.01, 0.0))
    shown, before = (_fit(one, "mates", 1) for one in (changed, recipe))
    table, rows, info = predictions(recipe)
    nats = np.average(np.stack([table[f"oracle_nats.{name}"].to_numpy() for name in NAMES[:2]], 1), axis=1, weights=[1.0, 0.01])
    train, test = nats[rows["train"]], nats[rows["test"]]
    assert shown.label_sd_nats == pytest.approx(train.std())
    assert shown.oracle_sd == pytest.approx((test - train.mean()) / train.std())
    assert shown.spearman == pytest.approx(stats.spearmanr(shown.predicted_sd, test).statistic)
    assert shown.findings == ["further figures of the fit are left out: they are for other weights of the tasks"]
    assert before.label_sd_nats == pytest.approx(info["label_sd_nats"])
    assert len(before.findings) > 2


def test_tasks_that_only_are_measured_choose_nothing(recipe: Recipe) -> None:
    assert [one.name for one in weighted_references(recipe)] == NAMES[:2]
    assert "reference.third" not in feature_inputs(recipe)


def test_nothing_of_an_interrupted_fit_is_left(recipe: Recipe) -> None:
    """Features of other settings beside a model that has none would be taken for its own."""
    directory = layout_of(recipe).influence_model("mates", 1)
    before = artifact.load(directory).files
    artifact.unmake(directory)
    (directory / "features.json").write_text('{"features": ["difficulty"]}')
    fit_stage(recipe, WORLD, "mates", 1)
    assert set(artifact.verify(directory).files) == set(before)
    assert not (directory / "features.json").exists()
