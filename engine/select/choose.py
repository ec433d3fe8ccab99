"""The selection rules, as functions of scores and sample ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mates.engine.random import bits, gumbel

Ids = npt.NDArray[np.int64]


def top_k(keys: npt.NDArray[np.floating[Any]], ids: Ids, k: int) -> Ids:
    """The ids of the k largest keys, ascending by id; among equal keys the smaller id wins."""
    if not 0 <= k <= len(ids):
        raise ValueError(f"{k} of {len(ids)} candidates")
    order = np.lexsort((ids, -keys))[:k]
    return np.sort(ids[order])


def gumbel_top_k(scores: npt.NDArray[np.floating[Any]], ids: Ids, k: int, *, temperature: float, seed: int, stage: int) -> Ids:
    """Sample k ids without replacement with probabilities ∝ exp(−score / temperature) (Kool et al., arXiv 1903.06059).

    The ids with the largest −score / temperature + Gumbel noise: lower scores (more helpful) are likelier. The noise of an id
    depends on (seed, stage, id) alone.

    Args:
        scores: [n], in standard deviations of the labels. ids: [n], sample ids. k: how many.
        temperature: above 0, in the unit of the scores.

    Returns:
        [k] ids, ascending.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    keys = -scores.astype(np.float64) / temperature + gumbel(ids, seed, "select", stage)
    return top_k(keys, ids, k)


def in_training_order(ids: Ids, *, seed: int, stage: int) -> Ids:
    """The same ids in a keyed random order."""
    return ids[np.lexsort((ids, bits(ids, seed, "order", stage)))]
