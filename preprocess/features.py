"""Cheap features of documents, computed while their text and tokens are in memory anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

Feature = Literal["length", "hash", "ngrams"]
TOKENS_COLUMN = "tokens"  # of every row: tokens of the document without the end-of-document token
NGRAM_BUCKETS = 10_000  # as DSIR (arXiv 2302.03169) uses
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing
_SECOND = np.uint64(0xC2B2AE3D27D4EB4F)


@dataclass(frozen=True)
class NgramCounts:
    """Sparse hashed n-gram counts of D documents: ``buckets`` and ``counts`` [M] of all documents one after the other, buckets
    ascending within a document, and ``offsets`` [D + 1] saying where each begins."""

    buckets: npt.NDArray[np.uint16]
    counts: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]


def ngram_buckets(ids: npt.NDArray[np.integer[Any]]) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
    """Buckets of the token unigrams [N] and of the token bigrams [N − 1] of a stream of ids [N].

    A unigram a hashes h(a) = (a + 1)·φ mod 2^64, a bigram (a, b) to h(a)·s XOR (b + 1)·φ, mixed once more; the bucket is the high
    32 bits modulo ``NGRAM_BUCKETS``. Bigrams that cross a document's end are for the caller to leave out.
    """
    with np.errstate(over="ignore"):
        first = (ids.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
        pairs = ((first[:-1] * _SECOND) ^ (first[1:] >> np.uint64(7)) ^ first[1:]) * _MULTIPLIER
    return _bucket(first), _bucket(pairs)


def _bucket(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
    return ((hashes >> np.uint64(32)) % np.uint64(NGRAM_BUCKETS)).astype(np.uint16)


def count_ngrams(ids: npt.NDArray[np.integer[Any]], offsets: npt.NDArray[np.int64]) -> NgramCounts:
    """Hashed counts of the token unigrams and bigrams of each document.

    DSIR counts words; token ids serve as well, exist already and need no second pass over the text.

    Args:
        ids: [N], documents one after the other. offsets: [D + 1], where each begins.
    """
    unigrams, bigrams = ngram_buckets(ids)
    documents = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
    inside = documents[:-1] == documents[1:]
    keys = np.concatenate([documents * NGRAM_BUCKETS + unigrams, documents[:-1][inside] * NGRAM_BUCKETS + bigrams[inside]])
    found, counts = np.unique(keys, return_counts=True)
    starts = np.searchsorted(found, np.arange(len(offsets), dtype=np.int64) * NGRAM_BUCKETS)
    return NgramCounts((found % NGRAM_BUCKETS).astype(np.uint16), counts.astype(np.int32), starts.astype(np.int64))


def feature_schema(features: Sequence[Feature]) -> list[pa.Field]:
    """Parquet columns of the features."""
    fields = []
    if "length" in features:
        fields.append(pa.field("utf8_bytes", pa.int64()))
    if "hash" in features:
        fields.append(pa.field("text_xxh3_128", pa.binary(16)))
    if "ngrams" in features:
        fields += [pa.field("ngram_buckets", pa.list_(pa.uint16())), pa.field("ngram_counts", pa.list_(pa.int32()))]
    return fields


def feature_columns(
    features: Sequence[Feature],
    encoded: Sequence[bytes],
    ids: npt.NDArray[np.integer[Any]],
    offsets: npt.NDArray[np.int64],
) -> tuple[list[pa.Array], NgramCounts | None]:
    """Columns of a batch of documents, in the order of :func:`feature_schema`, and the n-gram counts where asked for.

    Args:
        features: which.
        encoded: the documents' texts in UTF-8.
        ids: [N] token ids without end-of-document tokens. offsets: [D + 1], where each document's begin.
    """
    columns, ngrams = [], None
    if "length" in features:
        columns.append(pa.array([len(item) for item in encoded], pa.int64()))
    if "hash" in features:
        columns.append(pa.array([xxhash.xxh3_128_digest(item) for item in encoded], pa.binary(16)))
    if "ngrams" in features:
        ngrams = count_ngrams(ids, offsets)
        starts = pa.array(ngrams.offsets.astype(np.int32))
        columns += [pa.ListArray.from_arrays(starts, pa.array(ngrams.buckets)), pa.ListArray.from_arrays(starts, pa.array(ngrams.counts))]
    return columns, ngrams
