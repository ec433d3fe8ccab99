"""Duplicates against Python sets, and near-duplicates of known similarity against all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from mates.engine.baselines.duplicates import Duplicates, bands


def shingles(ids: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(ids[start : start + 5].tolist()) for start in range(len(ids) - 4)}


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def random_windows(n: int, length: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, (n, length)).astype(np.uint16)


def edited(windows: np.ndarray, places: int, seed: int = 1) -> np.ndarray:
    """Each window with some tokens that are far apart replaced, each of which is in five shingles."""
    copies, length = windows.copy(), windows.shape[1]
    copies[:, np.arange(places) * (length // max(places, 1)) + 7] = random_windows(len(windows), places, seed)
    return copies


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_exact_duplicates_against_a_set(dtype: type) -> None:
    windows: np.ndarray = np.random.default_rng(0).integers(0, 3, (500, 6)).astype(dtype)
    seen: set[tuple[int, ...]] = set()
    expected = []
    for ids in windows.tolist():
        expected.append(tuple(ids) in seen)
        seen.add(tuple(ids))
    assert 0 < sum(expected) < 500
    assert Duplicates(None).add(windows).tolist() == expected


def test_a_window_is_the_same_in_any_dtype() -> None:
    duplicates = Duplicates(None)
    assert duplicates.add(np.array([[1, 2, 3]], np.uint16)).tolist() == [False]
    assert duplicates.add(np.array([[1, 2, 3]], np.int64)).tolist() == [True]


@pytest.mark.parametrize(("threshold", "few", "many"), [(0.8, 2, 12), (0.5, 10, 30), (0.9, 1, 6)])
def test_near_duplicates_are_found_and_others_kept(threshold: float, few: int, many: int) -> None:
    originals = random_windows(60)
    near, far = edited(originals, few), edited(originals, many, seed=2)
    for copies, sign in ((near, 1), (far, -1)):
        found = [jaccard(one, other) for one, other in zip(originals, copies, strict=True)]
        assert all(sign * (value - threshold) > 0.06 for value in found), found  # three standard deviations of the estimate and more
    duplicates = Duplicates(threshold)
    assert not duplicates.add(originals).any()
    assert not duplicates.add(far).any()
    assert duplicates.add(near).all()
    assert duplicates.add(originals).all()


def test_only_kept_samples_are_compared_with() -> None:
    """A chain whose every link is near, though its ends are not: the third stays, since the second did not."""
    first = random_windows(1)
    second = edited(first, 4)
    third = second.copy()
    third[:, np.arange(4) * 75 + 40] = random_windows(1, 4, seed=5)
    assert jaccard(first[0], second[0]) > 0.85 < jaccard(second[0], third[0])
    assert jaccard(first[0], third[0]) < 0.78
    assert Duplicates(0.82).add(np.concatenate([first, second, third, second])).tolist() == [False, True, False, True]


def test_against_all_pairs() -> None:
    """Where all pairs are clear of the threshold, answers are those of exact Jaccard similarities."""
    originals = random_windows(50)
    mixed = np.concatenate([originals, edited(originals[:20], 1), edited(originals[10:40], 14, seed=3), originals[45:]])
    mixed = mixed[np.random.default_rng(7).permutation(len(mixed))]
    kept: list[set[tuple[int, ...]]] = []
    expected = []
    for own in map(shingles, mixed):
        nearest = max((len(own & other) / len(own | other) for other in kept), default=0.0)
        assert not 0.72 < nearest < 0.88
        expected.append(nearest >= 0.8)
        if nearest < 0.8:
            kept.append(own)
    assert Duplicates().add(mixed).tolist() == expected


def test_answers_do_not_depend_on_the_cuts() -> None:
    originals = random_windows(40, 60)
    stream = np.concatenate([originals, *(edited(originals, places, seed=places) for places in (1, 2, 3)), originals[:10]])
    stream = stream[np.random.default_rng(0).permutation(len(stream))]
    whole = Duplicates().add(stream).tolist()
    assert 20 < sum(whole) < 150
    for pieces in (2, 7, len(stream)):
        duplicates = Duplicates()
        assert np.concatenate([duplicates.add(part) for part in np.array_split(stream, pieces)]).tolist() == whole


def test_short_windows() -> None:
    assert Duplicates().add(np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1]])).tolist() == [False, True, False]
    assert Duplicates().add(np.zeros((0, 8), np.uint16)).tolist() == []


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_let_the_threshold_be_found(threshold: float) -> None:
    count = bands(threshold)
    assert 256 % count == 0
    assert 1 - (1 - threshold ** (256 // count)) ** count >= 0.99
    fewer = count // 2
    assert not fewer or 1 - (1 - threshold ** (256 // fewer)) ** fewer < 0.99


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        Duplicates(threshold)
