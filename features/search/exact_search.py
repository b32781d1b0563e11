"""Exact nearest neighbours by cosine, whatever the block size, the number of threads or the device.

Products in float32 propose neighbours; what they cannot tell apart is settled by float64 sums in a fixed order.

Q queries, N pool vectors, D numbers a vector, k neighbours, C candidates.
"""

from dataclasses import dataclass

import numpy as np

from ... import console
from ...store.vectors import Float32, Float64, Int64, Vectors
from ..threads import map_in_order, workers
from .candidates import BLOCK_BYTES, candidates
from .similarity import first_identical, similarities, tolerance

MARGIN = 16  # candidates beyond k, so that float32 rounding at the k-th place costs no second search
MOST_EXCLUDED = 1_000  # candidates more, at most, for pool rows that are the query's own image
SETTLED_QUERIES = 4_096  # queries whose candidates are settled together
EXACT_PRODUCTS = 1.6e13  # chosen: 200,000 x 200,000 vectors of 384; three minutes on two cores
SCAN_QUERIES = 256  # queries a tile of `_scan`


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
    """Which image every vector belongs to: a pair with equal numbers is the image itself, and never counts."""

    queries: Int64  # (Q,)
    pool: Int64  # (N,)


def exact_neighbors(
    queries: Vectors,
    pool: Vectors,
    k: int,
    *,
    order: Int64,
    identity: Identity | None = None,
    above: float = -np.inf,
    progress: str | None = "searching neighbours",
    block_bytes: int = BLOCK_BYTES,
) -> Neighbors:
    """Return the k nearest pool vectors of every query, exactly; k is cut to N.

    Args:
        order: (N,) rank of every pool vector by (image_id, uri, row), by which ties are broken.
        identity: pairs to leave out.
        above: only neighbours with a larger similarity are wanted.
        progress: what the progress line says, None for no line.
    """
    k = min(k, len(pool))
    num_candidates = num_candidates_for(k, len(pool), identity)
    neighbors = Neighbors(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf))

    def settle_block(block: tuple[int, Int64, Float32]) -> list[Int64]:
        start, found, approximate = block
        left = []
        for part in range(0, len(found), SETTLED_QUERIES):
            some = slice(part, part + SETTLED_QUERIES)
            rows = np.arange(start, start + len(found))[some]
            left.append(settle(neighbors, rows, found[some], approximate[some], queries, pool, order, identity, above))
        return left

    with workers() as threads:
        blocks = candidates(queries, pool, num_candidates, progress, block_bytes)
        unsettled = [rows for block in map_in_order(settle_block, blocks, threads, threads.count) for rows in block]
    left = np.concatenate([np.empty(0, np.int64), *unsettled])
    if len(left):
        console.detail(f"{len(left):,} of {len(queries):,} queries have ties beyond place {k}: searching them again")
        _scan(queries, left, pool, neighbors, order, identity, above, block_bytes)
    return neighbors


def settle(
    neighbors: Neighbors,
    rows: Int64,
    found: Int64,
    approximate: Float32,
    queries: Vectors,
    pool: Vectors,
    order: Int64,
    identity: Identity | None,
    above: float,
) -> Int64:
    """Write the k best of the candidates (B, C) of the queries at `rows` (B,) to `neighbors`, by exact similarity.

    Similarities are -inf where there is no candidate. Returns the rows that could have a neighbour more
    beyond the last candidate.
    """
    k = neighbors.indices.shape[1]
    error = tolerance(pool.dim)
    # What the search left out is at most this similar.
    is_part = found.shape[1] < len(pool)
    others = approximate.min(axis=1) + error if is_part else np.full(len(found), -np.inf, np.float32)
    is_candidate = found >= 0
    if identity is not None:
        is_candidate &= identity.queries[rows][:, None] != identity.pool[found]
    if not is_candidate.all():
        approximate = np.where(is_candidate, approximate, -np.inf)
    kth = -np.partition(-approximate, k - 1, axis=1)[:, k - 1 : k]
    query, column = np.nonzero((approximate >= kth - 2 * error) & (approximate > above - error))
    exact = np.full(found.shape, -np.inf)
    exact[query, column] = similarities(queries, rows[query], pool, found[query, column])
    exact[exact <= above] = -np.inf
    places = np.argsort(-exact, axis=1, kind="stable")  # (B, C)
    ranked = np.take_along_axis(exact, places, axis=1)
    tied = np.flatnonzero(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] > -np.inf)).any(axis=1))
    places[tied] = np.lexsort((order[found[tied]], -exact[tied]))
    best = ranked[:, :k]
    neighbors.similarities[rows] = best
    neighbors.indices[rows] = np.where(best > -np.inf, np.take_along_axis(found, places[:, :k], axis=1), -1)
    return rows[(others > above) & (best[:, -1] <= others)]


def num_candidates_for(k: int, num_pool: int, identity: Identity | None) -> int:
    """Return how many candidates hold the k nearest but for ties: more, where some are the query's own image."""
    return min(k + MARGIN + (0 if identity is None else _most_excluded(identity)), num_pool)


def _most_excluded(identity: Identity) -> int:
    """Return how many pool vectors at most are the image of one query."""
    found, counts = np.unique(identity.pool, return_counts=True)
    return min(int(counts[np.isin(found, identity.queries)].max(initial=0)), MOST_EXCLUDED)


def _scan(
    queries: Vectors,
    left: Int64,
    pool: Vectors,
    neighbors: Neighbors,
    order: Int64,
    identity: Identity | None,
    above: float,
    block_bytes: int,
) -> None:
    """Search the whole pool for the queries at `left`, with all that could reach their k-th place in float64."""
    k = neighbors.indices.shape[1]
    error = tolerance(pool.dim)
    pool_rows = max(1, block_bytes // 4 // max(4 * pool.dim, 16 * SCAN_QUERIES))
    for start in range(0, len(left), SCAN_QUERIES):
        rows = left[start : start + SCAN_QUERIES]
        query_block = queries.take(rows).unit(0, len(rows))
        kth = np.maximum(neighbors.similarities[rows, -1], above)
        query, position, exact = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
        for pool_start in range(0, len(pool), pool_rows):
            pool_block = pool.unit(pool_start, min(pool_start + pool_rows, len(pool)))
            near, column = np.nonzero(query_block @ pool_block.T >= (kth - error)[:, None])
            column += pool_start
            if identity is not None:
                others = identity.queries[rows[near]] != identity.pool[column]
                near, column = near[others], column[others]
            new = _similarities_of_copies(queries, rows[near], pool, column)
            query = np.concatenate([query, near[new > above]])
            position = np.concatenate([position, column[new > above]])
            exact = np.concatenate([exact, new[new > above]])
            ranked = np.lexsort((order[position], -exact, query))
            query, position, exact = query[ranked], position[ranked], exact[ranked]
            place = np.arange(len(query)) - np.searchsorted(query, query)  # 0 for a query's nearest
            kth[query[place == k - 1]] = exact[place == k - 1]
            kept = place < k
            query, position, exact, place = query[kept], position[kept], exact[kept], place[kept]
        neighbors.indices[rows], neighbors.similarities[rows] = -1, -np.inf
        neighbors.indices[rows[query], place] = position
        neighbors.similarities[rows[query], place] = exact


def _similarities_of_copies(queries: Vectors, query_positions: Int64, pool: Vectors, pool_positions: Int64) -> Float64:
    """Return `similarities`, computing them once for all copies of a pool vector."""
    positions, column = np.unique(pool_positions, return_inverse=True)
    original = first_identical(pool.take(positions))[column]
    pairs, place = np.unique(query_positions * len(positions) + original, return_inverse=True)
    query, original = np.divmod(pairs, max(len(positions), 1))
    return similarities(queries, query, pool, positions[original])[place]
