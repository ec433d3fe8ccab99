"""The score step: every candidate of a stage through the influence model, by any number of ranks, resumable by chunks."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.chunks import discard_plan, run_chunks
from mates.engine.config import Recipe
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import open_corpus
from mates.engine.data.index import load_array
from mates.engine.distributed import World
from mates.engine.influence.model import open_model
from mates.engine.layout import layout_of
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request
from mates.preprocess.tokenizer import open_tokenizer


def score_request(recipe: Recipe, method: str, stage: int) -> Request:
    """The scores of the candidates of ``stage``."""
    layout = layout_of(recipe)
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    settings = asdict(recipe.score) | {
        "stage": stage,
        "seed": recipe.seed,
        "candidates": [blocks.bounds[stage], blocks.bounds[stage + 1]],
        "sequence_length": recipe.pretrain.sequence_length,
    }
    inputs = {
        "corpus": corpus.fingerprint,
        "influence_model": artifact.load(layout.influence_model(method, stage), "influence model").fingerprint,
    }
    return Request(directory=layout.scores(method, stage), kind="scores", settings=settings, inputs=inputs)


def score_stage(recipe: Recipe, world: World, method: str, stage: int) -> Manifest:
    """Score the candidates of ``stage``; shards of float32 [n, R] in the order of the block."""
    request: Request = world.same(lambda: score_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    if done:
        return done
    started = time.perf_counter()
    layout, target = layout_of(recipe), request.directory
    model_dir = layout.influence_model(method, stage)
    model_manifest = artifact.load(model_dir, "influence model")
    corpus = open_corpus(layout.corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    tokenizer, _ = open_tokenizer(layout.tokenizer)
    model = open_model(model_dir, recipe, tokenizer, world.device)
    count, size = blocks.size(stage), recipe.score.chunk_size

    def make(number: int, path: Path) -> None:
        ids = blocks.candidates(stage, number * size, (number + 1) * size)
        scores = model.predict(corpus.stored(ids)[:, :-1])
        with artifact.atomic_file(path) as handle:
            np.save(handle, scores[:, None], allow_pickle=False)

    chunks = -(-count // size)
    seconds = run_chunks(
        target,
        plan={"settings": request.settings, "inputs": request.inputs},
        chunks=chunks,
        file_name=shard_name,
        make=make,
        world=world,
        label=f"score {method} stage {stage}",
        started=started,
    )
    length = recipe.pretrain.sequence_length
    cost = Cost(flops=model.forward_flops(count, length), seconds=seconds, tokens=count * length)

    def commit() -> Manifest:
        scores = _read_shards(target, chunks)
        info: dict[str, Any] = {
            "samples": len(scores),
            "references": model_manifest.info["references"],
            "mean_sd": scores.mean(0, dtype=np.float64).tolist(),
            "sd_sd": scores.std(0, dtype=np.float64).tolist(),
        }
        if len(scores) != count:
            raise ArtifactError(f"{target}: the shards hold {len(scores)} scores for {count} candidates; remove the folder and score again")
        names = [shard_name(number) for number in range(chunks)]
        manifest = request.commit(info=info, cost=cost, files=names)
        discard_plan(target)
        return manifest

    result: Manifest = world.same(commit)
    return result


def shard_name(number: int) -> str:
    """File name of a score shard."""
    return f"scores-{number:06d}.npy"


def _read_shards(directory: Path, chunks: int) -> npt.NDArray[np.float32]:
    shards = [load_array(directory / shard_name(number), np.dtype(np.float32), 2) for number in range(chunks)]
    scores = np.concatenate(shards)
    bad = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(bad):
        raise ArtifactError(
            f"{directory}: {len(bad)} scores are not finite, the first at candidate {bad[0]}; the influence model is broken"
        )
    return scores


def read_scores(directory: Path, corpus_fingerprint: str) -> tuple[npt.NDArray[np.float32], Manifest]:
    """All scores of a stage [n, R] float32, in the order of its block.

    Raises:
        ArtifactError: damaged, not finite, too few, or made for another corpus.
    """
    manifest = artifact.load(directory, "scores")
    if manifest.inputs["corpus"] != corpus_fingerprint:
        raise ArtifactError(
            f"{directory}: scores of corpus {manifest.inputs['corpus'][:12]}, but the train corpus is {corpus_fingerprint[:12]}"
        )
    scores = _read_shards(directory, len(manifest.files))
    if len(scores) != manifest.info["samples"]:
        raise ArtifactError(f"{directory}: {len(scores)} scores in the shards, {manifest.info['samples']} in the manifest")
    return scores, manifest
