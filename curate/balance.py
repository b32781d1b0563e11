"""Balanced sampling from a hierarchy of clusters: every branch gives the same, as far as it has so much.

N images, K_l clusters at level l; level 0 is the finest.
"""

import numpy as np
import numpy.typing as npt

from ..store.vectors import Int64

Keys = npt.NDArray[np.uint64]


def balanced_sample(levels: list[Int64], num_wanted: int, preference: Int64 | Keys, seed: int) -> Int64:
    """Return the positions of exactly `num_wanted` images, ascending, shared out from the coarsest clusters down.

    Args:
        levels: for level 0 the finest cluster of every image, (N,); for level l the cluster of every cluster of level
            l - 1, (K_{l-1},).
        num_wanted: at most N.
        preference: (N,) of a finest cluster's images the lowest are taken; it has no ties.
        seed: of whom gets the odd ones.

    Source: section 3.4 of Vo et al. 2024 (Automatic Data Curation for Self-Supervised Learning).
    """
    num_clusters = [*(len(parents) for parents in levels[1:]), int(levels[-1].max()) + 1]
    sizes = [np.bincount(levels[0], minlength=num_clusters[0])]  # images a cluster, level by level
    for parents, count in zip(levels[1:], num_clusters[1:], strict=True):
        sizes.append(np.bincount(parents, sizes[-1], count).astype(np.int64))
    counts = water_fill(sizes[-1], num_wanted, seeded_keys(len(sizes[-1]), seed, len(levels)))
    for level in range(len(levels) - 1, 0, -1):
        keys = seeded_keys(len(sizes[level - 1]), seed, level)
        finer = np.zeros_like(sizes[level - 1])
        by_parent = np.argsort(levels[level], kind="stable")
        ends = np.cumsum(np.bincount(levels[level], minlength=len(counts)))
        for parent, children in enumerate(np.split(by_parent, ends[:-1])):
            finer[children] = water_fill(sizes[level - 1][children], int(counts[parent]), keys[children])
        counts = finer
    ranked = np.lexsort((preference, levels[0]))
    cluster = levels[0][ranked]
    place = np.arange(len(ranked)) - np.searchsorted(cluster, cluster)  # 0 for a cluster's first choice
    return np.sort(ranked[place < counts[cluster]])


def water_fill(sizes: Int64, num_wanted: int, keys: Keys) -> Int64:
    """Return how many to take of each, (K,): at most `sizes`, in all `num_wanted`, shared as evenly as can be.

    Everyone gives up to a common level c, the largest with sum(min(c, sizes)) <= num_wanted; the odd ones come, one
    each, from those that have more, in the order of `keys` (K,).
    """
    if num_wanted > sizes.sum():
        raise ValueError(f"{num_wanted} wanted of {sizes.sum()}")
    low, high = 0, int(sizes.max(initial=0))
    while low < high:  # the largest level that is not too much
        middle = (low + high + 1) // 2
        if np.minimum(sizes, middle).sum() <= num_wanted:
            low = middle
        else:
            high = middle - 1
    counts = np.minimum(sizes, low)
    richer = np.flatnonzero(sizes > low)
    odd = num_wanted - int(counts.sum())
    counts[richer[np.argsort(keys[richer], kind="stable")][:odd]] += 1
    return counts


def seeded_keys(num: int, seed: int, purpose: int) -> Keys:
    """Return a random number for each of 0..num-1 that depends on (seed, purpose) and the number alone.

    No two are equal. It is the output function of SplitMix64 (Steele et al. 2014), so that a library's change of its
    generators changes no manifest.
    """
    step, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    start = _mixed(np.array([(seed * step + purpose) & mask], np.uint64))
    return _mixed(start + np.arange(1, num + 1, dtype=np.uint64) * np.uint64(step))


def _mixed(numbers: Keys) -> Keys:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def normalised_entropy(counts: Int64) -> float:
    """Return the entropy of counts (K,) over log K: 1 when all are equal, 0 when one has everything."""
    if len(counts) < 2:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))
