"""Balanced sampling from a hierarchy of clusters: every branch gives the same, as far as it has so much.

N images, K_l clusters at level l; level 0 is the finest.
"""

from collections.abc import Sequence

import numpy as np

from ...store.vectors import Int64
from .allocation import Int32, Keys, allocate


def balanced_sample(
    levels: Sequence[Int64 | Int32], num_wanted: int, preference: Int64 | Keys, seed: int, power: float = 0.0
) -> Int64:
    """Return the positions of exactly `num_wanted` images, ascending, shared out from the coarsest clusters down.

    Args:
        levels: for level 0 the finest cluster of every image, (N,); for level l the cluster of every cluster of level
            l - 1, (K_{l-1},).
        num_wanted: at most N.
        preference: (N,) of a finest cluster's images the lowest are taken; it has no ties.
        seed: of whom gets the odd ones.
        power: clusters share in proportion to their sizes to this power: 0 alike, 1 as they are.

    Source: section 3.4 of Vo et al. 2024 (Automatic Data Curation for Self-Supervised Learning), which is power 0.
    """
    num_clusters = [*(len(parents) for parents in levels[1:]), int(levels[-1].max()) + 1]
    sizes = [np.bincount(levels[0], minlength=num_clusters[0])]  # images a cluster, level by level
    for parents, count in zip(levels[1:], num_clusters[1:], strict=True):
        sizes.append(np.bincount(parents, sizes[-1], count).astype(np.int64))
    counts = np.array([num_wanted])
    of_all: Int64 | Int32 = np.zeros(num_clusters[-1], np.int64)
    for level in range(len(levels) - 1, -1, -1):
        keys = seeded_keys(num_clusters[level], seed, level + 1)
        counts = allocate(sizes[level], counts, keys, parents=of_all, weights=sizes[level].astype(float) ** power)
        of_all = levels[level]
    ranked = np.lexsort((preference, levels[0]))
    cluster = levels[0][ranked]
    place = np.arange(len(ranked)) - (np.cumsum(sizes[0]) - sizes[0])[cluster]  # 0 for a cluster's first choice
    return np.sort(ranked[place < counts[cluster]])


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
