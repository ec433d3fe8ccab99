"""The cascade: the n-gram model drops the candidates that it is sure about, and the encoder reads the rest.

The two see different things, so that what is left is predicted by a mean of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mates.engine.influence.encoder import EncoderModel
from mates.engine.influence.model import Floats, Samples, Scores
from mates.engine.influence.ngrams import NgramModel
from mates.preprocess import artifact
from mates.preprocess.artifact import ArtifactError

CASCADE_FILE = "cascade.json"
DROPPED = 1000.0
"""Added to the n-gram model's scores of what it drops: a mark, far from what is predicted."""
SHARES = tuple(share / 100 for share in range(5, 100, 5))


@dataclass(frozen=True)
class CascadeModel:
    """An n-gram model in front of an encoder: an :class:`InfluenceModel`.

    ``threshold`` is the n-gram model's joined prediction, in label SD, above which a sample is dropped; ``join`` [R] makes one of its
    predictions; ``share`` is what was dropped of the samples that the threshold was chosen on. What is left has the mean of both models'
    predictions, with the weight ``ngram_weight`` for the n-gram model's.
    """

    ngrams: NgramModel
    encoder: EncoderModel
    threshold: float
    join: Floats
    share: float
    ngram_weight: float

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`. What is dropped has the n-gram model's scores, :data:`DROPPED` higher."""
        scores = self.ngrams.predict(samples)
        kept = np.flatnonzero(scores @ self.join <= self.threshold)
        read, own = self.encoder.prepare(samples[kept]), scores[kept]
        scores += np.float32(DROPPED)

        def finish() -> Scores:
            scores[kept] = mixed(own, read(), self.ngram_weight)
            return scores

        return finish

    def forward_flops(self, samples: int, length: int) -> float:
        """See :class:`Scorer`. Of the encoder, for the share that it is expected to read."""
        return self.flops(samples, length, read=(1 - self.share) * samples)

    def flops(self, samples: int, length: int, *, read: float) -> float:
        """FLOPs of scoring samples of ``length`` tokens of which the encoder reads so many."""
        return self.ngrams.forward_flops(samples, length) + self.encoder.forward_flops(1, length) * read

    def save(self, directory: Path) -> None:
        """See :class:`InfluenceModel`."""
        self.encoder.save(directory)
        self.ngrams.save(directory)
        figures = {"threshold": self.threshold, "join": self.join.tolist(), "share": self.share, "ngram_weight": self.ngram_weight}
        artifact.write_json(directory / CASCADE_FILE, figures)

    @classmethod
    def load(cls, directory: Path, encoder: EncoderModel) -> CascadeModel:
        """What :meth:`save` wrote. ArtifactError where it is something else."""
        found = artifact.read_json(directory / CASCADE_FILE)
        try:
            join = np.array(found["join"], np.float64)
            threshold, share, weight = (float(found[name]) for name in ("threshold", "share", "ngram_weight"))
        except (KeyError, TypeError, ValueError) as error:
            expected = "threshold, join, share and ngram_weight"
            raise ArtifactError(f"{directory / CASCADE_FILE}: {error!r}; expected {expected}; fit the model again") from error
        return cls(NgramModel.load(directory), encoder, threshold, join, share, weight)


def mixed(ngrams: Scores, encoder: Scores, ngram_weight: float) -> Scores:
    """The mean of two predictions of the same samples [n, R], one with a weight, the other with the rest to 1."""
    return np.float32(ngram_weight) * ngrams + np.float32(1 - ngram_weight) * encoder


def best_weight(ngrams: Scores, encoder: Scores, targets: Scores) -> float:
    """The weight of the n-gram model's predictions [n, R], in tenths, whose mean with the encoder's has the least squared error."""
    weights = [tenth / 10 for tenth in range(11)]
    return min(weights, key=lambda weight: float(np.mean((mixed(ngrams, encoder, weight) - targets) ** 2)))


def undropped(scores: npt.NDArray[np.floating], model: str) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_]]:
    """Scores [n, R] as a kind of model predicted them, those of dropped samples too, and which samples a cascade has dropped [n]."""
    dropped = scores[:, 0] > DROPPED / 2 if model == "cascade" else np.zeros(len(scores), np.bool_)
    return np.where(dropped[:, None], scores - DROPPED, scores) if dropped.any() else scores, dropped


def lost_influence(predicted: Floats, dropped: npt.NDArray[np.bool_], oracle: Floats, ratio: float) -> float | None:
    """What dropping costs: the share lost of what choosing by predictions gains over a random choice, in mean oracle influence.

    None where nothing is gained, so that nothing can be said of a share of it.

    Args:
        predicted: predictions of what is read [n]. dropped: what is not [n]. oracle: influences [n]. ratio: chosen share.
    """
    k = max(1, round(ratio * len(oracle)))
    full = oracle[np.argsort(predicted, kind="stable")[:k]].mean()
    left = oracle[np.argsort(np.where(dropped, predicted + DROPPED, predicted), kind="stable")[:k]].mean()
    gain = oracle.mean() - full
    return float((left - full) / gain) if gain > 0 else None


def dropped_share(first: Floats, predicted: Floats, oracle: Floats, *, ratio: float, bound: float) -> float:
    """The largest share, up to 1 − ratio, that can be dropped while it and all smaller ones lose at most ``bound``; 0 where none can, or
    where the predictions gain nothing.

    Args:
        first: the n-gram model's predictions [n]. predicted: both models' [n]. oracle: influences [n] of validation labels.
        ratio: chosen share. bound: of :func:`lost_influence`.
    """
    best = 0.0
    for share in SHARES:
        lost = lost_influence(predicted, first > np.quantile(first, 1 - share), oracle, ratio)
        if share > 1 - ratio + 1e-9 or lost is None or lost > bound:
            break
        best = share
    return best
