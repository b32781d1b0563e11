"""Candidates of queries, and the assignment of each pool image to one query.

Q queries of all sets, N pool images, R pairs of a query and a pool image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ... import console
from ...features.search.neighbors import Neighbors
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages

FILL_PAIRS = 1 << 23  # neighbours in memory while places are filled; chosen: 128 MB


@dataclass(frozen=True)
class QuerySet:
    """Queries that come together and ask for the same number of images."""

    name: str
    images: EmbeddedImages
    number: int  # images for every query, or from every cluster
    start: int  # place of its first query among those of all sets

    def __len__(self) -> int:
        return len(self.images)

    @property
    def places(self) -> Int64:
        """Return the places of its queries among those of all sets."""
        return np.arange(self.start, self.start + len(self))


@dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a pool image: candidates, or assignments in which each image occurs once."""

    pool: Int64  # (R,) positions in the pool
    query: Int64  # (R,) places among the queries of all sets
    rank: Int64  # (R,) 1 for the query's nearest
    similarity: Float64  # (R,)

    def __len__(self) -> int:
        return len(self.pool)

    def take(self, indices: Int64) -> "Pairs":
        """Return some of them."""
        return Pairs(self.pool[indices], self.query[indices], self.rank[indices], self.similarity[indices])

    def of(self, part: QuerySet) -> "Pairs":
        """Return those of a set's queries."""
        return self.take(np.flatnonzero((self.query >= part.start) & (self.query < part.start + len(part))))


def concatenate(parts: Sequence[Pairs]) -> Pairs:
    """Return several as one."""
    return Pairs(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Pairs)))


def candidates(part: QuerySet, neighbors: Neighbors) -> Pairs:
    """Return all pairs of a set's queries and the neighbours found of them."""
    query, column = np.nonzero(neighbors.indices >= 0)
    similarity = neighbors.similarities[query, column]
    return Pairs(neighbors.indices[query, column], query + part.start, column + 1, similarity)


def assign_to_most_similar(pairs: Pairs) -> Pairs:
    """Return every pool image once, with its most similar query, of ties the earlier."""
    by = np.lexsort((pairs.query, -pairs.similarity, pairs.pool))
    _, first = np.unique(pairs.pool[by], return_index=True)
    return pairs.take(by[first])


def cap(pairs: Pairs, max_images: int | None) -> Pairs:
    """Return `max_images` at most: every query's first, then every query's second, and so on, by similarity."""
    if max_images is None or len(pairs) <= max_images:
        return pairs
    by = np.lexsort((pairs.query, -pairs.similarity, pairs.rank))
    return pairs.take(np.sort(by[:max_images]))


def fill(
    sets: Sequence[QuerySet],
    first: Sequence[Neighbors],
    num_pool: int,
    search: Callable[[QuerySet, Int64, int], Neighbors],
    unavailable: Int64,
) -> tuple[Pairs, dict[str, object]]:
    """Give every query as many images as its set asks for, each pool image to one query, while the pool lasts.

    The result is that of a greedy pass over all pairs, by falling similarity (of ties by query, then by the pool's
    order), which takes a pair when its image is free and its query still lacks images. Deferred acceptance (Gale and
    Shapley 1962) finds it without all pairs: queries propose to their nearest images; an image keeps the most similar
    query that proposed; a query that is refused or loses an image proposes to its next nearest. As both sides rank by
    one number, there is one stable outcome. Only queries that run out of neighbours are searched again, twice as deep.

    Args:
        first: the neighbours found of every set's queries.
        num_pool: N.
        search: returns the neighbours of a set's queries at the places (B,) given, to the depth given.
        unavailable: positions of pool images that no query may get.

    Returns the assignments, and figures: the lowest recall of the searches, their number and depth.
    """
    capacity = np.concatenate([np.full(len(part), part.number) for part in sets])
    counts = np.zeros(len(capacity), np.int64)  # images that each query has
    is_done = np.zeros(len(capacity), bool)  # the query has proposed to the whole pool
    holder = np.full(num_pool, -1)  # the query that each image keeps; -1: none
    similarities, ranks = np.full(num_pool, -np.inf), np.zeros(num_pool, np.int32)  # of the image to its holder
    similarities[unavailable] = np.inf

    def propose(queries: Int64, neighbors: Neighbors, depth: int) -> None:
        """Let queries (B,) propose to their neighbours in turn until each has its images or no neighbour is left.

        The holder of an image only becomes more similar. So proposing again from the start of a longer list changes
        nothing that was decided.
        """
        proposed = np.zeros(len(queries), np.int64)
        width = neighbors.indices.shape[1]
        while True:
            free = capacity[queries] - counts[queries]
            active = np.flatnonzero((free > 0) & (proposed < width))
            if not len(active):
                break
            window = np.arange(free[active].max())
            columns = proposed[active][:, None] + window  # (A, W)
            row, offset = np.nonzero((window < free[active][:, None]) & (columns < width))
            proposer, column = active[row], columns[row, offset]
            proposed[active] = np.minimum(proposed[active] + free[active], width)
            image, similarity = neighbors.indices[proposer, column], neighbors.similarities[proposer, column]
            query, present = queries[proposer], similarities[image]
            is_better = (similarity > present) | ((similarity == present) & (query < holder[image]))
            is_better &= image >= 0
            image, similarity, query, rank = (each[is_better] for each in (image, similarity, query, column + 1))
            by = np.lexsort((query, -similarity, image))
            image, place = np.unique(image[by], return_index=True)
            best, loser = by[place], holder[image]
            np.subtract.at(counts, loser[loser >= 0], 1)
            np.add.at(counts, query[best], 1)
            holder[image], similarities[image], ranks[image] = query[best], similarity[best], rank[best]
        ends_early = neighbors.indices[:, -1] < 0  # there are no more
        is_done[queries] = (ends_early | (depth >= num_pool)) & (proposed >= width)

    depths = [part.number for part in sets]
    recall = min(neighbors.recall for neighbors in first)
    for part, neighbors in zip(sets, first, strict=True):
        propose(part.places, neighbors, part.number)
    rounds = 1
    while len(lacking := np.flatnonzero((counts < capacity) & ~is_done)):
        rounds += 1
        for number, part in enumerate(sets):
            of_set = lacking[np.isin(lacking, part.places)]
            if not len(of_set):
                continue
            depths[number] = depth = min(2 * depths[number], num_pool)
            console.detail(f"{len(of_set):,} queries of {part.name} lack images: searching their {depth:,} nearest")
            size = max(1, FILL_PAIRS // depth)
            for start in range(0, len(of_set), size):
                queries = of_set[start : start + size]
                neighbors = search(part, queries, depth)
                recall = min(recall, neighbors.recall)
                propose(queries, neighbors, depth)
    depth = min(max(depths), num_pool)
    console.say(f"filled in {rounds} rounds, from up to {depth:,} neighbours of a query")
    images = np.flatnonzero(holder >= 0)
    pairs = Pairs(images, holder[images], ranks[images].astype(np.int64), similarities[images])
    return pairs, {"recall": recall, "fill_rounds": rounds, "fill_depth": depth}
