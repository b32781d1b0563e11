"""What a pool has in common with other sets: images to keep away from it, or such as are kept already.

N images of the pool.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...features.search.neighbors import SearchSettings, nearest, similarities
from ...store.vectors import Float64, Int64, Vectors
from ..inputs import EmbeddedImages
from .identical import first_in
from .verify import SecondLook

SAME_IMAGE = 0.999  # chosen: the same bytes embedded twice, in other batches or on another device, stay above it

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Matches:
    """The image of the other sets that every image is like."""

    part: Int64  # (N,) which set; -1: there is none
    index: Int64  # (N,) position in that set
    similarity: Float64  # (N,) cosine to it; 1 where only keys were compared
    identical: Bools  # (N,) both have the same key
    itself: Bools  # (N,) the image itself is like it, not only another of its group
    recall: float = 1.0  # share of the nearest that the search found


def image_ids(images: EmbeddedImages, indices: Int64 | None = None) -> Iterator[pa.ChunkedArray]:
    """Yield the ids of the images at `indices` (R,), which must rise, in pieces."""
    for table in images.batches(["image_id"], indices):
        yield table.column(0)


def same_keys(
    keys: Callable[[], Iterable[pa.ChunkedArray]],
    num: int,
    others: Sequence[Iterable[pa.ChunkedArray]],
    memory: int | None,
) -> Matches:
    """Find for every one of `num` images the first other one with the same key, set after set.

    `keys` yields the images' keys from the start whenever it is called.
    """
    part, index = np.full(num, -1), np.full(num, -1)
    for number, other in enumerate(others):
        place = first_in(keys(), num, other, memory)
        rows = np.flatnonzero((place >= 0) & (part < 0))
        part[rows], index[rows] = number, place[rows]
    found = part >= 0
    return Matches(part, index, np.where(found, 1.0, -np.inf), found, found)


def matches(
    images: EmbeddedImages,
    indices: Int64,
    others: list[EmbeddedImages],
    threshold: float,
    search: SearchSettings,
    look: SecondLook | None = None,
) -> Matches:
    """Find for the images at `indices` (N,), rising, one of the same bytes, else the nearest above `threshold`.

    With a second look, the nearest that is a copy by its pixels, of some.
    """
    ids = [image_ids(other) for other in others]
    same = same_keys(lambda: image_ids(images, indices), len(indices), ids, search.memory)
    part, index, similarity, recall = same.part.copy(), same.index.copy(), same.similarity.copy(), 1.0
    identical = same.identical.copy()
    vectors = images.vectors.take(indices)
    for number, other in enumerate(others):
        mine = np.flatnonzero(same.part == number)
        unlike = mine[~are_same(vectors, mine, other.vectors, index[mine])]
        similarity[mine] = similarities(vectors, mine, other.vectors, index[mine])
        part[unlike], index[unlike], similarity[unlike], identical[unlike] = -1, -1, -np.inf, False
    for number, other in enumerate(others):
        near = nearest(
            vectors,
            other.vectors,
            1 if look is None else look.k,
            order=other.order,
            above=threshold,
            search=search,
            progress=f"comparing with {other.source.manifest.path.name}",
        )
        recall = min(recall, near.recall)
        best = np.zeros(len(vectors), np.int64)  # of the nearest
        nearness = near.similarities
        if look is not None:
            query, column = np.nonzero((near.indices >= 0) & ~identical[:, None])
            others_near, cosines = near.indices[query, column], nearness[query, column]
            is_copy = look.copies(images, indices[query], other, others_near, cosines, column < look.k_near)
            nearness = np.full(nearness.shape, -np.inf)
            nearness[query[is_copy], column[is_copy]] = near.similarities[query[is_copy], column[is_copy]]
            best = nearness.argmax(axis=1)
        rows = np.arange(len(vectors))
        better = np.flatnonzero(~identical & (nearness[rows, best] > similarity))
        part[better], index[better] = number, near.indices[better, best[better]]
        similarity[better] = nearness[better, best[better]]
    return Matches(part, index, similarity, identical, part >= 0, recall)


def are_same(vectors: Vectors, positions: Int64, others: Vectors, other_positions: Int64) -> Bools:
    """Tell of pairs with the same id (P,) whether they are the same image by their vectors too, (P,).

    An id of other origin may name a whole slide of which the rows are tiles, or be counted anew in every set.
    """
    is_same: Bools = similarities(vectors, positions, others, other_positions) > SAME_IMAGE
    of_one = similarities(vectors, positions, vectors, positions)
    of_other = similarities(others, other_positions, others, other_positions)
    is_same |= (of_one == 0) & (of_other == 0)  # zero vectors are like nothing, not even one another
    return is_same


def with_their_groups(
    found: Matches, labels: Int64, images: EmbeddedImages, indices: Int64, others: list[EmbeddedImages]
) -> Matches:
    """Extend matches to whole groups, `labels` (N,): the others of a group go for the match of its most similar one."""
    members = np.flatnonzero(found.itself)
    order = images.order[indices[members]]
    ranked = members[np.lexsort((order, -found.similarity[members], labels[members]))]
    groups, first = np.unique(labels[ranked], return_index=True)
    drawn = np.flatnonzero(~found.itself & np.isin(labels, groups))
    leaders = ranked[first[np.searchsorted(groups, labels[drawn])]]
    part, index, similarity = found.part.copy(), found.index.copy(), found.similarity.copy()
    part[drawn], index[drawn] = found.part[leaders], found.index[leaders]
    for number, other in enumerate(others):
        rows = drawn[part[drawn] == number]
        similarity[rows] = similarities(images.vectors, indices[rows], other.vectors, index[rows])
    return replace(found, part=part, index=index, similarity=similarity)
