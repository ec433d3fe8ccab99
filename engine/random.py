"""Counter-based random numbers: every choice is a function of (seed, purpose, stage, counter) and of nothing else.

No generator is carried along, so no result depends on how many ranks, workers or shards there were, or on what was drawn before.
The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

MANY = 1 << 16  # from so many numbers on, loading compiled code pays

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counters: npt.NDArray[np.uint64], key: tuple[int, int]) -> U32:
    """Philox4x32-10.

    Args:
        counters: [n, 4], 32-bit counter words in uint64.
        key: two 32-bit key words.

    Returns:
        [n, 4] uint32 random words.
    """
    c0, c1, c2, c3 = (counters[:, column].astype(np.uint64) for column in range(4))
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def key_of(seed: int, purpose: str, stage: int = 0) -> tuple[int, int]:
    """The Philox key of a purpose: 64 bits of a hash, so that purposes, stages and seeds never share a stream."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{stage}".encode(), digest_size=8, person=b"mates-random").digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def bits(ids: npt.NDArray[np.integer], seed: int, purpose: str, stage: int = 0) -> U64:
    """64 random bits for each id: [n] → [n] uint64."""
    wide = np.asarray(ids).astype(np.uint64)
    if len(wide) >= MANY:
        from mates.engine import random_compiled

        return np.asarray(random_compiled.bits(wide, *map(np.uint64, key_of(seed, purpose, stage))))
    counters = np.zeros((len(wide), 4), np.uint64)
    counters[:, 0], counters[:, 1] = wide & _LOW, wide >> _SHIFT
    words = philox4x32(counters, key_of(seed, purpose, stage)).astype(np.uint64)
    return words[:, 0] | (words[:, 1] << _SHIFT)


def uniform(ids: npt.NDArray[np.integer], seed: int, purpose: str, stage: int = 0) -> npt.NDArray[np.float64]:
    """A uniform number strictly between 0 and 1 for each id: [n] → [n] float64, on the 2**52 midpoints of a grid."""
    return ((bits(ids, seed, purpose, stage) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(ids: npt.NDArray[np.integer], seed: int, purpose: str, stage: int = 0) -> npt.NDArray[np.float64]:
    """A standard Gumbel variate −ln(−ln u) for each id: [n] → [n] float64."""
    # u below 1/2 would lose no digits in ln u, u near 1 would: −ln u = −log1p(−(1 − u)) keeps them, 1 − u being exact here
    u = uniform(ids, seed, purpose, stage)
    exponential = np.where(u < 0.5, -np.log(u), -np.log1p(-(1.0 - u)))
    return np.asarray(-np.log(exponential))


class KeyedPermutation:
    """A random permutation of 0 … n − 1 that is computed point by point: no table, so a billion samples cost nothing.

    A balanced Feistel network of 8 rounds, with Philox as round function, permutes the next power of four; points that land outside
    are walked on until they land inside (Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """

    def __init__(self, n: int, seed: int, purpose: str, stage: int = 0) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} elements")
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._key = key_of(seed, purpose, stage)

    def __call__(self, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """Images of positions: [m] → [m] int64. IndexError for a position outside 0 … n − 1."""
        values = np.asarray(positions).astype(np.int64)
        if len(values) and (int(values.min()) < 0 or int(values.max()) >= self.n):
            raise IndexError(f"positions {int(values.min())} to {int(values.max())} of a permutation of {self.n}")
        if len(values) >= MANY:
            from mates.engine import random_compiled

            n, half = np.uint64(self.n), np.uint64(self._half_bits)
            found = random_compiled.permute(values.astype(np.uint64), n, half, *map(np.uint64, self._key))
            return np.asarray(found).astype(np.int64)
        result = self._encrypt(values.astype(np.uint64))
        outside = np.flatnonzero(result >= np.uint64(self.n))
        while len(outside):
            result[outside] = self._encrypt(result[outside])
            outside = outside[result[outside] >= np.uint64(self.n)]
        return result.astype(np.int64)

    def _encrypt(self, values: U64) -> U64:
        shift, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = values >> shift, values & mask
        counters = np.zeros((len(values), 4), np.uint64)
        for number in range(8):
            counters[:, 0], counters[:, 2] = right, number
            left, right = right, left ^ (philox4x32(counters, self._key)[:, 0].astype(np.uint64) & mask)
        return (left << shift) | right
