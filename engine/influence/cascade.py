"""The cascade: the n-gram model drops the candidates that it is sure about, and the encoder reads the rest."""

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
    predictions; ``share`` is what was dropped of the samples that the threshold was chosen on.
    """

    ngrams: NgramModel
    encoder: EncoderModel
    threshold: float
    join: Floats
    share: float

    def prepare(self, samples: Samples) -> Callable[[], Scores]:
        """See :class:`Scorer`. What is dropped has the n-gram model's scores, :data:`DROPPED` higher."""
        scores = self.ngrams.predict(samples)
        kept = np.flatnonzero(scores @ self.join <= self.threshold)
        read = self.encoder.prepare(samples[kept])
        scores += np.float32(DROPPED)

        def finish() -> Scores:
            scores[kept] = read()
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
        artifact.write_json(directory / CASCADE_FILE, {"threshold": self.threshold, "join": self.join.tolist(), "share": self.share})

    @classmethod
    def load(cls, directory: Path, encoder: EncoderModel) -> CascadeModel:
        """What :meth:`save` wrote. ArtifactError where it is something else."""
        found = artifact.read_json(directory / CASCADE_FILE)
        try:
            threshold, join, share = float(found["threshold"]), np.array(found["join"], np.float64), float(found["share"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{directory / CASCADE_FILE}: {error!r}; expected threshold, join and share; fit the model again"
            ) from error
        return cls(NgramModel.load(directory), encoder, threshold, join, share)


def is_dropped(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Which samples a cascade has dropped, by their scores [n, R]: [n]."""
    return np.asarray(scores[:, 0] > DROPPED / 2)


def undropped(scores: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Scores as the models predict them, those of dropped samples too."""
    return np.where(scores > DROPPED / 2, scores - DROPPED, scores)


def lost_influence(predicted: Floats, dropped: npt.NDArray[np.bool_], oracle: Floats, ratio: float) -> float | None:
    """What dropping costs: the share lost of what choosing by predictions gains over a random choice, in mean oracle influence.

    None where nothing is gained, so that nothing can be said of a share of it.

    Args:
        predicted: the encoder's predictions [n]. dropped: what it does not read [n]. oracle: influences [n]. ratio: chosen share.
    """
    k = max(1, round(ratio * len(oracle)))
    full = oracle[np.argsort(predicted, kind="stable")[:k]].mean()
    left = oracle[np.argsort(np.where(dropped, predicted + DROPPED, predicted), kind="stable")[:k]].mean()
    gain = oracle.mean() - full
    return float((left - full) / gain) if gain > 0 else None


def dropped_share(first: Floats, predicted: Floats, oracle: Floats, *, ratio: float, bound: float) -> float:
    """The largest share, up to 1 − ratio, that can be dropped while it and all smaller ones lose at most ``bound``; 0 where none can, or
    where the encoder gains nothing.

    Args:
        first: the n-gram model's predictions [n]. predicted: the encoder's [n]. oracle: influences [n] of validation labels.
        ratio: chosen share. bound: of :func:`lost_influence`.
    """
    best = 0.0
    for share in SHARES:
        lost = lost_influence(predicted, first > np.quantile(first, 1 - share), oracle, ratio)
        if share > 1 - ratio + 1e-9 or lost is None or lost > bound:
            break
        best = share
    return best
