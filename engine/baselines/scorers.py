"""Baselines as scorers of a stage's candidates: what each is made from, and how it is opened."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from mates.engine.baselines.dsir import Dsir
from mates.engine.baselines.quality import QualityClassifier, packed
from mates.engine.baselines.ratings import Ratings, read_ratings
from mates.engine.baselines.semdedup import cluster, similarities
from mates.engine.chunks import run_chunks
from mates.engine.config import Recipe, RecipeError, require
from mates.engine.data.blocks import make_blocks
from mates.engine.data.corpus import Corpus, open_corpus
from mates.engine.data.index import load_array
from mates.engine.data.steps import read_options
from mates.engine.distributed import World
from mates.engine.flops import decoder_forward
from mates.engine.influence.bags import ngram_flops
from mates.engine.influence.features import feature_inputs, item_tokens, pieces, weighted_references
from mates.engine.influence.model import Floats, Ids, Samples, Scorer, Scores
from mates.engine.layout import layout_of
from mates.engine.pretrain import checkpoint
from mates.engine.pretrain.model import (
    build_uninitialised,
    document_positions,
    model_config,
    padded_vocabulary,
    reset_at_documents,
    token_losses,
)
from mates.engine.pretrain.shapes import resolve_shape
from mates.engine.random import KeyedPermutation
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError, Json
from mates.preprocess.inputs import InputError, InputFile, find_inputs, open_raw
from mates.preprocess.readers import read_texts
from mates.preprocess.tokenizer import TokenizerError, open_tokenizer

RAW_SAMPLES = 50_000  # samples of the pool that stand for the raw text, at most
JOINED = "embeddings.npy"
OF_CHECKPOINT = ("perplexity", "semdedup")
KEPT_APART = 0.9  # of different ratings that float32 tells apart, at least: some of many are always as near as its steps


def baseline_request(recipe: Recipe, method: str, stage: int) -> tuple[dict[str, Json], dict[str, str]]:
    """Settings and inputs that a baseline's scores depend on. Where files of the user's are gone those of finished scores are believed, so
    that a finished run can be looked at anywhere."""
    layout, config = layout_of(recipe), recipe.baselines
    done = artifact.finished(layout.scores(method, stage), "scores")
    settings: dict[str, Json] = {"scorer": method}
    if method in OF_CHECKPOINT:
        if method == "semdedup":
            settings["clusters"] = config.semdedup_clusters
        return settings, {"checkpoint": artifact.load(layout.checkpoint(method, stage - 1), "checkpoint").fingerprint}
    if method == "ratings":
        assert config.ratings is not None
        known = done.inputs.get("ratings") if done else None
        return settings, {"ratings": known if known and not Path(config.ratings).exists() else _digest(Path(config.ratings))}
    if method == "quality":
        settings["quality_samples"] = config.quality_samples
        if config.quality_sources:
            try:
                settings["quality_sources"] = [[file.name, _digest_of_input(file)] for file in find_inputs(config.quality_sources)]
            except InputError:
                if done is None or "quality_sources" not in done.settings:
                    raise
                settings["quality_sources"] = done.settings["quality_sources"]
            return settings, {"pool": artifact.load(layout.corpus("pool"), "corpus").fingerprint}
    return settings, feature_inputs(recipe)


def _digest_of_input(file: InputFile) -> str:
    """BLAKE3 (hex) of a file that may be an URL."""
    digest = blake3()
    with open_raw(file) as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _digest(path: Path) -> str:
    try:
        return artifact.digest_of(path)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


def open_baseline(recipe: Recipe, method: str, stage: int, world: World, directory: Path) -> Scorer:
    """The scorer of a method that needs no influence model; ``directory`` is where semdedup keeps the embeddings that it compares.

    ArtifactError where one cannot be made of what there is.
    """
    try:
        return _open(recipe, method, stage, world, directory)
    except (ArtifactError, InputError, RecipeError, TokenizerError):
        raise
    except ValueError as error:
        raise ArtifactError(f"{method}, stage {stage}: {error}") from error


def _open(recipe: Recipe, method: str, stage: int, world: World, directory: Path) -> Scorer:
    corpus = open_corpus(layout_of(recipe).corpus("train"), recipe.pretrain.sequence_length)
    if method == "dsir":
        pool = open_corpus(layout_of(recipe).corpus("pool"), recipe.pretrain.sequence_length)
        items = (tokens for reference in weighted_references(recipe) for tokens in item_tokens(reference))
        return _Plain(Dsir.fit(items, pieces(pool, _raw_samples(recipe, pool, RAW_SAMPLES))).scores)
    if method == "quality":
        return _Plain(_quality(recipe).scores)
    if method == "ratings":
        assert recipe.baselines.ratings is not None
        path = Path(recipe.baselines.ratings)
        return _Known(path, read_ratings(path, corpus.samples))
    model = _Checkpoint(recipe, layout_of(recipe).checkpoint(method, stage - 1), corpus, world)
    return model if method == "perplexity" else _semdedup(recipe, stage, model, corpus, world, directory)


@dataclass(frozen=True)
class _Plain:
    """Scores from tokens by a formula over n-grams."""

    scores: Callable[[npt.NDArray[np.integer[Any]]], Floats]

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`."""
        return lambda: self.scores(samples.windows)[:, None].astype(np.float32)

    def forward_flops(self, samples: int, length: int) -> float:
        """See :class:`Scorer`."""
        return ngram_flops(samples, length)


@dataclass(frozen=True)
class _Known:
    """Scores out of a file."""

    path: Path
    ratings: Ratings

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`."""
        return lambda: self._narrowed(self.ratings.scores(samples.ids))[:, None]

    def _narrowed(self, ratings: Floats) -> npt.NDArray[np.float32]:
        """As float32, which scores are kept in."""
        with np.errstate(over="ignore"):
            narrow = ratings.astype(np.float32)
        if not np.isfinite(narrow).all() or len(np.unique(narrow)) < KEPT_APART * len(np.unique(ratings)):
            raise ArtifactError(
                f"{self.path}: scores from {ratings.min():.9g} to {ratings.max():.9g}, which float32 cannot hold or tell apart; "
                "subtract their mean and divide by their standard deviation"
            )
        return narrow

    def forward_flops(self, samples: int, length: int) -> float:
        """See :class:`Scorer`."""
        return 0.0


class _Checkpoint:
    """The language model before a stage: scores are the losses of samples in nats a token."""

    def __init__(self, recipe: Recipe, directory: Path, corpus: Corpus, world: World) -> None:
        vocabulary, self._device = corpus.info("tokenizer"), world.device
        self._shape = resolve_shape(recipe.model)
        self._rows = padded_vocabulary(vocabulary["vocab_size"], recipe.model.vocab_multiple)
        world.same(lambda: artifact.verify(directory, below=f"{checkpoint.STATE}/"))
        self._model = build_uninitialised(model_config(self._shape, self._rows, vocabulary["end_of_document"])).to(world.device).eval()
        state, _ = checkpoint.read_state(directory, dtype=torch.float32, device=world.device)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(state.weights[name])
        self._resets_after = vocabulary["end_of_document"] if recipe.pretrain.reset_at_documents else None
        if self._resets_after is not None:
            reset_at_documents(self._model, self._resets_after)
        self._batch = recipe.evaluate.batch_size
        is_bf16 = recipe.pretrain.precision == "bf16" and world.device.type == "cuda"  # CPUs take long over it
        self._autocast = torch.autocast(world.device.type, dtype=torch.bfloat16, enabled=is_bf16)

    @property
    def width(self) -> int:
        """Of an embedding."""
        return self._shape.hidden_size

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`."""
        return lambda: self._losses(samples)

    def _losses(self, samples: Samples) -> Scores:
        scores = np.empty((len(samples), 1), np.float32)
        for start, windows in self._batches(samples):
            scores[start : start + len(windows), 0] = token_losses(self._model, windows).mean(1).cpu().numpy()
        return scores

    def embeddings(self, samples: Samples) -> Scores:
        """Mean over a sample's tokens of the last hidden state: [n, D] float32."""
        found = np.empty((len(samples), self.width), np.float32)
        for start, windows in self._batches(samples):
            inputs = windows[:, :-1]
            # the hook of reset_at_documents is the whole model's
            positions = {} if self._resets_after is None else {"position_ids": document_positions(inputs, self._resets_after)}
            hidden = self._model.base_model(input_ids=inputs, **positions).last_hidden_state  # type: ignore[operator]
            found[start : start + len(windows)] = hidden.float().mean(1).cpu().numpy()
        return found

    def _batches(self, samples: Samples) -> Iterator[tuple[int, torch.Tensor]]:
        with torch.no_grad(), self._autocast:
            for start in range(0, len(samples), self._batch):
                windows = samples.corpus.windows(samples.ids[start : start + self._batch])
                yield start, torch.from_numpy(windows).to(self._device)

    def forward_flops(self, samples: int, length: int, logit_tokens: float | None = None) -> float:
        """See :class:`Scorer`."""
        return decoder_forward(self._shape, self._rows, tokens=samples * length, length=length, logit_tokens=logit_tokens)


@dataclass(frozen=True)
class _Similarities:
    """SemDeDup's scores of a stage's candidates, by sorted ids."""

    ids: Ids
    values: npt.NDArray[np.float32]
    model: _Checkpoint

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`."""
        return lambda: self.values[np.searchsorted(self.ids, samples.ids), None]

    def forward_flops(self, samples: int, length: int) -> float:
        """See :class:`Scorer`. Of the embeddings; k-means and comparisons are left out."""
        return self.model.forward_flops(samples, length, logit_tokens=0)


def cluster_count(recipe: Recipe, candidates: int) -> int:
    """Clusters that semdedup makes of a stage's candidates. RecipeError where there are fewer candidates."""
    clusters = recipe.baselines.semdedup_clusters or max(1, round(candidates**0.5))
    require(clusters <= candidates, "baselines.semdedup_clusters", clusters, f"at most the {candidates} candidates of a stage")
    return clusters


def _semdedup(recipe: Recipe, stage: int, model: _Checkpoint, corpus: Corpus, world: World, directory: Path) -> _Similarities:
    """Embed the candidates in chunks, cluster them, and compare those of a cluster; ranks share chunks and clusters."""
    blocks, size = make_blocks(recipe, corpus.samples), recipe.score.chunk_size
    count = blocks.size(stage)
    clusters = cluster_count(recipe, count)
    settings, inputs = baseline_request(recipe, "semdedup", stage)

    def make(number: int, path: Path) -> None:
        ids = blocks.candidates(stage, number * size, (number + 1) * size)
        artifact.write_array(path, model.embeddings(Samples(corpus, ids)))

    def name(number: int) -> str:
        return f"{number:06d}.npy"

    chunks = -(-count // size)
    plan = {"settings": settings | {"chunk_size": size, "stage": stage, "candidates": count, "seed": recipe.seed}, "inputs": inputs}
    label = f"score semdedup stage {stage}: embeddings"
    run_chunks(directory, plan=plan, chunks=chunks, file_name=name, make=make, world=world, label=label, started=time.perf_counter())
    world.same_after_long(lambda: _join([directory / name(number) for number in range(chunks)], directory / JOINED))
    embeddings = load_array(directory / JOINED, np.dtype(np.float32), 2)
    found = world.same_after_long(lambda: cluster(embeddings, clusters, seed=recipe.seed))
    own = world.gathered(lambda: similarities(embeddings, found, range(world.rank, clusters, world.size)))
    ids = blocks.candidates(stage)
    order = np.argsort(ids)
    return _Similarities(ids[order], np.fmax.reduce(own)[order].astype(np.float32), model)


def _join(files: Sequence[Path], path: Path) -> None:
    """Write the rows of some arrays one after the other into one file, which all ranks then map: it need not fit into any one's memory."""
    if path.exists():  # of an attempt before
        return
    parts = [load_array(file, np.dtype(np.float32), 2) for file in files]
    shape = (sum(map(len, parts)), parts[0].shape[1])
    with artifact.atomic_file(path) as handle:
        np.lib.format.write_array_header_1_0(handle, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for part in parts:
            handle.write(part.data)


def _raw_samples(recipe: Recipe, pool: Corpus, most: int) -> Ids:
    return np.sort(KeyedPermutation(pool.samples, recipe.seed, "raw-text", 0)(np.arange(min(pool.samples, most))))


def _quality(recipe: Recipe) -> QualityClassifier:
    """A classifier of good text against samples of the pool, as many of each."""
    layout, config, length = layout_of(recipe), recipe.baselines, recipe.pretrain.sequence_length
    pool = open_corpus(layout.corpus("pool"), length)
    good = packed(_good_tokens(recipe), length, config.quality_samples)
    if len(good) < 2:
        source = ", ".join(config.quality_sources) or "the reference tasks' items"
        raise ArtifactError(
            f"{source}: {len(good)} samples of {length} tokens of good text, at least 2 are needed; see baselines.quality_sources"
        )
    negatives = np.concatenate(list(pieces(pool, _raw_samples(recipe, pool, config.quality_samples))))
    return QualityClassifier.fit(good, negatives, pool.info("tokenizer")["end_of_document"])


def _good_tokens(recipe: Recipe) -> Iterator[npt.NDArray[np.integer[Any]]]:
    if not recipe.baselines.quality_sources:
        for reference in weighted_references(recipe):
            yield from item_tokens(reference)
        return
    tokenizer, _ = open_tokenizer(layout_of(recipe).tokenizer)
    for file in find_inputs(recipe.baselines.quality_sources):
        for text in read_texts(file, read_options(recipe)):
            yield tokenizer.encode_batch([text])[0]
