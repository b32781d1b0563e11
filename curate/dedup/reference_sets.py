"""Duplicates between a pool and other sets: images kept earlier, or evaluation images to keep apart.

N images of the pool, M of the other sets.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...features.grouping import group_by
from ...features.search.neighbors import SearchSettings, nearest, similarities
from ...store.vectors import Bools, Float64, Int64, Vectors
from ..inputs import EmbeddedImages
from .image_keys import first_with_same_key, image_ids
from .verify import Pairs, Verifier

SAME_IMAGE = 0.999  # chosen: the same bytes embedded twice, in other batches or on another device, stay above it


@dataclass(frozen=True)
class ImageSets:
    """Several sets whose images are counted through, set after set."""

    sets: list[EmbeddedImages]

    @cached_property
    def starts(self) -> Int64:
        """The position of the first image of every set, and the number of all."""
        return np.cumsum([0, *map(len, self.sets)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def set_of(self, positions: Int64) -> Int64:
        """Return the number of the set for each position; -1 for -1."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def split(self, positions: Int64) -> Iterator[tuple[EmbeddedImages, Int64, Int64]]:
        """Yield for every set the places in `positions` that belong to it, and its indices there; -1 is skipped."""
        numbers = self.set_of(positions)
        for number, images in enumerate(self.sets):
            places = np.flatnonzero(numbers == number)
            yield images, places, positions[places] - self.starts[number]


@dataclass(frozen=True)
class Matches:
    """The duplicate of every image in other sets, (N,) each."""

    position: Int64  # in the sets; -1 where there is none
    similarity: Float64  # cosine to it, -inf where there is none
    same_bytes: Bools
    is_direct: Bools  # the image itself is the duplicate, not only another of its group
    recall: float  # measured share of the nearest neighbours that the search found


def find_matches(
    images: EmbeddedImages, others: ImageSets, threshold: float, search: SearchSettings, verifier: Verifier | None
) -> Matches:
    """Find for every image one with the same bytes, else the most similar above `threshold`.

    With a verifier it is the most similar verified copy instead.
    """
    vectors = images.vectors
    ids = [image_ids(other) for other in others.sets]
    position = first_with_same_key(image_ids(images), len(images), search.memory, ids)
    similarity, recall = np.full(len(images), -np.inf), 1.0
    for other, rows, theirs in others.split(position):
        is_same, cosines = are_same(vectors, rows, other.vectors, theirs)
        similarity[rows] = np.where(is_same, cosines, -np.inf)
        position[rows[~is_same]] = -1
    same_bytes = position >= 0
    for start, other in zip(others.starts.tolist(), others.sets, strict=False):
        k, progress = 1 if verifier is None else verifier.k, f"comparing with {other.source.manifest.path.name}"
        near = nearest(vectors, other.vectors, k, order=other.order, above=threshold, search=search, progress=progress)
        recall = min(recall, near.recall)
        cosines = near.similarities
        if verifier is not None:
            rows, column = np.nonzero((near.indices >= 0) & ~same_bytes[:, None])
            pairs = Pairs(images, rows, other, near.indices[rows, column], column < verifier.num_aligned)
            is_copy = verifier.are_copies(pairs, cosines[rows, column])
            cosines = np.full(cosines.shape, -np.inf)
            cosines[rows[is_copy], column[is_copy]] = near.similarities[rows[is_copy], column[is_copy]]
        best = cosines.argmax(axis=1)
        highest = cosines[np.arange(len(cosines)), best]
        better = np.flatnonzero(~same_bytes & (highest > similarity))
        position[better] = start + near.indices[better, best[better]]
        similarity[better] = highest[better]
    return Matches(position, similarity, same_bytes, position >= 0, recall)


def are_same(one: Vectors, ones: Int64, other: Vectors, others: Int64) -> tuple[Bools, Float64]:
    """Tell of pairs with the same id (P,) whether their vectors agree that they are one image, and their cosines.

    An id of other origin may name a whole slide of which the rows are tiles, or be counted anew in every set.
    """
    cosines = similarities(one, ones, other, others)
    # Zero vectors have a cosine of 0 even to themselves.
    both_zero = (similarities(one, ones, one, ones) == 0) & (similarities(other, others, other, others) == 0)
    return (cosines > SAME_IMAGE) | both_zero, cosines


def extend_to_groups(found: Matches, labels: Int64, order: Int64, images: EmbeddedImages, others: ImageSets) -> Matches:
    """Give all images of a group the match of its most similar direct one.

    Args:
        labels: (N,) the groups, from 0 to N - 1.
        order: (N,) by which ties are broken.
    """
    direct = np.flatnonzero(found.is_direct)
    groups = group_by(labels[direct], len(labels), -found.similarity[direct], order[direct])
    drawn = np.flatnonzero(~found.is_direct & (groups.sizes[labels] > 0))
    position, similarity = found.position.copy(), found.similarity.copy()
    position[drawn] = found.position[direct[groups.rows[groups.offsets[labels[drawn]]]]]
    for other, places, theirs in others.split(position[drawn]):
        rows = drawn[places]
        similarity[rows] = similarities(images.vectors, rows, other.vectors, theirs)
    return replace(found, position=position, similarity=similarity)
