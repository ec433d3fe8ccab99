"""SemDeDup: samples that say the same as another one, by their embeddings (Abbas et al., arXiv 2303.09540)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from mates.engine.random import KeyedPermutation, key_of

FITTED = 200_000  # embeddings that the clusters are fitted to, at most
BATCH = 4_096  # of them in a step of k-means
BLOCK = 4_096  # rows of a matrix product

Embeddings = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]
Keep = Literal["hard", "easy"]


@dataclass(frozen=True)
class Clusters:
    """Clusters of n embeddings."""

    centroids: npt.NDArray[np.float32]
    """[clusters, d], each of length 1."""
    of: npt.NDArray[np.int32]
    """[n], the cluster of each sample: that of the most similar centroid."""


def cluster(embeddings: Embeddings, clusters: int, seed: int) -> Clusters:
    """k-means on embeddings of length 1 (section 3 of the paper), fitted to 200,000 of them by mini-batches (Sculley, WWW 2010).

    Args:
        embeddings: [n, d] float32 of any lengths, may be a memory map. clusters: at most n. seed: of the run.

    Raises:
        ValueError: an embedding that is zero or not finite, or fewer samples than clusters.
    """
    from sklearn.cluster import MiniBatchKMeans  # takes seconds, which every command would wait for

    n = len(embeddings)
    chosen = np.sort(KeyedPermutation(n, seed, "semdedup-fit")(np.arange(min(n, FITTED))))
    # one thread: sums of several would depend on how many there are
    with threadpool_limits(1):
        means = MiniBatchKMeans(clusters, batch_size=BATCH, n_init=1, random_state=key_of(seed, "semdedup-means")[0])
        means.fit(_unit(embeddings[chosen], chosen))
        centroids = _unit(means.cluster_centers_, np.arange(clusters))
        of = np.empty(n, np.int32)
        for start in range(0, n, BLOCK):
            rows = np.arange(start, min(start + BLOCK, n))
            of[rows] = np.argmax(_unit(embeddings[start : start + BLOCK], rows) @ centroids.T, axis=1)
    return Clusters(centroids, of)


def similarities(embeddings: Embeddings, clusters: Clusters, numbers: range | None = None, keep: Keep = "hard") -> Floats:
    """The largest cosine similarity of each sample to one before it in its cluster: the lower, the sooner selected.

    A cluster's samples are in the order of their similarity to the centroid, the least similar first ("hard", what paper and authors' code
    keep by default) or last ("easy"); equals are in the order of their rows. Leaving out all above 1 − ε is SemDeDup at ε, and the k lowest
    are what it keeps at the ε that leaves k.

    Args:
        embeddings: [n, d] as given to :func:`cluster`; those of one cluster are held at a time. clusters: of them.
        numbers: the clusters to work on, all by default; ranks take some each. keep: which of similar samples comes first.

    Returns:
        [n] float64, −1 for the first of each cluster, at most 1, and NaN for samples of other clusters.
    """
    numbers = range(len(clusters.centroids)) if numbers is None else numbers
    members = np.argsort(clusters.of, kind="stable")
    starts = np.searchsorted(clusters.of[members], np.arange(len(clusters.centroids) + 1))
    result = np.full(len(embeddings), np.nan)
    with threadpool_limits(1):
        for number in numbers:
            rows = members[starts[number] : starts[number + 1]]
            unit = _unit(embeddings[rows], rows)
            nearness = unit @ clusters.centroids[number]
            order = np.argsort(nearness if keep == "hard" else -nearness, kind="stable")
            result[rows[order]] = _to_earlier(unit[order])
    return result


def _to_earlier(unit: npt.NDArray[np.float32]) -> Floats:
    """The largest product of each row with one above it, −1 for the first: [m, d] → [m]."""
    largest = np.full(len(unit), -1.0)
    for start in range(0, len(unit), BLOCK):
        products = unit[start : start + BLOCK] @ unit[: start + BLOCK].T
        later = np.arange(products.shape[1]) >= np.arange(start, start + len(products))[:, None]
        products[later] = -1
        largest[start : start + BLOCK] = products.max(axis=1)
    return np.asarray(np.clip(largest, -1, 1))


def _unit(vectors: Embeddings, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """Vectors at length 1: [m, d] float32. ValueError names the row of one that has no direction."""
    wide = np.asarray(vectors, np.float64)
    lengths = np.sqrt(np.einsum("md,md->m", wide, wide))
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise ValueError(
            f"embedding {int(rows[bad[0]])} has length {lengths[bad[0]]}, which has no direction; {len(bad)} are so; "
            "is the checkpoint sound?"
        )
    unit: npt.NDArray[np.float32] = (wide / lengths[:, None]).astype(np.float32)
    return unit
