"""Groups of near-duplicates, and the one of each that stays.

N images, M distinct vectors, B vectors of a block, E pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...features.search.exact_search import DEFAULTS, Identity, SearchSettings
from ...features.search.graph import Graph
from ...features.search.join import components_above
from ...features.search.neighbors import nearest
from ...features.search.products import tile_above, unit_rows
from ...features.search.similarity import similarities
from ...store.vectors import Float64, Int64, Vectors

Linkage = Literal["components", "star"]
Bools = npt.NDArray[np.bool_]
AreCopies = Callable[[Int64, Int64, Float64, Bools], Bools]  # rows, rows, their cosines, who is near (E,)

BLOCK_ROWS = 2_048  # rows of a star compared at a time
LOOKED_AT_TOGETHER = 1 << 19  # rows whose neighbours are sought at a time: of 24 each, a gigabyte of pairs
KEPT_TILE = 8_192  # those that stay, compared with them at a time


@dataclass(frozen=True)
class Groups:
    """Which images show the same, and which one of each group stays."""

    labels: Int64  # (N,) the group of every image, named by its smallest row
    kept: Int64  # (N,) row of the image that stays for each one's group; itself where it stays
    weakest: Float64  # (N,) lowest similarity of any of the group's images to the one that stays; 1 where it is alone
    num_saturated: int  # images with at least k others above the threshold
    recall: float  # share of the pairs above the threshold that the search found; 1: exact


def duplicate_groups(
    vectors: Vectors,
    first: Int64,
    threshold: float,
    k: int,
    *,
    linkage: Linkage = "components",
    priority: Int64,
    search: SearchSettings = DEFAULTS,
    are_copies: AreCopies | None = None,
    k_near: int | None = None,
) -> Groups:
    """Group images with a similarity above `threshold`, and choose the one of each group that stays.

    `components`: images above the threshold belong together, and so do theirs; the one of lowest priority stays.
    `star`: images are gone through by priority, and one stays where none that stays is above the threshold to it;
    each of the others belongs to the first that stays above the threshold to it. So no two that stay are above the
    threshold, and every other is above it to the one that stays.

    Args:
        first: (N,) for every vector the first row with the same numbers; copies are searched once.
        priority: (N,) a permutation, lower is preferred.
        k: an image with k or more others above the threshold counts as saturated; its neighbours are counted no
            further, and it changes nothing else.
        are_copies: where given, only pairs above the threshold for which it says so belong together, of every image
            and the k nearest to it; an image is saturated where all that are near are copies, and what stays for such
            is compared again.
        k_near: how many of the k nearest are near; None: all.
    """
    rows = np.arange(len(first))
    first = _of_their_own(vectors, first, threshold)
    distinct = np.flatnonzero(first == rows)  # (M,)
    number = np.searchsorted(distinct, first)  # (N,) places in `distinct`
    num_copies = np.bincount(number, minlength=len(distinct))
    by_priority = np.empty(len(first), np.int64)
    by_priority[priority] = rows
    best = np.full(len(distinct), len(first))  # (M,) the priority of the preferred copy
    np.minimum.at(best, number, priority)

    searched = vectors.take(distinct)
    if are_copies is not None:

        def look(left: Int64, right: Int64, cosines: Float64, are_near: Bools) -> Bools:
            return are_copies(distinct[left], distinct[right], cosines, are_near)

        k_near = k if k_near is None else min(k, k_near)
        looked = copies_above(searched, best, threshold, k, k_near, linkage, search, look)
        stays, is_saturated, recall = looked.stays, looked.degree >= k_near, looked.recall
    else:
        joined = components_above(searched, threshold, weights=num_copies, enough=k, search=search)
        labels, is_saturated, recall = joined.labels, joined.degree >= k, joined.recall
        stays = star(searched, labels, best, threshold) if linkage == "star" else _preferred(labels, best)
    kept = by_priority[best[stays]][number]
    smallest = np.full(len(first), len(first))  # at the place of the one that stays
    np.minimum.at(smallest, kept, rows)
    num_saturated = int(num_copies[is_saturated].sum())
    return Groups(smallest[kept], kept, _weakest(vectors, kept), num_saturated, recall)


@dataclass(frozen=True)
class Looked:
    """What stays of vectors of which some pairs are copies."""

    stays: Int64  # (M,) the one that stays for every vector, itself where it stays
    degree: Int64  # (M,) how many of the nearest are copies, `k_near` at most
    recall: float


def copies_above(
    vectors: Vectors,
    priority: Int64,
    threshold: float,
    k: int,
    k_near: int,
    linkage: Linkage,
    search: SearchSettings,
    are_copies: AreCopies,
) -> Looked:
    """Return what stays when of every vector (M,) and the k nearest to it above the threshold the copies go.

    Where all of the `k_near` nearest are copies there may be more: what stays of such groups is compared with what
    stays of the others, until no more copies are found.
    """
    num = len(vectors)
    graph = Graph(np.ones(num, np.int64), num)
    degree, recall = np.zeros(num, np.int64), 1.0
    queries = pool = np.arange(num)
    seen = seen_near = copies = np.empty(0, np.int64)  # pairs, as one number each
    while True:
        num_before = len(copies)
        for start in range(0, len(queries), LOOKED_AT_TOGETHER):
            some = queries[start : start + LOOKED_AT_TOGETHER]
            near = nearest(
                vectors.take(some),
                vectors.take(pool),
                k,
                order=priority[pool],
                identity=Identity(some, pool),
                above=threshold,
                search=search,
            )
            recall = min(recall, near.recall)
            query, column = np.nonzero(near.indices >= 0)
            one, other = some[query], pool[near.indices[query, column]]
            pairs = np.minimum(one, other) * num + np.maximum(one, other)
            is_near = column < k_near
            keys, place, number = np.unique(pairs, return_index=True, return_inverse=True)
            are_near = np.bincount(number[is_near], minlength=len(keys)) > 0  # from either side
            is_new = np.isin(keys, seen, invert=True) | (are_near & np.isin(keys, seen_near, invert=True))
            is_new &= np.isin(keys, copies, invert=True)
            new, place, are_near = keys[is_new], place[is_new], are_near[is_new]
            is_copy = are_copies(*np.divmod(new, num), near.similarities[query, column][place], are_near)
            graph.add(*np.divmod(new[is_copy], num))
            seen, seen_near = np.concatenate([seen, new]), np.concatenate([seen_near, new[are_near]])
            copies = np.concatenate([copies, new[is_copy]])
            num_copies = np.bincount(query[is_near & np.isin(pairs, copies)], minlength=len(some))
            degree[some] = np.maximum(degree[some], num_copies)
        labels = graph.components()
        stays = _preferred(labels, priority)
        if linkage == "star":
            stays = _star_of_pairs(*np.divmod(copies, num), priority)
        heads = np.flatnonzero(stays == np.arange(num))
        full = heads[np.isin(labels[heads], labels[degree >= k_near])]
        if len(copies) == num_before or not len(full):
            return Looked(stays, degree, recall)
        queries, pool = full, heads


def _preferred(labels: Int64, priority: Int64) -> Int64:
    """Return for every vector the preferred one of its component (M,), of labels that name one of the component's."""
    by_priority = np.argsort(priority)
    preferred = np.empty(len(labels), np.int64)
    preferred[labels[by_priority[::-1]]] = by_priority[::-1]  # the preferred one is written last
    return preferred[labels]


def _star_of_pairs(left: Int64, right: Int64, priority: Int64) -> Int64:
    """Return for every vector the one that stays for it (M,), of pairs that are copies; as `star` does."""
    by_priority = np.argsort(priority)
    rank = np.empty(len(priority), np.int64)
    rank[by_priority] = np.arange(len(priority))
    one, other = np.minimum(rank[left], rank[right]), np.maximum(rank[left], rank[right])
    stays = np.empty(len(priority), np.int64)
    stays[by_priority] = by_priority[first_independent(len(priority), one, other)]
    return stays


def _of_their_own(vectors: Vectors, first: Int64, threshold: float) -> Int64:
    """Return `first` with copies that are not above the threshold to each other as their own first.

    These are zero vectors, similar to nothing, and all vectors where the threshold is 1.
    """
    copies = np.flatnonzero(first != np.arange(len(first)))
    originals = np.unique(first[copies])
    unlike = originals[similarities(vectors, originals, vectors, originals) <= threshold]
    alone = copies[np.isin(first[copies], unlike)]
    if len(alone):
        first = first.copy()
        first[alone] = alone
    return first


def _weakest(vectors: Vectors, kept: Int64) -> Float64:
    """Return the lowest similarity of each image's group to the one that stays, (N,)."""
    weakest = np.ones(len(kept))
    others = np.flatnonzero(kept != np.arange(len(kept)))
    np.minimum.at(weakest, kept[others], similarities(vectors, others, vectors, kept[others]))
    return weakest[kept]


def star(vectors: Vectors, labels: Int64, priority: Int64, threshold: float) -> Int64:
    """Return for every vector the one that stays for it, (M,), itself where it stays.

    The one answer in which a vector stays exactly where no preferred one that stays is above the threshold to it.
    It is found component by component, each gone through by priority: what is above the threshold to one that stays
    is compared with no other, so a crowd costs its size times how many of it stay.

    Args:
        labels: (M,) components of the graph of similarities above the threshold.
    """
    stays = np.arange(len(labels))
    sizes = np.bincount(labels, minlength=len(labels))
    members = np.flatnonzero(sizes[labels] > 1)
    members = members[np.lexsort((priority[members], labels[members]))]
    size = sizes[labels[members]]
    pairs = members[size == 2].reshape(-1, 2)
    stays[pairs[:, 1]] = pairs[:, 0]  # of two that hang together one goes
    for block, is_one_component in _blocks(members[size > 2], labels):
        if is_one_component:
            _star_of_component(vectors, block, threshold, stays)
            continue
        one, other = _pairs(vectors, block, block, threshold)
        near = (one < other) & (labels[block[one]] == labels[block[other]])
        stays[block] = block[first_independent(len(block), one[near], other[near])]
    return stays


def _blocks(members: Int64, labels: Int64) -> Iterator[tuple[Int64, bool]]:
    """Yield members by whole components: a large one by itself, small ones together."""
    starts = np.flatnonzero(np.diff(labels[members], prepend=-1))
    bounds = np.append(starts, len(members)).tolist()
    start = 0
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        if last - start > BLOCK_ROWS and first > start:
            yield members[start:first], False
            start = first
        if last - start > BLOCK_ROWS:
            yield members[start:last], True
            start = last
    if start < len(members):
        yield members[start:], False


def _star_of_component(vectors: Vectors, members: Int64, threshold: float, stays: Int64) -> None:
    """Write to `stays` what stays for each of a component's members, which come by priority."""
    kept = np.empty(0, np.int64)
    for start in range(0, len(members), BLOCK_ROWS):
        block = members[start : start + BLOCK_ROWS]
        for tile in range(0, len(kept), KEPT_TILE):
            some = kept[tile : tile + KEPT_TILE]
            one, other = _pairs(vectors, block, some, threshold)
            goes, first = np.unique(one, return_index=True)  # pairs come by the block's rows, then by priority
            stays[block[goes]] = some[other[first]]
            block = np.delete(block, goes)
        one, other = _pairs(vectors, block, block, threshold)
        near = one < other
        stays[block] = block[first_independent(len(block), one[near], other[near])]
        kept = np.append(kept, block[stays[block] == block])


def _pairs(vectors: Vectors, left: Int64, right: Int64, threshold: float) -> tuple[Int64, Int64]:
    rows = (unit_rows(vectors.array[vectors.rows[side]]) for side in (left, right))
    return tile_above(next(rows), left, next(rows), right, vectors, threshold)


def first_independent(num: int, left: Int64, right: Int64) -> Int64:
    """Return for each of `num` vertices that come by priority the one that stays for it, (num,).

    A vertex stays where it is the right end of no edge whose left end stays; else it belongs to the first such.

    Args:
        left: (E,) the preferred end of every edge, smaller than that at its place in `right`.
    """
    undecided, stays, gone = 0, 1, 2
    state = np.full(num, undecided)
    one, other = left, right
    while (state == undecided).any():
        blocked = np.zeros(num, bool)
        blocked[other] = True
        state[(state == undecided) & ~blocked] = stays
        goes = other[state[one] == stays]
        state[goes] = gone
        open_ends = (state[one] == undecided) & (state[other] == undecided)
        one, other = one[open_ends], other[open_ends]
    of = np.arange(num)
    decisive = state[left] == stays
    of[right[decisive]] = num
    np.minimum.at(of, right[decisive], left[decisive])
    return of
