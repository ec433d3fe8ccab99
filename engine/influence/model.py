"""What an influence model is to the steps that fit it and score with it, and how one is opened again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import Recipe
from mates.engine.data.corpus import Corpus
from mates.engine.distributed import World
from mates.preprocess import artifact
from mates.preprocess.tokenizer import Tokenizer

Windows = npt.NDArray[np.integer[Any]]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Scores = npt.NDArray[np.float32]

TOGETHER = 4096  # samples that a rank predicts before it looks for others


@dataclass(frozen=True)
class Samples:
    """Samples of a corpus by their ids [n] int64."""

    corpus: Corpus
    ids: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | npt.NDArray[np.integer[Any]]) -> Samples:
        return Samples(self.corpus, self.ids[rows])

    @property
    def windows(self) -> Windows:
        """Their tokens [n, L], in the dtype of the corpus' file."""
        return self.corpus.stored(self.ids)[:, :-1]


class Scorer(Protocol):
    """Gives samples scores, of which the lowest are chosen first."""

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """Do what the processor can do beforehand, in any thread, and return what gives the scores [n, R] float32.

        There is a column for each reference task. A sample's scores do not depend on what other samples there are.
        """

    def forward_flops(self, samples: int, length: int) -> float:
        """FLOPs of scoring samples of ``length`` tokens."""


class InfluenceModel(Scorer, Protocol):
    """Predicts influences in standard deviations of the labels of each task."""

    def save(self, directory: Path) -> None:
        """Write what :func:`open_model` needs."""


def joining(weights: Sequence[float], covariance: npt.ArrayLike) -> Floats:
    """What predictions [n, R] in SD of each task's labels are multiplied by to become those of the weighted mean, in SD of that.

    The weighted mean of influences in nats is Σ a_r·y_r with a = weights / Σ weights, and its SD is √(aᵀ·C·a).

    Args:
        weights: of the tasks [R]. covariance: C [R, R] of their labels in nats.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    spread = np.asarray(covariance, np.float64)
    found: Floats = shares * np.sqrt(np.diag(spread)) / np.sqrt(shares @ spread @ shares)
    return found


def predict(model: Scorer, samples: Samples) -> Scores:
    """A model's scores [n, R] of samples."""
    return model.prepare(samples)()


def predict_together(model: Scorer, samples: Samples, world: World) -> Scores:
    """A model's scores [n, R] of samples, on all ranks, each of which predicts a part of them."""
    starts = range(0, len(samples), TOGETHER)
    own = world.gathered(lambda: {start: predict(model, samples[start : start + TOGETHER]) for start in starts[world.rank :: world.size]})
    found = {start: scores for part in own for start, scores in part.items()}
    return np.concatenate([found[start] for start in starts])


def open_model(directory: Path, recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> InfluenceModel:
    """The influence model of an artifact, to score with.

    Raises:
        ArtifactError: no influence model, or a damaged one.
    """
    from mates.engine.influence.cascade import CascadeModel
    from mates.engine.influence.encoder import open_encoder
    from mates.engine.influence.ngrams import NgramModel

    kind = artifact.load(directory, "influence model").info["model"]
    if kind == "ngram":
        return NgramModel.load(directory)
    encoder = open_encoder(directory, recipe, tokenizer, device)
    return CascadeModel.load(directory, encoder) if kind == "cascade" else encoder
