"""The select step: a stage's selection index."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from mates.engine.config import Recipe
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import open_corpus
from mates.engine.data.index import write_index
from mates.engine.influence.score import read_scores
from mates.engine.layout import SHARED, layout_of
from mates.engine.progress import say
from mates.engine.select.choose import Ids, gumbel_top_k, in_training_order, top_k
from mates.preprocess import artifact
from mates.preprocess.artifact import Cost, Manifest, Request


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
    if needs_scores(method, stage):
        inputs["scores"] = artifact.load(layout.scores(method, stage), "scores").fingerprint
    return Request(directory=layout.index(method, stage), kind="selection index", settings=settings, inputs=inputs)


def rule_of(method: str, stage: int) -> str:
    """The rule that chooses a method's stage: random, mates or mates-topk."""
    return method if needs_scores(method, stage) else "random"


def select_stage(recipe: Recipe, method: str, stage: int) -> Manifest:
    """Write the selection index of a stage.

    ``random`` takes a uniform sample of the block (a prefix of it, the block being in keyed random order); ``mates`` is
    Gumbel-top-k and ``mates-topk`` plain top-k on the scores. The chosen ids are put in a keyed random order.
    """
    request = select_request(recipe, method, stage)
    done = request.find()
    if done:
        return done
    start = time.perf_counter()
    layout = layout_of(recipe)
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    k, rule = request.settings["samples"], rule_of(method, stage)
    info: dict[str, Any] = {"ratio": k / blocks.size(stage)}
    if rule == "random":
        chosen: Ids = blocks.candidates(stage, 0, k)
    else:
        scores, _ = read_scores(layout.scores(method, stage), corpus.fingerprint)
        candidates = blocks.candidates(stage)
        score = scores.mean(1, dtype=np.float64)
        if rule == "mates":
            chosen = gumbel_top_k(score, candidates, k, temperature=recipe.select.temperature, seed=recipe.seed, stage=stage)
        else:
            chosen = top_k(-score, candidates, k)
        picked = np.isin(candidates, chosen)
        info |= {"mean_score_selected": float(score[picked].mean()), "mean_score_candidates": float(score.mean())}
        say(
            f"select {method} stage {stage}: mean score {score[picked].mean():+.3f} SD of {k:,} selected, "
            f"{score.mean():+.3f} of {len(score):,} candidates (lower is better)"
        )
    ordered = in_training_order(chosen, seed=recipe.seed, stage=stage)
    cost = Cost(seconds=time.perf_counter() - start, tokens=0)
    return write_index(request, ordered, info=info, cost=cost)
