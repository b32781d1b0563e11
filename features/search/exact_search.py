"""Exact nearest neighbours by cosine, whatever the block size, the number of threads or the device.

Products in float32 propose candidates. Float64 sums in a fixed order rank those that float32 cannot tell apart.

Q queries, N pool vectors, D numbers a vector, k neighbours, C candidates.
"""

from dataclasses import dataclass, replace

import numpy as np

from ... import console
from ...store.vectors import Float32, Float64, Int64, Vectors
from ..threads import map_in_order, workers
from .candidates import BLOCK_BYTES, candidates
from .similarity import first_identical, similarities, tolerance

MARGIN = 16  # candidates beyond k, so that float32 rounding at the k-th place costs no second search
MAX_EXCLUDED = 1_000  # candidates more, at most, for pool rows that are the query's own image
RERANKED_QUERIES = 4_096  # queries whose candidates are ranked together
EXACT_PRODUCTS = 1.6e13  # chosen: 200,000 x 200,000 vectors of 384; three minutes on two cores
SCANNED_QUERIES = 256  # queries a tile of `scan`


@dataclass(frozen=True)
class SearchSettings:
    """What a search may take and must find."""

    memory: int | None = None  # bytes; None: a third of the machine
    recall: float = 0.99  # share of the true neighbours; 1: exact, whatever the size
    seed: int = 0


DEFAULTS = SearchSettings()


@dataclass(frozen=True)
class Neighbors:
    """The k nearest of every query, nearest first; of ties, first what comes first in the pool's `order`."""

    indices: Int64  # (Q, k) positions in the pool, -1 where there is none
    similarities: Float64  # (Q, k) cosines in [-1, 1], -inf where there is none
    recall: float = 1.0  # measured share of the true neighbours that it holds; 1: exact


@dataclass(frozen=True)
class Identity:
    """The image that every vector belongs to: a pair with equal numbers is one image, and never counts."""

    queries: Int64  # (Q,)
    pool: Int64  # (N,)


@dataclass(frozen=True)
class KnnTask:
    """A search for the k nearest pool vectors of every query."""

    queries: Vectors
    pool: Vectors
    k: int  # cut to N
    order: Int64  # (N,) rank of every pool vector by (image_id, uri, row), by which ties are broken
    identity: Identity | None = None  # pairs to leave out
    above: float = -np.inf  # only neighbours with a larger similarity are wanted

    def no_neighbors(self) -> Neighbors:
        """Return places for the neighbours, all empty."""
        shape = len(self.queries), min(self.k, len(self.pool))
        return Neighbors(np.full(shape, -1, np.int64), np.full(shape, -np.inf))

    def num_candidates(self) -> int:
        """Return how many candidates hold the k nearest but for ties: more, where some are the query's own image."""
        num_excluded = 0
        if self.identity is not None:
            images, counts = np.unique(self.identity.pool, return_counts=True)
            num_excluded = int(counts[np.isin(images, self.identity.queries)].max(initial=0))
        return min(self.k + MARGIN + min(num_excluded, MAX_EXCLUDED), len(self.pool))

    def within(self, pool: Vectors, positions: Int64) -> "KnnTask":
        """Return the same search in another pool (M,), whose vectors are those at `positions` (M,) of this one."""
        identity = None if self.identity is None else Identity(self.identity.queries, self.identity.pool[positions])
        return replace(self, pool=pool, order=self.order[positions], identity=identity)


def exact_neighbors(
    task: KnnTask, *, progress: str | None = "searching neighbours", block_bytes: int = BLOCK_BYTES
) -> Neighbors:
    """Return the k nearest pool vectors of every query, exactly.

    Args:
        block_bytes: what the queries that go through the pool together may take.
    """
    neighbors = task.no_neighbors()

    def rerank_block(block: tuple[int, Int64, Float32]) -> Int64:
        start, found, approximate = block
        return rerank(task, np.arange(start, start + len(found)), found, approximate, neighbors)

    with workers() as threads:
        blocks = candidates(task.queries, task.pool, task.num_candidates(), progress, block_bytes)
        unfinished = list(map_in_order(rerank_block, blocks, threads, ahead=threads.count))
    rows = np.concatenate([np.empty(0, np.int64), *unfinished])
    if len(rows):
        console.detail(f"{len(rows):,} of {len(task.queries):,} queries have ties beyond place {task.k}: scanning")
        scan(task, rows, neighbors, block_bytes)
    return neighbors


def rerank(task: KnnTask, rows: Int64, found: Int64, approximate: Float32, neighbors: Neighbors) -> Int64:
    """Write the k best candidates of the queries at `rows` (B,) to `neighbors`, by exact similarity.

    Args:
        found: (B, C) candidates, in no order.
        approximate: (B, C) their float32 similarities; -inf where there is no candidate.

    Returns:
        The rows that could have a neighbour more beyond the last candidate.
    """
    parts = [slice(start, start + RERANKED_QUERIES) for start in range(0, len(rows), RERANKED_QUERIES)]
    return np.concatenate([_rerank(task, rows[part], found[part], approximate[part], neighbors) for part in parts])


def _rerank(task: KnnTask, rows: Int64, found: Int64, approximate: Float32, neighbors: Neighbors) -> Int64:
    k = neighbors.indices.shape[1]
    error = tolerance(task.pool.dim)
    # What the search left out is at most this similar.
    others = approximate.min(axis=1) + error if found.shape[1] < len(task.pool) else np.full(len(found), -np.inf)
    is_candidate = found >= 0
    if task.identity is not None:
        is_candidate &= task.identity.queries[rows][:, None] != task.identity.pool[found]
    if not is_candidate.all():
        approximate = np.where(is_candidate, approximate, -np.inf)
    kth = -np.partition(-approximate, k - 1, axis=1)[:, k - 1 : k]
    query, column = np.nonzero((approximate >= kth - 2 * error) & (approximate > task.above - error))
    exact = np.full(found.shape, -np.inf)
    exact[query, column] = similarities(task.queries, rows[query], task.pool, found[query, column])
    exact[exact <= task.above] = -np.inf
    places = np.argsort(-exact, axis=1, kind="stable")  # (B, C)
    ranked = np.take_along_axis(exact, places, axis=1)
    tied = np.flatnonzero(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] > -np.inf)).any(axis=1))
    places[tied] = np.lexsort((task.order[found[tied]], -exact[tied]))
    best = ranked[:, :k]
    neighbors.similarities[rows] = best
    neighbors.indices[rows] = np.where(best > -np.inf, np.take_along_axis(found, places[:, :k], axis=1), -1)
    return rows[(others > task.above) & (best[:, -1] <= others)]


def scan(task: KnnTask, rows: Int64, neighbors: Neighbors, block_bytes: int = BLOCK_BYTES) -> None:
    """Search the whole pool for the queries at `rows`, with all that could reach their k-th place in float64."""
    k, pool = neighbors.indices.shape[1], task.pool
    error = tolerance(pool.dim)
    pool_rows = max(1, block_bytes // 4 // max(4 * pool.dim, 16 * SCANNED_QUERIES))
    for start in range(0, len(rows), SCANNED_QUERIES):
        some = rows[start : start + SCANNED_QUERIES]
        query_block = task.queries.take(some).unit(0, len(some))
        kth = np.maximum(neighbors.similarities[some, -1], task.above)
        query, position, exact = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
        for pool_start in range(0, len(pool), pool_rows):
            pool_block = pool.unit(pool_start, min(pool_start + pool_rows, len(pool)))
            near, column = np.nonzero(query_block @ pool_block.T >= (kth - error)[:, None])
            column += pool_start
            if task.identity is not None:
                others = task.identity.queries[some[near]] != task.identity.pool[column]
                near, column = near[others], column[others]
            new = _similarities_of_copies(task.queries, some[near], pool, column)
            is_above = new > task.above
            query = np.concatenate([query, near[is_above]])
            position = np.concatenate([position, column[is_above]])
            exact = np.concatenate([exact, new[is_above]])
            ranked = np.lexsort((task.order[position], -exact, query))
            query, position, exact = query[ranked], position[ranked], exact[ranked]
            place = np.arange(len(query)) - np.searchsorted(query, query)  # 0 for a query's nearest
            kth[query[place == k - 1]] = exact[place == k - 1]
            kept = place < k
            query, position, exact, place = query[kept], position[kept], exact[kept], place[kept]
        neighbors.indices[some], neighbors.similarities[some] = -1, -np.inf
        neighbors.indices[some[query], place] = position
        neighbors.similarities[some[query], place] = exact


def _similarities_of_copies(queries: Vectors, query_positions: Int64, pool: Vectors, pool_positions: Int64) -> Float64:
    """Return `similarities`, computing them once for all copies of a pool vector."""
    positions, column = np.unique(pool_positions, return_inverse=True)
    original = first_identical(pool.take(positions))[column]
    pairs, place = np.unique(query_positions * len(positions) + original, return_inverse=True)
    query, original = np.divmod(pairs, max(len(positions), 1))
    return similarities(queries, query, pool, positions[original])[place]
