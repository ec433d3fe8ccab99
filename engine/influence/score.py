"""The score step: every candidate of a stage through the influence model, by any number of ranks, resumable by chunks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.baselines.scorers import baseline_request, open_baseline
from mates.engine.chunks import discard_plan, run_chunks
from mates.engine.config import INFLUENCE_METHODS, Recipe
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import open_corpus
from mates.engine.data.index import load_array
from mates.engine.distributed import World
from mates.engine.influence.cascade import CascadeModel, undropped
from mates.engine.influence.model import Samples, Scorer, open_model
from mates.engine.layout import layout_of
from mates.engine.select.methods import model_stage
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Cost, Manifest, Request
from mates.preprocess.tokenizer import open_tokenizer

EMBEDDINGS = "embeddings"  # folder beside the scores of what semdedup compares, until they are complete


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
    inputs = {"corpus": corpus.fingerprint}
    if method in INFLUENCE_METHODS:
        model = layout.influence_model(method, model_stage(recipe, method, stage))
        inputs["influence_model"] = artifact.load(model, "influence model").fingerprint
    else:
        more, made_from = baseline_request(recipe, method, stage)
        settings, inputs = settings | more, inputs | made_from
    return Request(directory=layout.scores(method, stage), kind="scores", settings=settings, inputs=inputs)


def score_stage(recipe: Recipe, world: World, method: str, stage: int) -> Manifest:
    """Score the candidates of ``stage``; shards of float32 [n, R] in the order of the block."""
    request: Request = world.same(lambda: score_request(recipe, method, stage))
    done: Manifest | None = world.same(request.find)
    target = request.directory
    if done:
        world.same(lambda: shutil.rmtree(target.parent / EMBEDDINGS, ignore_errors=True))  # of an attempt that was killed at its end
        return done
    started = time.perf_counter()
    corpus = open_corpus(layout_of(recipe).corpus("train"), recipe.pretrain.sequence_length)
    blocks = make_blocks(recipe, corpus.samples)
    scorer, about = _open_scorer(recipe, world, method, stage)
    count, size = blocks.size(stage), recipe.score.chunk_size

    def begin(number: int) -> Callable[[Path], None]:
        scores = scorer.prepare(Samples(corpus, blocks.candidates(stage, number * size, (number + 1) * size)))
        return lambda path: artifact.write_array(path, scores())

    chunks = -(-count // size)
    seconds = run_chunks(
        target,
        plan={"settings": request.settings, "inputs": request.inputs},
        chunks=chunks,
        file_name=shard_name,
        begin=begin,
        world=world,
        label=f"score {method} stage {stage}",
        started=started,
    )

    def commit() -> Manifest:
        columns = len(about["references"])
        sums, squares, read = np.zeros(columns), np.zeros(columns), count
        for number in range(chunks):
            shard = read_shard(target, number, (min(size, count - number * size), columns)).astype(np.float64)
            shown, dropped = undropped(shard, about["model"])
            sums, squares, read = sums + shown.sum(0), squares + (shown**2).sum(0), read - int(dropped.sum())
        flops = scorer.forward_flops(count, corpus.length)
        if isinstance(scorer, CascadeModel):
            flops = scorer.flops(count, corpus.length, read=read)
        cost = Cost(flops=flops, seconds=seconds, tokens=count * corpus.length)
        means = sums / count
        info = about | {
            "samples": count,
            "dropped": count - read,
            "mean_sd": means.tolist(),
            "sd_sd": np.sqrt(np.maximum(squares / count - means**2, 0)).tolist(),
        }
        manifest = request.commit(info=info, cost=cost, files=[shard_name(number) for number in range(chunks)])
        discard_plan(target)
        shutil.rmtree(target.parent / EMBEDDINGS, ignore_errors=True)
        return manifest

    result: Manifest = world.same(commit)
    return result


def _open_scorer(recipe: Recipe, world: World, method: str, stage: int) -> tuple[Scorer, dict[str, Any]]:
    """What scores a method's candidates, and what the manifest says of the columns."""
    layout = layout_of(recipe)
    if method not in INFLUENCE_METHODS:
        return open_baseline(recipe, method, stage, world, layout.stage(method, stage) / EMBEDDINGS), {
            "references": [method],
            "model": method,
        }
    directory = layout.influence_model(method, model_stage(recipe, method, stage))
    info = artifact.load(directory, "influence model").info
    tokenizer, _ = open_tokenizer(layout.tokenizer)
    about = {name: info[name] for name in ("references", "model", "label_covariance_nats2")}
    return open_model(directory, recipe, tokenizer, world.device), about


def shard_name(number: int) -> str:
    """File name of a score shard."""
    return f"scores-{number:06d}.npy"


@dataclass(frozen=True)
class Scores:
    """Scores of a stage's candidates, in the order of its block; files are opened as they are read."""

    directory: Path
    manifest: Manifest

    @property
    def samples(self) -> int:
        """Candidates."""
        return int(self.manifest.info["samples"])

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Scores of candidates start … stop in label SD: [m, R] float32.

        Raises:
            ArtifactError: a file is damaged, of another shape, or holds what is not finite.
        """
        stop, size = self.samples if stop is None else stop, int(self.manifest.settings["chunk_size"])
        columns = len(self.manifest.info["mean_sd"])
        parts = []
        for number in range(start // size, -(-stop // size)):
            first, expected = number * size, min(size, self.samples - number * size)
            shard = read_shard(self.directory, number, (expected, columns))
            parts.append(shard[max(start - first, 0) : stop - first])
        return np.concatenate(parts) if len(parts) != 1 else parts[0]

    def predicted(self, scores: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Of scores [m, R] that were read, those that were predicted [m, R], and which samples a cascade dropped [m]."""
        return undropped(scores, self.manifest.info["model"])


def read_shard(directory: Path, number: int, shape: tuple[int, int]) -> npt.NDArray[np.float32]:
    """One file of scores [n, R]. ArtifactError where it is damaged, of another shape, or holds what is not finite."""
    path = directory / shard_name(number)
    scores = load_array(path, np.dtype(np.float32), 2)
    if scores.shape != shape:
        raise ArtifactError(f"{path}: scores of shape {scores.shape}, expected {shape}; remove {directory} and score again")
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(1))[0])
        raise ArtifactError(f"{path}: the score in row {row} is {scores[row].tolist()}, expected finite ones; what made it is broken")
    return scores


def open_scores(directory: Path, corpus_fingerprint: str) -> Scores:
    """The scores of a stage.

    Raises:
        ArtifactError: incomplete, of other sizes than the manifest says, or made for another corpus.
    """
    manifest = artifact.load(directory, "scores")
    if manifest.inputs["corpus"] != corpus_fingerprint:
        raise ArtifactError(
            f"{directory}: scores of corpus {manifest.inputs['corpus'][:12]}, but the train corpus is {corpus_fingerprint[:12]}; "
            "restore that corpus, or remove the folder and run `mates score` again"
        )
    return Scores(directory, manifest)
