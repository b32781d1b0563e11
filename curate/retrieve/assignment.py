"""Which query gets a pool image that several want.

Q queries of all sets, N pool images, R pairs of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ... import console
from ...features.search.neighbors import Identity, Neighbors, SearchSettings, nearest
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages

FILL_PAIRS = 1 << 23  # neighbours held while places are filled; chosen: 128 MB


@dataclass(frozen=True)
class QuerySet:
    """Queries that come together and ask for the same number of images."""

    name: str
    images: EmbeddedImages
    number: int  # images wanted, of every query or every cluster
    start: int  # place of its first query among those of all sets

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Retrieved:
    """Pool images with the query that each came by."""

    pool: Int64  # (R,) positions in the pool
    query: Int64  # (R,) places among the queries of all sets
    rank: Int64  # (R,) 1 for the query's nearest
    similarity: Float64  # (R,)

    def __len__(self) -> int:
        return len(self.pool)

    def take(self, indices: Int64) -> "Retrieved":
        """Return some of them."""
        return Retrieved(self.pool[indices], self.query[indices], self.rank[indices], self.similarity[indices])

    def ordered(self) -> "Retrieved":
        """Return the same by query, then rank."""
        return self.take(np.lexsort((self.rank, self.query)))

    def of(self, part: QuerySet) -> "Retrieved":
        """Return what came by the queries of a set."""
        return self.take(np.flatnonzero((self.query >= part.start) & (self.query < part.start + len(part))))


def together(parts: Sequence[Retrieved]) -> Retrieved:
    """Return several as one."""
    pool, query, rank = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pool", "query", "rank"))
    return Retrieved(pool, query, rank, np.concatenate([part.similarity for part in parts]))


def neighbors_of(
    part: QuerySet,
    pool: EmbeddedImages,
    identity: Identity,
    min_similarity: float | None,
    search: SearchSettings,
    depth: int,
    queries: Int64 | None = None,
) -> Neighbors:
    """Return the `depth` nearest pool images of a set's queries, or of those at the places `queries` (B,)."""
    queries = np.arange(part.start, part.start + len(part)) if queries is None else queries
    return nearest(
        part.images.vectors.take(queries - part.start),
        pool.vectors,
        depth,
        order=pool.order,
        identity=Identity(identity.queries[queries], identity.pool),
        above=-np.inf if min_similarity is None else float(np.nextafter(min_similarity, -np.inf)),
        search=search,
        progress=f"searching neighbours of {part.name}",
    )


def wanted(part: QuerySet, neighbors: Neighbors) -> Retrieved:
    """Return all that a set's queries found."""
    query, column = np.nonzero(neighbors.indices >= 0)
    similarity = neighbors.similarities[query, column]
    return Retrieved(neighbors.indices[query, column], query + part.start, column + 1, similarity)


def best_of_each(found: Retrieved) -> Retrieved:
    """Return every pool image once, with the query it is most similar to, of ties with the earlier; by query, rank."""
    by = np.lexsort((found.query, -found.similarity, found.pool))
    _, first = np.unique(found.pool[by], return_index=True)
    return found.take(by[first]).ordered()


def at_most(found: Retrieved, max_images: int | None) -> Retrieved:
    """Return no more than so many: every query's first, then every query's second, and so on, by similarity."""
    if max_images is None or len(found) <= max_images:
        return found
    by = np.lexsort((found.query, -found.similarity, found.rank))
    return found.take(by[:max_images]).ordered()


@dataclass(frozen=True)
class Filled:
    """An assignment in which every query has what it asked for, where the pool allows."""

    found: Retrieved
    rounds: int  # searches, the first included
    depth: int  # most neighbours of a query looked at
    recall: float  # the lowest of these searches


@dataclass(frozen=True)
class _Held:
    """What every pool image is held by, changed in place."""

    query: Int64  # (N,) -1: none
    similarity: Float64  # (N,) -inf: none; inf: not to be had
    rank: npt.NDArray[np.int32]  # (N,)
    count: Int64  # (Q,) images that each query holds


def fill(
    sets: Sequence[QuerySet],
    first: Sequence[Neighbors],
    pool: EmbeddedImages,
    identity: Identity,
    *,
    taken: Int64,
    min_similarity: float | None,
    search: SearchSettings,
) -> Filled:
    """Give every query as many images as its set asks for, each pool image to one, while the pool lasts.

    The pairs of all queries and pool images are gone through by falling similarity (of ties by query, then by the
    pool's order), and a pair is taken when the image is free and the query not yet served. This is found without all
    pairs: queries ask for their nearest, an image stays with the most similar that asked, and who was refused or
    loses one asks for its next nearest (deferred acceptance, Gale and Shapley 1962; as both sides rank by one number,
    there is one stable outcome). Only queries that run out of known neighbours are searched again, twice as deep.

    Args:
        first: what every set's queries found.
        taken: positions of pool images that nobody gets.
    """
    num_queries = sum(len(part) for part in sets)
    held = _Held(
        np.full(len(pool), -1), np.full(len(pool), -np.inf), np.zeros(len(pool), np.int32), np.zeros(num_queries, int)
    )
    held.similarity[taken] = np.inf
    capacity = np.concatenate([np.full(len(part), part.number) for part in sets])
    is_done = np.zeros(num_queries, bool)
    depths = [part.number for part in sets]
    recall = min(neighbors.recall for neighbors in first)
    for part, neighbors in zip(sets, first, strict=True):
        queries = np.arange(part.start, part.start + len(part))
        is_done[queries] = _ask(held, queries, capacity, neighbors, part.number >= len(pool))

    rounds = 1
    while len(left := np.flatnonzero((held.count < capacity) & ~is_done)):
        rounds += 1
        for number, part in enumerate(sets):
            mine = left[(left >= part.start) & (left < part.start + len(part))]
            if not len(mine):
                continue
            depths[number] = depth = min(2 * depths[number], len(pool))
            console.detail(f"{len(mine):,} queries of {part.name} lack images: looking at their {depth:,} nearest")
            size = max(1, FILL_PAIRS // depth)
            for start in range(0, len(mine), size):
                queries = mine[start : start + size]
                neighbors = neighbors_of(part, pool, identity, min_similarity, search, depth, queries)
                recall = min(recall, neighbors.recall)
                is_done[queries] = _ask(held, queries, capacity, neighbors, depth >= len(pool))
    images = np.flatnonzero(held.query >= 0)
    rank = held.rank[images].astype(np.int64)
    found = Retrieved(images, held.query[images], rank, held.similarity[images]).ordered()
    return Filled(found, rounds, min(max(depths), len(pool)), recall)


def _ask(held: _Held, queries: Int64, capacity: Int64, neighbors: Neighbors, is_all: bool) -> npt.NDArray[np.bool_]:
    """Let queries (B,) ask down their lists of neighbours until each has its number or has asked all.

    Returns which of them have asked all that there are, (B,): `is_all` says that the lists are the whole pool, a list
    with free places at its end is all in any case. What an image is held by only becomes more similar, so that asking
    again from the start of a longer list asks nothing that was answered otherwise before.
    """
    depth = neighbors.indices.shape[1]
    asked = np.zeros(len(queries), np.int64)
    while True:
        free = capacity[queries] - held.count[queries]
        active = np.flatnonzero((free > 0) & (asked < depth))
        if not len(active):
            break
        window = np.arange(free[active].max())
        columns = asked[active][:, None] + window  # (A, W)
        row, offset = np.nonzero((window < free[active][:, None]) & (columns < depth))
        asker, column = active[row], columns[row, offset]
        asked[active] = np.minimum(asked[active] + free[active], depth)
        image, similarity, query = (
            neighbors.indices[asker, column],
            neighbors.similarities[asker, column],
            queries[asker],
        )
        holder, level = held.query[image], held.similarity[image]
        is_better = (image >= 0) & ((similarity > level) | ((similarity == level) & (query < holder)))
        image, similarity, query, rank = (each[is_better] for each in (image, similarity, query, column + 1))
        by = np.lexsort((query, -similarity, image))
        image, first = np.unique(image[by], return_index=True)
        best = by[first]
        loser = held.query[image]
        np.subtract.at(held.count, loser[loser >= 0], 1)
        np.add.at(held.count, query[best], 1)
        held.query[image], held.similarity[image], held.rank[image] = query[best], similarity[best], rank[best]
    is_list_all = is_all | (neighbors.indices[:, -1] < 0)
    done: npt.NDArray[np.bool_] = is_list_all & (asked >= depth)
    return done
