"""DSIR against its definition with counters, and its sampling through Gumbel-top-k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from mates.engine.baselines.dsir import Dsir

BUCKETS = 10_000


def random_windows(n: int, length: int = 30, seed: int = 0, exponent: float = 1.3) -> np.ndarray:
    return (np.random.default_rng(seed).zipf(exponent, (n, length)) % 60_000).astype(np.uint16)


def bucket(ngram: Sequence[int]) -> int:
    """Fibonacci hashing as the features of preprocessing describe it, in Python integers."""
    first, *rest = ((token + 1) * 0x9E3779B97F4A7C15 % 2**64 for token in ngram)
    for second in rest:
        first = ((first * 0xC2B2AE3D27D4EB4F % 2**64) ^ (second >> 7) ^ second) * 0x9E3779B97F4A7C15 % 2**64
    return (first >> 32) % BUCKETS


def buckets_of(ids: Sequence[int]) -> list[int]:
    return [bucket(ngram) for ngram in [*((one,) for one in ids), *pairwise(ids)]]


def log_shares(texts: Iterable[Sequence[int]]) -> dict[int, float]:
    counts = Counter(item for ids in texts for item in buckets_of(ids))
    total = sum(counts.values())
    return {item: math.log(counts[item] / total + 1e-8) for item in range(BUCKETS)}


def test_log_weights_are_those_of_the_definition() -> None:
    target, raw = random_windows(20, seed=1, exponent=1.5), random_windows(200, seed=2)
    passages = [np.array([5, 5, 9]), np.array([7])]
    dsir = Dsir.fit([target[:3], target[3:], *passages], [raw])
    p, q = log_shares([*target.tolist(), *(ids.tolist() for ids in passages)]), log_shares(raw.tolist())
    asked = random_windows(50, seed=3)
    expected = [math.fsum(p[item] - q[item] for item in buckets_of(ids)) for ids in asked.tolist()]
    assert min(expected) < -10  # bigrams that only one of them has count for much
    np.testing.assert_allclose(dsir.log_weights(asked), expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dsir.relevance(asked), np.array(expected) / 59, rtol=1e-9, atol=1e-9)
    assert dsir.scores(asked).tolist() == (-dsir.log_weights(asked)).tolist()
    assert dsir.log_weights(asked).dtype == np.float64


def test_compiled_code_uses_the_buckets_of_preprocessing() -> None:
    from mates.preprocess.features import NGRAM_BUCKETS, ngram_buckets

    ids = np.random.default_rng(0).integers(0, 2**32, 1_000)
    unigrams, bigrams = ngram_buckets(ids)
    for token in range(50):
        pair = ids[token : token + 2]
        table = np.zeros(NGRAM_BUCKETS)
        table[unigrams[token : token + 2]] += 1
        table[bigrams[token]] += 1
        assert Dsir(table).log_weights(pair[None])[0] == table[unigrams[token : token + 2]].sum() + table[bigrams[token]]
    counted = np.bincount(np.concatenate([unigrams, bigrams]), minlength=NGRAM_BUCKETS)
    one = Dsir.fit([ids], [np.arange(3)]).tables - Dsir.fit([np.arange(3)], [np.arange(3)]).tables
    base = np.log(np.bincount(np.concatenate(ngram_buckets(np.arange(3))), minlength=NGRAM_BUCKETS) / 5 + 1e-8)
    np.testing.assert_allclose(one + base, np.log(counted / counted.sum() + 1e-8), atol=1e-12)


def test_a_score_does_not_depend_on_the_other_samples() -> None:
    dsir = Dsir.fit([random_windows(20, seed=1)], [random_windows(50, seed=2)])
    asked = random_windows(101, seed=3)
    whole = dsir.scores(asked).tolist()
    for pieces in (2, 7, 101):
        assert np.concatenate([dsir.scores(part) for part in np.array_split(asked, pieces)]).tolist() == whole
    assert dsir.scores(asked[::-1])[::-1].tolist() == whole
    assert dsir.scores(asked.astype(np.int64)).tolist() == whole
    assert dsir.scores(asked[:0]).tolist() == []


def test_fitting_does_not_depend_on_the_pieces() -> None:
    target, raw = random_windows(20, seed=1), random_windows(50, seed=2)
    one, other = Dsir.fit([target], [raw]), Dsir.fit(iter(target), np.array_split(raw, 9))
    assert one.tables.tolist() == other.tables.tolist()


def test_text_like_the_target_has_the_lower_score() -> None:
    source = np.random.default_rng(0)
    common, rare = source.integers(0, 500, (300, 40)), source.integers(400, 900, (300, 40))
    dsir = Dsir.fit([common[:100]], [common[100:200], rare[100:200]])
    assert dsir.scores(common[200:]).max() < dsir.scores(rare[200:]).min()


def test_tables_are_saved_and_opened() -> None:
    dsir = Dsir.fit([random_windows(5, seed=1)], [random_windows(5, seed=2)])
    again = Dsir.from_array(dsir.tables.copy())
    assert again.scores(random_windows(9)).tolist() == dsir.scores(random_windows(9)).tolist()
    broken = dsir.tables.copy()
    broken[7] = math.nan
    for wrong in (dsir.tables[:-1], dsir.tables.astype(np.float32), broken):
        with pytest.raises(ValueError, match="expected 10000 finite float64"):
            Dsir.from_array(wrong)


def test_nothing_to_fit_to_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens in the target"):
        Dsir.fit([], [random_windows(5)])
    with pytest.raises(ValueError, match="no tokens in the raw text"):
        Dsir.fit([random_windows(5)], [random_windows(0)])
