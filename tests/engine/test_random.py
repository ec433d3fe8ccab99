"""The counter-based generator against Random123's vectors, pure Python and scipy."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mates.engine import random as keyed
from mates.engine.random import KeyedPermutation, bits, gumbel, key_of, philox4x32, uniform

word = st.integers(0, 2**32 - 1)
key_word = word | st.sampled_from([0, 1, 2**32 - 1])


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as the paper's figure has it, in Python integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c


def counters(rows: Sequence[Sequence[int]]) -> npt.NDArray[np.uint64]:
    return np.array(rows, np.uint64).reshape(-1, 4)


# --- Philox --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # from Random123's kat_vectors: zeros, ones, digits of pi
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    first, second = (int(item, 16) for item in key.split())
    result = philox4x32(counters([[int(item, 16) for item in counter.split()]]), (first, second))
    assert result.dtype == np.uint32
    assert " ".join(f"{int(item):08x}" for item in result[0]) == expected


@given(rows=st.lists(st.tuples(word, word, word, word), max_size=5), key=st.tuples(key_word, key_word))
def test_philox_equals_pure_python(rows: list[tuple[int, int, int, int]], key: tuple[int, int]) -> None:
    assert philox4x32(counters(rows), key).tolist() == [philox(row, key) for row in rows]


def test_philox_leaves_its_counters_alone() -> None:
    given_counters = counters([[1, 2, 3, 4]])
    philox4x32(given_counters, (5, 6))
    assert given_counters.tolist() == [[1, 2, 3, 4]]


# --- keyed numbers -------------------------------------------------------------------------------------------------


def test_keys_as_literals() -> None:
    """What a run has drawn must be drawn again by other versions of the program."""
    digest = hashlib.blake2b(b"7/select/3", digest_size=8, person=b"mates-random").hexdigest()
    expected = tuple(int.from_bytes(bytes.fromhex(part), "little") for part in (digest[:8], digest[8:]))
    assert key_of(7, "select", 3) == expected
    assert key_of(0, "blocks") == key_of(0, "blocks", 0) == (2037005942, 2445121575)
    assert bits(np.array([0, 1, 2**40]), 0, "blocks").tolist() == [
        7906423503199676040,
        7085268357697237488,
        10718353206241845280,
    ]


@given(ids=st.lists(st.integers(0, 2**63 - 1), max_size=6), seed=st.integers(0, 2**32 - 1), stage=st.integers(0, 9))
def test_numbers_of_an_id_are_philox_at_the_id(ids: list[int], seed: int, stage: int) -> None:
    array = np.array(ids, np.int64)
    words = [philox((item % 2**32, item >> 32, 0, 0), key_of(seed, "test", stage)) for item in ids]
    expected = [first | second << 32 for first, second, _, _ in words]
    assert bits(array, seed, "test", stage).tolist() == expected
    # 52 bits fit a double twice over, so that these are exact
    assert uniform(array, seed, "test", stage).tolist() == [(2 * (item >> 12) + 1) / 2**53 for item in expected]


def test_an_ids_number_does_not_depend_on_the_others() -> None:
    ids = np.random.default_rng(0).permutation(1_000)
    whole = gumbel(ids, 3, "select", 1)
    for part in np.array_split(np.arange(1_000), 7):
        assert gumbel(ids[part], 3, "select", 1).tolist() == whole[part].tolist()
    ordered = np.argsort(ids)
    assert gumbel(ids[ordered], 3, "select", 1).tolist() == whole[ordered].tolist()
    assert [gumbel(ids[:3].astype(dtype), 3, "select", 1).tolist() for dtype in (np.int32, np.uint64)] == [whole[:3].tolist()] * 2


def test_purposes_stages_and_seeds_have_streams_of_their_own() -> None:
    ids = np.arange(20_000)
    streams = {
        (seed, purpose, stage): bits(ids, seed, purpose, stage)
        for seed, purpose, stage in itertools.product((0, 1, 11), ("select", "order", "blocks"), (0, 1, 11))
    }
    for one, other in itertools.combinations(streams.values(), 2):
        assert not np.any(one == other)
        agreement = np.bitwise_count(one ^ other).mean()  # 64 fair coins: 32, standard deviation 4 / sqrt(20,000)
        assert abs(agreement - 32) < 5 * 4 / math.sqrt(len(ids))
    assert len({tuple(stream[:4]) for stream in streams.values()}) == len(streams) == 27


# --- distributions (seeded, so a pass is a pass for ever) ----------------------------------------------------------


def test_uniform_numbers() -> None:
    numbers = uniform(np.arange(100_000), 1, "test")
    assert 0 < numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > 0.001
    for power in (1, 2, 3, 4):  # E u^p = 1/(p + 1), Var u^p = 1/(2p + 1) − 1/(p + 1)²
        deviation = math.sqrt((1 / (2 * power + 1) - 1 / (power + 1) ** 2) / len(numbers))
        assert abs((numbers**power).mean() - 1 / (power + 1)) < 4 * deviation
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(len(numbers))
    each_bit = (bits(np.arange(100_000), 1, "test")[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(each_bit.mean(0) - 0.5).max() < 5 * 0.5 / math.sqrt(100_000)


def test_gumbel_numbers() -> None:
    numbers = gumbel(np.arange(100_000), 2, "select", 4)
    assert stats.kstest(numbers, stats.gumbel_r.cdf).pvalue > 0.001
    assert stats.kstest(-numbers, stats.gumbel_r.cdf).pvalue < 1e-100
    assert np.isfinite(numbers).all()
    assert np.array_equal(numbers, gumbel(np.arange(100_000), 2, "select", 4))


def test_gumbel_is_accurate_in_both_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """−ln(−ln u) at the smallest and largest numbers that can be drawn, against 60 digits."""
    from mpmath import log, mp, mpf  # type: ignore[import-untyped]

    grid = [0, 1, 2, 2**20, 2**50, 2**51 - 1, 2**51, 2**52 - 2**20, 2**52 - 2, 2**52 - 1]
    monkeypatch.setattr("mates.engine.random.bits", lambda ids, *_: np.asarray(ids).astype(np.uint64) << np.uint64(12))
    found = gumbel(np.array(grid), 0, "test")
    with mp.workdps(60):
        exact = [float(-log(-log((mpf(item) + 0.5) / 2**52))) for item in grid]
    np.testing.assert_allclose(found, exact, rtol=1e-15, atol=1e-15)
    assert found[0] == pytest.approx(-3.6, abs=0.1)
    assert found[-1] == pytest.approx(36.7, abs=0.1)


# --- permutations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 201), 255, 256, 257, 1_000, 1_023, 1_024, 1_025, 4_096, 65_535, 65_536, 65_537])
def test_permutations_are_bijections(n: int) -> None:
    for stage in (0, 1):
        image = KeyedPermutation(n, 9, "test", stage)(np.arange(n))
        assert image.dtype == np.int64
        assert np.array_equal(np.bincount(image, minlength=n), np.ones(n))
        assert len(image) == n


@pytest.mark.parametrize("n", [1, 2, 7, 64, 65, 1_000])
def test_points_are_computed_apart(n: int) -> None:
    permutation = KeyedPermutation(n, 1, "test")
    whole = permutation(np.arange(n))
    assert [int(permutation(np.array([point]))[0]) for point in range(n)] == whole.tolist()
    mixed = np.random.default_rng(0).integers(0, n, 300)
    assert permutation(mixed).tolist() == whole[mixed].tolist()
    assert permutation(np.arange(0)).tolist() == []


def test_a_permutation_of_twenty_as_a_literal() -> None:
    assert KeyedPermutation(20, 0, "blocks")(np.arange(20)).tolist() == [
        3,
        4,
        0,
        6,
        10,
        11,
        15,
        12,
        13,
        9,
        7,
        18,
        1,
        5,
        19,
        2,
        16,
        8,
        14,
        17,
    ]


def test_a_permutation_is_the_feistel_network_of_its_description() -> None:
    """Eight rounds over halves of 3 bits for n = 50; points that land outside are walked on."""
    key = key_of(4, "test", 2)

    def walk(point: int) -> int:
        left, right = divmod(point, 8)
        for number in range(8):
            left, right = right, left ^ philox((right, 0, number, 0), key)[0] % 8
        image = left * 8 + right
        return image if image < 50 else walk(image)

    assert KeyedPermutation(50, 4, "test", 2)(np.arange(50)).tolist() == [walk(point) for point in range(50)]


def test_permutations_of_a_billion_billion_need_no_table() -> None:
    n = 10**18
    positions = np.array([0, 1, n // 2, n - 1])
    image = KeyedPermutation(n, 0, "test")(positions)
    assert len(set(image.tolist())) == 4
    assert image.min() >= 0
    assert image.max() < n


def test_permutations_of_different_keys_differ() -> None:
    keys = [(0, "blocks", 0), (1, "blocks", 0), (0, "order", 0), (0, "blocks", 1)]
    images = [KeyedPermutation(10_000, *key)(np.arange(10_000)) for key in keys]
    for one, other in itertools.combinations([np.arange(10_000), *images], 2):
        assert np.count_nonzero(one == other) < 10  # one on average
    same = KeyedPermutation(10_000, *keys[0])(np.arange(10_000))
    assert np.array_equal(same, images[0])


@pytest.mark.parametrize("n", [10, 16])
def test_every_place_is_equally_likely(n: int) -> None:
    """Over 1,000 seeds: where element 0 goes, what comes to place 0, and where the last goes relative to the first."""
    images = np.array([KeyedPermutation(n, seed, "test")(np.arange(n)) for seed in range(1_000)])
    assert stats.chisquare(np.bincount(images[:, 0], minlength=n)).pvalue > 0.001
    assert stats.chisquare(np.bincount((images == 0).argmax(1), minlength=n)).pvalue > 0.001
    pairs = np.bincount((images[:, -1] - images[:, 0]) % n, minlength=n)
    assert pairs[0] == 0
    assert stats.chisquare(pairs[1:]).pvalue > 0.001


@pytest.mark.parametrize("positions", [[-1], [0, 20], [5, -3], [2**62]])
def test_positions_outside_are_index_errors(positions: list[int]) -> None:
    with pytest.raises(IndexError, match=rf"positions {min(positions)} to {max(positions)} of a permutation of 20"):
        KeyedPermutation(20, 0, "test")(np.array(positions))


@pytest.mark.parametrize("n", [0, -1])
def test_a_permutation_of_nothing_is_an_error(n: int) -> None:
    with pytest.raises(ValueError, match=f"a permutation of {n} elements"):
        KeyedPermutation(n, 0, "test")


# --- compiled code -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 12_345, 2**20, 10**9, 2**40 + 7, 2**62 + 5])
def test_compiled_code_gives_the_same_permutation(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = np.random.default_rng(0).integers(0, n, 5_000)
    permutation = KeyedPermutation(n, 1, "purpose", 2)
    expected = permutation(positions)
    monkeypatch.setattr(keyed, "MANY", 1)
    assert permutation(positions).tolist() == expected.tolist()
    assert permutation(positions).dtype == np.int64
    with pytest.raises(IndexError):
        permutation(np.array([n]))


def test_compiled_code_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.concatenate([np.arange(100), np.random.default_rng(0).integers(0, 2**63 - 1, 5_000)])
    expected = bits(ids, 7, "purpose", 3), gumbel(ids, 7, "purpose", 3)
    monkeypatch.setattr(keyed, "MANY", 1)
    assert bits(ids, 7, "purpose", 3).tolist() == expected[0].tolist()
    assert gumbel(ids, 7, "purpose", 3).tolist() == expected[1].tolist()
