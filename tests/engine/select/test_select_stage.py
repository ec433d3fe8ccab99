"""The select step: what brute force would choose, in the order of the block, and the samples themselves for other trainers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_run import build_shared, make_recipe

from mates.engine.config import Recipe
from mates.engine.data.blocks import make_blocks
from mates.engine.data.index import read_index
from mates.engine.influence.score import open_scores
from mates.engine.layout import layout_of
from mates.engine.pretrain.stage import open_train_corpus
from mates.engine.random import gumbel
from mates.engine.select import choose
from mates.engine.select.stage import SELECTED_NAME, select_stage
from mates.preprocess import artifact
from mates.preprocess.indexed import open_indexed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run up to the scores of stage 1 of two methods that choose."""
    made = make_recipe(tmp_path_factory.mktemp("select"), methods=["random", "mates", "mates-topk"])
    build_shared(made, ["mates", "mates-topk"], ["probe", "fit", "score"])
    return made


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("method", ["random", "mates", "mates-topk"])
def test_brute_force_chooses_the_same(recipe: Recipe, method: str, in_pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if in_pieces:
        for name, value in (("SORTED", 0), ("PIECE", 17)):
            monkeypatch.setattr(choose, name, value)
        monkeypatch.setattr("mates.engine.select.stage.PIECE", 17)
    layout, corpus = layout_of(recipe), open_train_corpus(recipe)
    artifact.unmake(layout.index(method, 1))
    manifest = select_stage(recipe, method, 1)
    candidates = make_blocks(recipe, corpus.samples).candidates(1)
    found = read_index(layout.index(method, 1), corpus.fingerprint).ids.tolist()
    k = recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size
    if method == "random":
        assert found == candidates[:k].tolist()
        return
    scores = open_scores(layout.scores(method, 1), corpus.fingerprint).read()[:, 0].astype(np.float64)
    keys = -scores if method == "mates-topk" else -scores / recipe.select.temperature + gumbel(candidates, recipe.seed, "select", 1)
    chosen = np.sort(np.argsort(-keys)[:k])
    assert found == candidates[chosen].tolist()
    assert manifest.info["mean_score_selected"] == pytest.approx(scores[chosen].mean())
    assert manifest.info["mean_score_candidates"] == pytest.approx(scores.mean())


def test_selected_samples_are_written_for_other_trainers(recipe: Recipe) -> None:
    layout, corpus = layout_of(recipe), open_train_corpus(recipe)
    plain = select_stage(recipe, "mates", 1)
    artifact.unmake(layout.index("mates", 1))
    manifest = select_stage(replace(recipe, select=replace(recipe.select, materialize=True)), "mates", 1)
    assert manifest.fingerprint == plain.fingerprint  # training does not depend on it
    ids = read_index(layout.index("mates", 1), corpus.fingerprint).ids
    written = open_indexed(layout.index("mates", 1) / SELECTED_NAME)
    assert written.documents == len(ids)
    assert written.tokens.dtype == corpus.dtype
    for number in (0, 1, len(ids) - 1):
        assert written.document(number).tolist() == corpus.windows(np.asarray(ids[number : number + 1]))[0].tolist()
    assert len(written.tokens) == len(ids) * (recipe.pretrain.sequence_length + 1)
    artifact.verify(layout.index("mates", 1))
