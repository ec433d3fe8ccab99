"""What an influence model is to the steps that fit it and score with it, and how one is opened again."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mates.engine.config import Recipe
from mates.preprocess import artifact
from mates.preprocess.tokenizer import Tokenizer

Windows = npt.NDArray[np.integer[Any]]


class InfluenceModel(Protocol):
    """Predicts the influence of samples from their tokens."""

    def predict(self, windows: Windows) -> npt.NDArray[np.float32]:
        """Influences of samples [n, L], in standard deviations of the labels: [n] float32, each independent of the others."""

    def forward_flops(self, samples: int, length: int) -> float:
        """FLOPs of predicting samples of ``length`` tokens."""

    def save(self, directory: Path) -> None:
        """Write what :func:`open_model` needs."""


def open_model(directory: Path, recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> InfluenceModel:
    """The influence model of an artifact, to score with.

    Raises:
        ArtifactError: no influence model, or a damaged one.
    """
    from mates.engine.influence.encoder import EncoderModel, encoder_inputs, load_encoder
    from mates.engine.influence.ngrams import NgramModel

    artifact.load(directory, "influence model")
    if recipe.fit.model == "ngram":
        return NgramModel.load(directory)
    reader = encoder_inputs(recipe.fit, tokenizer, tokenizer.vocab_size, directory)
    return EncoderModel(load_encoder(directory).to(device).eval(), reader, recipe.fit, recipe.score, device)
