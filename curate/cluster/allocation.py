"""How many images to take of each cluster, so that they add up exactly and no cluster gives more than it has.

C clusters, P parents of them.
"""

import re

import numpy as np
import numpy.typing as npt

from ...errors import ToolkitError
from ...store.vectors import Float64, Int64

Keys = npt.NDArray[np.uint64]
Int32 = npt.NDArray[np.int32]

LEAST_WEIGHT = 1e-12  # relative to the largest
POWERS = {"water": 0.0, "flat": 0.0, "proportional": 1.0}  # flat: the finest clusters alone


def parse_allocation(text: str) -> float:
    """Return the power of cluster sizes by which images are shared out: water and flat 0, power:A A, proportional 1.

    Raises ToolkitError when it is none of these.
    """
    if text in POWERS:
        return POWERS[text]
    match = re.fullmatch(r"power:(\d*\.?\d+)", text)
    if match is None or not 0 <= float(match[1]) <= 1:
        raise ToolkitError(
            f"--allocation {text} is none; give water, flat, proportional, or power:A with A from 0 to 1"
        )
    return float(match[1])


def allocate(
    sizes: Int64, wanted: Int64, keys: Keys, *, parents: Int64 | Int32 | None = None, weights: Float64 | None = None
) -> Int64:
    """Return how many to take of each cluster, (C,): of every parent's children exactly what is wanted of it.

    A child gets c times its weight, or its size where that is less; c is the parent's own, such that all add up. What
    is left over by rounding down goes, one each, to the largest remainders, of ties to the largest clusters, then to
    the lowest keys. With equal weights this is water filling, the max-min fair allocation; with weights that are the
    sizes to a power from 0 to 1, no cluster gives less than a smaller one.

    Args:
        sizes: (C,) the most that each may give.
        wanted: (P,) at most the sum of a parent's sizes.
        keys: (C,) different numbers that settle who gets the odd ones.
        parents: (C,) the parent of each; one parent of all where left out.
        weights: (C,) not negative; all alike where left out. What has none gives only what the others cannot.
    """
    parents = np.zeros(len(sizes), np.int64) if parents is None else parents
    if weights is None or not weights.any():
        weights = np.ones(len(sizes))
    weights = np.maximum(weights, LEAST_WEIGHT * weights.max(initial=0))
    totals = np.bincount(parents, sizes, len(wanted))
    if (wanted > totals).any():
        poor = int(np.argmax(wanted > totals))
        raise ValueError(f"{wanted[poor]} wanted of {int(totals[poor])}")

    # By the c at which a child is exhausted: when one is, so are all before it. Size and key make sums repeat.
    by = np.lexsort((keys, sizes, sizes / weights, parents))
    size, weight, parent = sizes[by], weights[by], parents[by]
    ends = np.searchsorted(parent, np.arange(len(wanted)), side="right")
    starts: Int64 = np.append(0, ends[:-1])
    given_before = _running(size.astype(np.float64), starts, parent)
    weight_from = _running(weight[::-1], len(by) - ends[::-1], len(wanted) - 1 - parent[::-1])[::-1] + weight
    is_exhausted = (wanted[parent] - given_before) * weight >= size * weight_from
    is_open = (~is_exhausted).astype(np.float64)
    left = wanted - np.bincount(parent, size * is_exhausted, len(wanted))
    level = left / np.maximum(np.bincount(parent, weight * is_open, len(wanted)), np.finfo(float).tiny)

    share = np.where(is_exhausted, size, level[parent] * weight)
    counts = np.minimum(np.floor(share).astype(np.int64), size)
    odd = wanted - np.bincount(parent, counts, len(wanted)).astype(np.int64)
    remainder = np.where(counts < size, share - counts, -1.0)
    ranked = np.lexsort((keys[by], -size, -remainder, parent))
    place = np.arange(len(ranked)) - starts[parent]  # 0 for a parent's largest remainder
    counts[ranked[place < odd[parent]]] += 1
    result = np.empty(len(sizes), np.int64)
    result[by] = counts
    return result


def _running(values: Float64, starts: Int64, parent: Int64 | Int32) -> Float64:
    """Return the sum of what stands before each value among those of its parent, (C,); parents stand together."""
    sums = np.append(0.0, np.cumsum(values))
    before: Float64 = sums[:-1] - sums[starts[parent]]
    return before
