"""Counter-based random numbers: a pure function of (seed, purpose, sample), whatever the workers and processes.

A sample is an index, counted from 0 over a whole run; its random numbers are a hash of that index. So a resumed run
needs only the number of samples seen, and several processes agree without communication. The hash is splitmix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): one generator per (seed, purpose,
sample), read at position `slot`.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, the increment of splitmix64
FEISTEL_ROUNDS = 8  # 4 suffice for a strong round function; more cost little and help very small lengths


def hashed(seed: int, purpose: str, samples: ArrayLike, slots: int) -> NDArray[np.uint64]:
    """Return 64 random bits for each sample and slot.

    Args:
        purpose: what the numbers are for ("crops", "order", ...), so that two uses never share them.
        samples: non-negative integers of any shape.
        slots: how many numbers each sample needs.

    Returns:
        uint64 of shape `samples.shape + (slots,)`; the first slots do not depend on how many are asked for.
    """
    stream = np.uint64(int.from_bytes(blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little"))
    counters = np.asarray(samples).astype(np.uint64)[..., None]
    states = _mix(stream + (counters + np.uint64(1)) * GOLDEN)
    return _mix(states + np.arange(1, slots + 1, dtype=np.uint64) * GOLDEN)


def uniform(seed: int, purpose: str, samples: ArrayLike, slots: int) -> NDArray[np.float64]:
    """Return float64 in [0, 1), shape `samples.shape + (slots,)`; arguments as in `hashed`."""
    return (hashed(seed, purpose, samples, slots) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """Return a seed in [0, 2^63) for a `torch.Generator` used for one purpose at one step (or on one process)."""
    return int(hashed(seed, purpose, index, 1)[0] >> np.uint64(1))


def permuted(seed: int, purpose: str, rounds: ArrayLike, positions: ArrayLike, length: int) -> NDArray[np.int64]:
    """Return the images of positions under a random permutation of 0..length-1, which is never stored.

    A Feistel network over the next power of four, repeated for values outside (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains").

    Args:
        rounds: which permutation, such as the pass over the data; broadcast against `positions`.
        positions: integers in [0, length).
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))  # bits of each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds, positions = np.broadcast_arrays(np.asarray(rounds), np.asarray(positions))
    keys = hashed(seed, purpose, rounds.ravel(), FEISTEL_ROUNDS)
    values = positions.ravel().astype(np.uint64)
    outside = np.arange(values.size)
    while outside.size:
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys[outside].T:
            left, right = right, left ^ (_mix(key + right * GOLDEN) & mask)
        values[outside] = (left << half) | right
        outside = outside[values[outside] >= length]
    return values.astype(np.int64).reshape(positions.shape)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of splitmix64, a bijection of 64 bits in which every bit depends on every other."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
