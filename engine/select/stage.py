"""The select step: a stage's selection index."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mates.engine.config import Recipe
from mates.engine.data.blocks import Blocks, make_blocks
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.index import INDEX_FILE, load_array, write_ids
from mates.engine.influence.score import Scores, open_scores
from mates.engine.layout import SHARED, layout_of
from mates.engine.progress import say
from mates.engine.select.choose import PIECE, Cut, Floats, Ids, find_cut, gumbel_keys
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, Manifest, Request
from mates.preprocess.indexed import IndexedWriter

SELECTED_NAME = "selected"
COPIED = 4096  # samples that are copied at a time


def needs_scores(method: str, stage: int) -> bool:
    """Whether a method's stage is chosen by an influence model (and so needs probe, fit and score)."""
    return stage > 0 and method not in (SHARED, "random")


def select_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The selection index of ``stage``."""
    layout = layout_of(recipe)
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    rule = rule_of(method, stage)
    settings: dict[str, Any] = {
        "method": rule,
        "stage": stage,
        "seed": recipe.seed,
        "samples": recipe.pretrain.steps_per_stage * recipe.pretrain.batch_size,
        "candidates": [blocks.bounds[stage], blocks.bounds[stage + 1]],
        "sequence_length": recipe.pretrain.sequence_length,
    }
    inputs = {"corpus": corpus.fingerprint}
    if rule == "mates":
        settings["temperature"] = recipe.select.temperature
    if recipe.select.materialize:
        settings["materialize"] = True
    if needs_scores(method, stage):
        inputs["scores"] = artifact.load(layout.scores(method, stage), "scores").fingerprint
    return Request(directory=layout.index(method, stage), kind="selection index", settings=settings, inputs=inputs)


def rule_of(method: str, stage: int) -> str:
    """The rule that chooses a method's stage: random, mates or mates-topk."""
    return method if needs_scores(method, stage) else "random"


def select_stage(recipe: Recipe, method: str, stage: int) -> Manifest:
    """Write the selection index of a stage.

    ``random`` takes a uniform sample of the block (a prefix of it, the block being in keyed random order); ``mates`` is
    Gumbel-top-k and ``mates-topk`` plain top-k on the scores. The chosen ids stay in the order of the block, which is a keyed random one.
    """
    request = select_request(recipe, method, stage)
    done = request.find()
    if done:
        return done
    start = time.perf_counter()
    layout = layout_of(recipe)
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    k, rule, n = request.settings["samples"], rule_of(method, stage), blocks.size(stage)
    info: dict[str, Any] = {"ratio": k / n}
    request.directory.mkdir(parents=True, exist_ok=True)
    if rule == "random":
        pieces = (blocks.candidates(stage, first, min(first + PIECE, k)) for first in range(0, k, PIECE))
        write_ids(request.directory, pieces, k)
    else:
        scored = _Scored(recipe, blocks, open_scores(layout.scores(method, stage), corpus.fingerprint), rule, stage)
        cut = find_cut(scored.keys, n, k)
        write_ids(request.directory, scored.take(cut, n), k)
        selected, candidates = scored.selected / k, scored.candidates / n
        info |= {"mean_score_selected": selected, "mean_score_candidates": candidates}
        say(
            f"select {method} stage {stage}: mean score {selected:+.3f} SD of {k:,} selected, "
            f"{candidates:+.3f} of {n:,} candidates (lower is better)"
        )
    files = [INDEX_FILE]
    if recipe.select.materialize:
        _materialize(request.directory, corpus)
        files += [f"{SELECTED_NAME}.bin", f"{SELECTED_NAME}.idx"]
    return request.commit(info=info, cost=Cost(seconds=time.perf_counter() - start), files=files, identity=[INDEX_FILE])


def _materialize(directory: Path, corpus: Corpus) -> None:
    """Write the samples of an index, in its order."""
    ids = load_array(directory / INDEX_FILE, np.dtype(np.int64), 1)
    with IndexedWriter(directory / SELECTED_NAME, corpus.dtype) as writer:
        for start in range(0, len(ids), COPIED):
            windows = corpus.stored(np.asarray(ids[start : start + COPIED]))
            writer.write(windows.ravel(), np.full(len(windows), windows.shape[1], np.int32))


class _Scored:
    """The candidates of a stage with their scores."""

    def __init__(self, recipe: Recipe, blocks: Blocks, scores: Scores, rule: str, stage: int) -> None:
        self._recipe, self._blocks, self._scores, self._rule, self._stage = recipe, blocks, scores, rule, stage
        self.selected, self.candidates = 0.0, 0.0
        """Sums of scores."""

    def keys(self, start: int, stop: int) -> tuple[Floats, Ids]:
        """See :data:`Piece`."""
        return self._keys(self._means(start, stop), start, stop)

    def _means(self, start: int, stop: int) -> Floats:
        means: Floats = self._scores.read(start, stop).mean(1, dtype=np.float64)
        return means

    def _keys(self, means: Floats, start: int, stop: int) -> tuple[Floats, Ids]:
        ids = self._blocks.candidates(self._stage, start, stop)
        if self._rule == "mates-topk":
            return -means, ids
        temperature = self._recipe.select.temperature
        return gumbel_keys(means, ids, temperature=temperature, seed=self._recipe.seed, stage=self._stage), ids

    def take(self, cut: Cut, n: int) -> Iterator[Ids]:
        """The chosen ids in the order of the block, adding up scores."""
        for start in range(0, n, PIECE):
            stop = min(start + PIECE, n)
            means = self._means(start, stop)
            keys, ids = self._keys(means, start, stop)
            chosen = cut.chosen(keys, ids)
            self.selected += float(means[chosen].sum())
            self.candidates += float(means.sum())
            yield ids[chosen]
