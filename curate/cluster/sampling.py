"""Balanced samples from a hierarchy of clusters: every branch gives the same number of images, as far as it has them.

N images, C clusters of a level, P parents of them, K_l clusters at level l; level 0 is the finest.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...features.grouping import group_by
from ...store.vectors import Float64, Int32, Int64

Keys = npt.NDArray[np.uint64]

MIN_WEIGHT = 1e-12  # relative to the largest


def balanced_sample(
    assignments: Sequence[Int64 | Int32],
    num_images: int,
    preference: Sequence[npt.NDArray[np.number]],
    seed: int,
    *,
    is_proportional: bool = False,
) -> Int64:
    """Return the positions of exactly `num_images` images, rising, allocated from the coarsest clusters down.

    Args:
        assignments: for level 0 the cluster of every image, (N,); for level l that of every cluster of level l - 1,
            (K_{l-1},).
        num_images: at most N.
        preference: (N,) each; a finest cluster gives the images with the lowest of the first, of ties the second, ...
        seed: decides which clusters give one more where numbers do not divide evenly.
        is_proportional: whether clusters give in proportion to their sizes, instead of equally.

    Source: section 3.4 of Vo et al. 2024 (Automatic Data Curation for Self-Supervised Learning).
    """
    num_clusters = [*(len(parents) for parents in assignments[1:]), int(assignments[-1].max()) + 1]
    sizes = [np.bincount(assignments[0], minlength=num_clusters[0])]  # images a cluster, level by level
    for parents, count in zip(assignments[1:], num_clusters[1:], strict=True):
        sizes.append(np.bincount(parents, sizes[-1], count).astype(np.int64))
    counts = np.array([num_images])
    parents = np.zeros(num_clusters[-1], np.int64)
    for level in reversed(range(len(assignments))):
        keys = seeded_keys(num_clusters[level], seed, level + 1)
        weights = sizes[level].astype(np.float64) if is_proportional else None
        counts = allocate(sizes[level], counts, keys, parents=parents, weights=weights)
        parents = assignments[level]
    ranks = group_by(assignments[0], num_clusters[0], *preference).ranks()
    return np.flatnonzero(ranks < counts[assignments[0]])


def allocate(
    sizes: Int64, totals: Int64, keys: Keys, *, parents: Int64 | Int32 | None = None, weights: Float64 | None = None
) -> Int64:
    """Return how many to take of each cluster, (C,), so that the children of every parent add up to its total.

    A child gives c times its weight, or its size where that is less; each parent has the c by which its children add
    up. Rounding down leaves some over: they go, one each, to the largest remainders, of ties to the largest clusters,
    then to the lowest keys. With equal weights this is water filling, the max-min fair allocation. With weights equal
    to the sizes, no cluster gives less than a smaller one.

    Args:
        sizes: (C,) the most that each may give.
        totals: (P,) at most the sum of a parent's sizes.
        keys: (C,) different numbers, which break ties.
        parents: (C,) the parent of each; None: one parent of all.
        weights: (C,) not negative; None: all equal. A cluster without weight gives only what the others cannot.
    """
    parents = np.zeros(len(sizes), np.int64) if parents is None else parents
    if weights is None or not weights.any():
        weights = np.ones(len(sizes))
    weights = np.maximum(weights, MIN_WEIGHT * weights.max(initial=0))
    available = np.bincount(parents, sizes, len(totals))
    if (totals > available).any():
        short = int(np.argmax(totals > available))
        raise ValueError(f"a total of {totals[short]} of {int(available[short])}")

    # Children in the order in which a rising c exhausts them. Size and key come in so that sums repeat.
    groups = group_by(parents, len(totals), sizes / weights, sizes, keys)
    size, weight, parent = sizes[groups.rows], weights[groups.rows], parents[groups.rows]
    starts, ends = groups.offsets[parent], groups.offsets[parent + 1]
    sums = np.append(0.0, np.cumsum(size, dtype=np.float64))
    size_before = sums[:-1] - sums[starts]  # of the parent's children before each
    sums = np.append(np.cumsum(weight[::-1])[::-1], 0.0)
    weight_from = sums[:-1] - sums[ends]  # of each and the parent's children behind it
    is_exhausted = (totals[parent] - size_before) * weight >= size * weight_from
    is_open = (~is_exhausted).astype(np.float64)
    left = totals - np.bincount(parent, size * is_exhausted, len(totals))
    level = left / np.maximum(np.bincount(parent, weight * is_open, len(totals)), np.finfo(float).tiny)

    share = np.where(is_exhausted, size, level[parent] * weight)
    counts = np.minimum(np.floor(share).astype(np.int64), size)
    num_over = totals - np.bincount(parent, counts, len(totals)).astype(np.int64)
    remainder = np.where(counts < size, share - counts, -1.0)
    ranks = group_by(parent, len(totals), -remainder, -size, keys[groups.rows]).ranks()
    counts[ranks < num_over[parent]] += 1
    result = np.empty(len(sizes), np.int64)
    result[groups.rows] = counts
    return result


def seeded_keys(num: int, seed: int, purpose: int) -> Keys:
    """Return a random number for each of 0..num-1 that depends on (seed, purpose) and the number alone.

    No two are equal. It is the output function of SplitMix64 (Steele et al. 2014): a library that changes its random
    generators changes no manifest.
    """
    step, mask = 0x9E3779B97F4A7C15, 2**64 - 1
    start = _mixed(np.array([(seed * step + purpose) & mask], np.uint64))
    return _mixed(start + np.arange(1, num + 1, dtype=np.uint64) * np.uint64(step))


def _mixed(numbers: Keys) -> Keys:
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
