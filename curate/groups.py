"""Groups of near-duplicates: the connected components of the graph of similarities above a threshold.

N images, M distinct vectors, E edges.
"""

import numpy as np

from .. import console
from ..features.neighbors import candidates, similarities, tolerance
from ..store.vectors import Int64, Vectors

SWEEP_TILE = (2_048, 4_096)  # chosen: rows x columns of the products that link saturated rows


def duplicate_groups(vectors: Vectors, first: Int64, threshold: float, k: int) -> tuple[Int64, int]:
    """Return the group of every image, named by its smallest row, and how many images are saturated.

    Images with a similarity above `threshold` belong together, and so do theirs. An image is saturated when all its
    k nearest others are above the threshold: k neighbours then do not tell all, and it is compared with every image
    outside its group, so the result does not depend on k.

    Args:
        first: (N,) for every vector the first row with the same numbers; copies are searched once.
    """
    copies = np.flatnonzero(first != np.arange(len(first)))
    originals = np.unique(first[copies])
    unlike = originals[
        similarities(vectors, originals, vectors, originals) <= threshold
    ]  # zero vectors, or threshold 1
    first = np.where(np.isin(first, unlike), np.arange(len(first)), first)
    distinct, number, num_copies = np.unique(first, return_inverse=True, return_counts=True)
    searched = vectors.take(distinct)  # (M, D)

    left, right, open_ended = _edges(searched, threshold, k)
    degree = num_copies - 1 + np.bincount(left, num_copies[right], len(distinct)).astype(np.int64)
    degree += np.bincount(right, num_copies[left], len(distinct)).astype(np.int64)
    labels = connected(np.arange(len(distinct)), left, right)
    labels = _link_open_ended(searched, open_ended, labels, threshold)
    return distinct[labels][number], int(num_copies[degree >= k].sum())


def _edges(vectors: Vectors, threshold: float, k: int) -> tuple[Int64, Int64, Int64]:
    """Return the edges (E,), (E,) of the k-nearest-neighbour graph above the threshold, and rows that may have more."""
    error = tolerance(vectors.dim)
    num = min(k + 1, len(vectors))  # a row finds itself
    edges, open_ended = [], [np.empty(0, np.int64)]
    for start, found, approximate in candidates(vectors, vectors, num):
        rows = np.arange(start, start + len(found))
        left, column = np.nonzero((approximate > threshold - error) & (found != rows[:, None]))
        approximate_edges, left, right = approximate[left, column], rows[left], found[left, column]
        is_edge = approximate_edges > threshold + error
        unsure = np.flatnonzero(~is_edge)
        is_edge[unsure] = similarities(vectors, left[unsure], vectors, right[unsure]) > threshold
        left, right = left[is_edge], right[is_edge]
        edges.append(np.stack([np.minimum(left, right), np.maximum(left, right)], axis=1))
        if num < len(vectors):
            open_ended.append(rows[approximate[:, -1] > threshold - error])
    both = np.unique(np.concatenate(edges), axis=0)
    return both[:, 0], both[:, 1], np.concatenate(open_ended)


def connected(labels: Int64, left: Int64, right: Int64) -> Int64:
    """Return the labels after joining groups by the edges (E,), (E,): each group is named by its smallest member.

    `labels` (N,) names every row's group likewise. Hooks larger names to smaller ones and follows them, until no edge
    is between two groups.
    """
    labels = labels.copy()
    while True:
        low, high = np.minimum(labels[left], labels[right]), np.maximum(labels[left], labels[right])
        between = low != high
        if not between.any():
            return labels
        left, right = left[between], right[between]
        np.minimum.at(labels, high[between], low[between])
        while not np.array_equal(followed := labels[labels], labels):
            labels = followed


def _link_open_ended(vectors: Vectors, rows: Int64, labels: Int64, threshold: float) -> Int64:
    """Return the labels after comparing `rows` with every vector outside their group, tile by tile.

    Groups grow on the way and leave less to compare, so crowds of near-copies cost one pass and little memory.
    """
    error = tolerance(vectors.dim)
    num_rows, num_columns = SWEEP_TILE
    with console.progress("searching saturated images again", len(rows), "images") as advance:
        for start in range(0, len(rows), num_rows):
            block = rows[start : start + num_rows]
            block_vectors = vectors.take(block).unit(0, len(block))
            for column_start in range(0, len(vectors), num_columns):
                column_stop = min(column_start + num_columns, len(vectors))
                products = block_vectors @ vectors.unit(column_start, column_stop).T
                is_outside = labels[block][:, None] != labels[column_start:column_stop]
                row, column = np.nonzero((products > threshold - error) & is_outside)
                is_edge = products[row, column] > threshold + error
                unsure = np.flatnonzero(~is_edge)
                left, right = block[row], column + column_start
                is_edge[unsure] = similarities(vectors, left[unsure], vectors, right[unsure]) > threshold
                labels = connected(labels, left[is_edge], right[is_edge])
            advance(len(block))
    return labels
