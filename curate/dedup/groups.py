"""Groups of near-duplicates, and the image of each that is kept.

N images, M different vectors, B vectors of a block, E pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...features.search.exact_search import DEFAULTS, Identity, SearchSettings
from ...features.search.graph import Graph
from ...features.search.join import components_above
from ...features.search.neighbors import first_identical, nearest, similarities
from ...features.search.products import tile_above, unit_rows
from ...store.vectors import Bools, Float64, Int64, Vectors
from .representative import preferred
from .settings import Linkage

AreCopies = Callable[[Int64, Int64, Float64, Bools], Bools]  # rows, rows, cosines, whether to align contents: (E,) each

BLOCK_ROWS = 2_048  # rows of a star compared at a time
KEPT_TILE = 8_192  # kept ones that are compared with them at a time
SEARCHED_ROWS = 1 << 19  # whose neighbours are searched at a time: with 24 each, a gigabyte of pairs


@dataclass(frozen=True)
class DuplicateGroups:
    """Which images are duplicates of each other, and which one of each group is kept."""

    labels: Int64  # (N,) the group of every image, named by its smallest row
    kept: Int64  # (N,) row of the image that is kept of each one's group
    min_similarity_to_kept: Float64  # (N,) lowest in each one's group; 1 where it is alone
    num_saturated: int  # images with at least k others above the threshold
    recall: float  # measured share of the pairs above the threshold that the search found; 1: exact


def group_duplicates(
    vectors: Vectors,
    threshold: float,
    k: int,
    *,
    linkage: Linkage = "components",
    priority: Int64,
    search: SearchSettings = DEFAULTS,
    are_copies: AreCopies | None = None,
    num_aligned: int = 0,
) -> DuplicateGroups:
    """Group images with a similarity above `threshold`, and choose the one of each group that is kept.

    `components`: groups are connected components of the pairs above the threshold; the one of lowest priority is kept.
    `star`: in the order of priority, an image is kept if no kept one is above the threshold to it, else it belongs to
    the first such. So no two kept images are above the threshold, and every other is above it to the kept one.

    Args:
        priority: (N,) a permutation, lower is preferred.
        k: an image with k or more others above the threshold counts as saturated; its neighbours are counted no
            further, and it changes nothing else.
        are_copies: if given, only those pairs count, of an image and the k most similar above the threshold, which it
            calls copies. An image is saturated if all of its `num_aligned` nearest are copies.
        num_aligned: how many of the k nearest are to be aligned.
    """
    rows = np.arange(len(vectors))
    first = _first_similar_copy(vectors, threshold)
    distinct = np.flatnonzero(first == rows)  # (M,)
    number = np.searchsorted(distinct, first)  # (N,) places in `distinct`
    num_copies = np.bincount(number, minlength=len(distinct))
    best_copy = preferred(first, priority)[distinct]  # (M,)
    best = priority[best_copy]
    searched = vectors.take(distinct)
    if are_copies is not None:

        def verify(left: Int64, right: Int64, cosines: Float64, align: Bools) -> Bools:
            return are_copies(distinct[left], distinct[right], cosines, align)

        num_aligned = min(k, num_aligned)
        kept, degree, recall = group_copies(searched, best, threshold, k, num_aligned, linkage, search, verify)
        is_saturated = degree >= num_aligned
    else:
        joined = components_above(searched, threshold, weights=num_copies, enough=k, search=search)
        is_saturated, recall = joined.degree >= k, joined.recall
        kept = star(searched, joined.labels, best, threshold) if linkage == "star" else preferred(joined.labels, best)
    kept = best_copy[kept][number]  # (N,)
    min_similarity = np.ones(len(first))  # at the place of the kept one
    others = np.flatnonzero(kept != rows)
    np.minimum.at(min_similarity, kept[others], similarities(vectors, others, vectors, kept[others]))
    num_saturated = int(num_copies[is_saturated].sum())
    return DuplicateGroups(preferred(kept, rows), kept, min_similarity[kept], num_saturated, recall)


def _first_similar_copy(vectors: Vectors, threshold: float) -> Int64:
    """Return for every vector the first with the same numbers, (N,), if they are above the threshold to each other.

    Zero vectors are not, for they are similar to nothing, and no vectors are where the threshold is 1.
    """
    first = first_identical(vectors)
    copies = np.flatnonzero(first != np.arange(len(first)))
    alone = copies[similarities(vectors, copies, vectors, first[copies]) <= threshold]
    first[alone] = alone
    return first


def group_copies(
    vectors: Vectors,
    priority: Int64,
    threshold: float,
    k: int,
    num_aligned: int,
    linkage: Linkage,
    search: SearchSettings,
    are_copies: AreCopies,
) -> tuple[Int64, Int64, float]:
    """Group vectors (M,) by the copies among their k nearest neighbours above the threshold.

    Where all of the `num_aligned` nearest are copies there may be more: what is kept of such groups is compared with
    all that is kept, until no more copies are found.
    Returns the kept one for every vector (M,), how many of its nearest are copies (M,), `num_aligned` at most, and the
    recall of the search.
    """
    num = len(vectors)
    graph = Graph(np.ones(num, np.int64), num)
    degree, recall = np.zeros(num, np.int64), 1.0
    queries = pool = np.arange(num)
    seen = aligned = copies = np.empty(0, np.int64)  # pairs, as one number each
    while True:
        num_before = len(copies)
        for start in range(0, len(queries), SEARCHED_ROWS):
            some = queries[start : start + SEARCHED_ROWS]
            one, other, identity = vectors.take(some), vectors.take(pool), Identity(some, pool)
            near = nearest(one, other, k, order=priority[pool], identity=identity, above=threshold, search=search)
            recall = min(recall, near.recall)
            query, column = np.nonzero(near.indices >= 0)
            is_near = column < num_aligned
            keys, place, number, align = distinct_pairs(some[query], pool[near.indices[query, column]], num, is_near)
            is_new = np.isin(keys, seen, invert=True) | (align & np.isin(keys, aligned, invert=True))
            is_new &= np.isin(keys, copies, invert=True)
            new, place, align = keys[is_new], place[is_new], align[is_new]
            is_copy = are_copies(*np.divmod(new, num), near.similarities[query, column][place], align)
            graph.add(*np.divmod(new[is_copy], num))
            seen, aligned = np.concatenate([seen, new]), np.concatenate([aligned, new[align]])
            copies = np.concatenate([copies, new[is_copy]])
            num_copies = np.bincount(query[is_near & np.isin(keys, copies)[number]], minlength=len(some))
            degree[some] = np.maximum(degree[some], num_copies)
        labels = graph.components()
        kept = preferred(labels, priority)
        if linkage == "star":
            kept = _star_of_pairs(*np.divmod(copies, num), priority)
        heads = np.flatnonzero(kept == np.arange(num))
        full = heads[np.isin(labels[heads], labels[degree >= num_aligned])]
        if len(copies) == num_before or not len(full):
            return kept, degree, recall
        queries, pool = full, heads


def distinct_pairs(left: Int64, right: Int64, num: int, is_near: Bools) -> tuple[Int64, Int64, Int64, Bools]:
    """Return the different pairs among ordered pairs (E,) of `num` rows: four arrays.

    Each as one number, `smaller * num + larger`; the place in (E,) where each stands first; for every ordered pair
    (E,) which one it is; and for each whether it `is_near` (E,) in either order.
    """
    pairs = np.minimum(left, right) * num + np.maximum(left, right)
    keys, place, number = np.unique(pairs, return_index=True, return_inverse=True)
    return keys, place, number, np.bincount(number[is_near], minlength=len(keys)) > 0


def _star_of_pairs(left: Int64, right: Int64, priority: Int64) -> Int64:
    """Return for every vector the one that is kept for it (M,), from pairs that are copies; as `star` does."""
    by_priority = np.argsort(priority)
    rank = np.argsort(by_priority)
    one, other = np.minimum(rank[left], rank[right]), np.maximum(rank[left], rank[right])
    return by_priority[first_independent(len(priority), one, other)][rank]


def star(vectors: Vectors, labels: Int64, priority: Int64, threshold: float) -> Int64:
    """Return for every vector the one that is kept for it, (M,), itself where it is kept.

    There is one answer in which a vector is kept exactly where no preferred kept one is above the threshold to it.
    It is found component by component, each in the order of priority: what is above the threshold to a kept one is
    compared with no other, so a crowd costs its size times the number of kept ones.

    Args:
        labels: (M,) connected components of the pairs above the threshold.
    """
    result = np.arange(len(labels))
    sizes = np.bincount(labels, minlength=len(labels))
    members = np.flatnonzero(sizes[labels] > 1)
    members = members[np.lexsort((priority[members], labels[members]))]
    size = sizes[labels[members]]
    pairs = members[size == 2].reshape(-1, 2)
    result[pairs[:, 1]] = pairs[:, 0]  # these are above the threshold
    members = members[size > 2]
    kept = np.empty(0, np.int64)
    for start in range(0, len(members), BLOCK_ROWS):
        rows = members[start : start + BLOCK_ROWS]
        kept = kept[labels[kept] == labels[rows[0]]]  # of the component that goes on in this block
        for tile in range(0, len(kept), KEPT_TILE):
            some = kept[tile : tile + KEPT_TILE]
            one, other = _pairs_above(vectors, labels, rows, some, threshold)
            removed, first = np.unique(one, return_index=True)  # pairs come by row, then by priority
            result[rows[removed]] = some[other[first]]
            rows = np.delete(rows, removed)
        one, other = _pairs_above(vectors, labels, rows, rows, threshold)
        later = one < other
        result[rows] = rows[first_independent(len(rows), one[later], other[later])]
        kept = np.append(kept, rows[result[rows] == rows])
    return result


def _pairs_above(vectors: Vectors, labels: Int64, left: Int64, right: Int64, threshold: float) -> tuple[Int64, Int64]:
    """Return the pairs of places in `left` and in `right` whose rows are of one component and above the threshold."""
    rows = (unit_rows(vectors.array[vectors.rows[side]]) for side in (left, right))
    one, other = tile_above(next(rows), left, next(rows), right, vectors, threshold)
    together = labels[left[one]] == labels[right[other]]
    return one[together], other[together]


def first_independent(num: int, left: Int64, right: Int64) -> Int64:
    """Return for each of `num` vertices, which come by priority, the one that is kept for it, (num,).

    A vertex is kept if it is the right end of no edge whose left end is kept; else it belongs to the first such.

    Args:
        left: (E,) the preferred end of every edge, smaller than that at its place in `right`.
    """
    undecided, is_kept, is_removed = 0, 1, 2
    state = np.full(num, undecided)
    one, other = left, right
    while (state == undecided).any():
        blocked = np.zeros(num, bool)
        blocked[other] = True
        state[(state == undecided) & ~blocked] = is_kept
        state[other[state[one] == is_kept]] = is_removed
        is_open = (state[one] == undecided) & (state[other] == undecided)
        one, other = one[is_open], other[is_open]
    kept = np.arange(num)
    decisive = state[left] == is_kept
    kept[right[decisive]] = num
    np.minimum.at(kept, right[decisive], left[decisive])
    return kept
