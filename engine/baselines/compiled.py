"""The baselines' passes over tokens by compiled code: each sample on its own, its terms added in the order of its tokens."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Windows = npt.NDArray[np.integer[Any]]
Tokens = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# of mates.preprocess.features, again: compiled code on disk would not notice that another file's constants changed
_MULTIPLIER, _SECOND, _BUCKETS = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(10_000)
SPREAD = np.uint64(0x9E3779B1)  # odd, so that no two of 32 bits meet, and near 2**32 / golden ratio
_LOW = np.uint64(0xFFFFFFFF)
_ONE, _SEVEN, _HALF = np.uint64(1), np.uint64(7), np.uint64(32)


def tokens_of(windows: Windows) -> Tokens:
    """Token ids in the one dtype that the functions here are compiled for, whatever they are stored in."""
    return np.ascontiguousarray(windows, np.uint32)


@numba.njit(inline="always")
def _unigram(token: Any) -> Any:
    """The hash of :func:`mates.preprocess.features.ngram_buckets`."""
    return (np.uint64(token) + _ONE) * _MULTIPLIER


@numba.njit(inline="always")
def _bigram(first: Any, second: Any) -> Any:
    """The same of two tokens' hashes."""
    return ((first * _SECOND) ^ (second >> _SEVEN) ^ second) * _MULTIPLIER


@numba.njit(inline="always")
def _bucket(hashed: Any) -> Any:
    return (hashed >> _HALF) % _BUCKETS


@numba.njit(nogil=True, cache=True)
def count_buckets(windows: Tokens, counts: Integers) -> None:
    """Add the unigrams and bigrams of windows [n, L] to the counts of their buckets [10,000], in place."""
    for row in range(windows.shape[0]):
        before = np.uint64(0)
        for place in range(windows.shape[1]):
            hashed = _unigram(windows[row, place])
            counts[_bucket(hashed)] += 1
            if place:
                counts[_bucket(_bigram(before, hashed))] += 1
            before = hashed


@numba.njit(parallel=True, nogil=True, cache=True)
def sum_buckets(windows: Tokens, table: Floats) -> Floats:
    """The sum of a table [10,000] over the unigrams and bigrams of each window: [n, L] → [n]."""
    result = np.empty(windows.shape[0])
    for row in numba.prange(windows.shape[0]):
        total, before = 0.0, np.uint64(0)
        for place in range(windows.shape[1]):
            hashed = _unigram(windows[row, place])
            total += table[_bucket(hashed)]
            if place:
                total += table[_bucket(_bigram(before, hashed))]
            before = hashed
        result[row] = total
    return result


@numba.njit(parallel=True, nogil=True, cache=True)
def bigram_losses(windows: Tokens, starts: Integers, followers: Tokens, seen: Floats, backoff: Floats, lower: Floats) -> Floats:
    """Mean of −ln p(b|a) over the token pairs of each window: [n, L] → [n], with p(b|a) = seen(ab) + backoff(a)·lower(b).

    Followers are spread evenly over 32 bits, so that one is looked for where it must nearly be: a cache line or two are read, where halving
    reads one a step.

    Args:
        starts: [V + 1], where the followers of each token begin. followers: [M], ``b·SPREAD mod 2**32``, ascending within a token.
        seen: [M]. backoff, lower: [V].
    """
    pairs = windows.shape[1] - 1
    result = np.empty(windows.shape[0])
    for row in numba.prange(windows.shape[0]):
        tokens = windows[row]
        places, near = np.empty(pairs, np.int64), np.empty(pairs, np.uint32)
        for pair in range(pairs):  # one loop a read from memory, and none of them waits for the one before
            low, count = starts[tokens[pair]], starts[tokens[pair] + 1] - starts[tokens[pair]]
            wanted = (np.uint64(tokens[pair + 1]) * SPREAD) & _LOW
            places[pair] = low + np.int64((wanted * np.uint64(count)) >> _HALF)
            near[pair] = followers[min(places[pair], len(followers) - 1)]
        for pair in range(pairs):
            low, high, place = starts[tokens[pair]], starts[tokens[pair] + 1], places[pair]
            wanted = (np.uint64(tokens[pair + 1]) * SPREAD) & _LOW
            if near[pair] >= wanted:
                while place > low and followers[place - 1] >= wanted:
                    place -= 1
            else:
                while place < high and followers[place] < wanted:
                    place += 1
            places[pair] = place if place < high and followers[place] == wanted else -1
        total = 0.0
        for pair in range(pairs):
            share = seen[places[pair]] if places[pair] >= 0 else 0.0
            total -= math.log(share + backoff[tokens[pair]] * lower[tokens[pair + 1]])
        result[row] = total / pairs
    return result
