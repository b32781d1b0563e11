"""Nearest neighbours by cosine: exact, whatever the block size, the number of threads or the device.

FAISS proposes neighbours in float32; what it cannot tell apart is settled by float64 dot products in a fixed order.

Q queries, N pool vectors, D numbers a vector, k neighbours, C candidates.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import faiss
import numpy as np

from .. import console
from ..store.vectors import Float32, Float64, Int64, Vectors

MARGIN = 16  # candidates beyond k, so that float32 rounding at the k-th place costs no second search
BLOCK_BYTES = 1 << 28  # chosen: what a block of queries, or a quarter of it of the pool, may take
CANDIDATE_BYTES = 64  # what a candidate takes while it is settled
MOST_EXCLUDED = 1_000  # candidates more, at most, for pool rows that are the query's own image
EXACT_PAIRS = 8_192  # pairs a float64 block: 50 MB at D = 384
SCAN_QUERIES = 256  # queries a tile of `_scan`
GPU_MAX_K = 2_048  # what FAISS can return on a GPU
HASH_ROWS = 16_384  # rows a block of `first_identical`


@dataclass(frozen=True)
class SearchSettings:
    """What a search may take and must find."""

    memory: int | None = None  # bytes; None: a third of the machine
    recall: float = 0.99  # share of the true neighbours; 1: exact, whatever the size
    seed: int = 0


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


def tolerance(dim: int) -> float:
    """Return how far a float32 cosine of two rounded unit vectors of length D can be from the exact one.

    The bound of a D-term float32 sum in any order, D 2^-24, once more for the two norms, and a little for the rest.
    """
    return (2 * dim + 32) * 2.0**-24


def nearest(
    queries: Vectors,
    pool: Vectors,
    k: int,
    *,
    order: Int64,
    identity: Identity | None = None,
    above: float = -np.inf,
    search: SearchSettings = SearchSettings(),
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
    num_candidates = min(k + MARGIN + (0 if identity is None else _most_excluded(identity)), len(pool))
    error = tolerance(pool.dim)
    neighbors = Neighbors(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf))
    unsettled = []
    for start, found, approximate in candidates(queries, pool, num_candidates, progress, block_bytes):
        # What FAISS left out is at most this similar.
        others = approximate[:, -1] + error if num_candidates < len(pool) else np.full(len(found), -np.inf)
        rows = np.arange(start, start + len(found))
        if identity is not None:
            itself = identity.queries[rows][:, None] == identity.pool[found]
            approximate = np.where(itself, -np.inf, approximate)
        kth = -np.partition(-approximate, k - 1, axis=1)[:, k - 1 : k]
        wanted = (approximate >= kth - 2 * error) & (approximate > above - error)
        exact = np.full(found.shape, -np.inf)
        query, column = np.nonzero(wanted)
        exact[wanted] = similarities(queries, rows[query], pool, found[query, column])
        exact[exact <= above] = -np.inf
        places = np.lexsort((order[found], -exact))[:, :k]  # (B, C) -> (B, k)
        best = np.take_along_axis(exact, places, axis=1)
        neighbors.similarities[rows] = best
        neighbors.indices[rows] = np.where(best > -np.inf, np.take_along_axis(found, places, axis=1), -1)
        unsettled.append(rows[(others > above) & (best[:, -1] <= others)])
    left = np.concatenate(unsettled) if unsettled else np.empty(0, np.int64)
    if len(left):
        console.detail(f"{len(left):,} of {len(queries):,} queries have ties beyond place {k}: searching them again")
        _scan(queries, left, pool, neighbors, order, identity, above, block_bytes)
    return neighbors


def _most_excluded(identity: Identity) -> int:
    """Return how many pool vectors at most are the image of one query."""
    found, counts = np.unique(identity.pool, return_counts=True)
    return min(int(counts[np.isin(found, identity.queries)].max(initial=0)), MOST_EXCLUDED)


def candidates(
    queries: Vectors,
    pool: Vectors,
    num: int,
    progress: str | None = "searching neighbours",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Int64, Float32]]:
    """Yield (start, positions, similarities) for blocks of queries: the `num` nearest by float32, (B, num) each.

    Similarities fall along a row and are within `tolerance(D)` of the exact ones, as are those of what is left out.
    """
    num_blocks = -(-len(queries) * (4 * pool.dim + CANDIDATE_BYTES * num) // block_bytes)
    starts = np.linspace(0, len(queries), num_blocks + 1).astype(np.int64)  # even blocks: FAISS is slow on small ones
    pool_rows = max(num, 1_024, block_bytes // 4 // (4 * pool.dim))
    search = _search_function(num)
    total = len(queries) * -(-len(pool) // pool_rows)
    bar = nullcontext(_no_progress) if progress is None else console.progress(progress, total, "queries")
    with bar as advance:
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            query_block = queries.unit(start, stop)
            heap = faiss.ResultHeap(stop - start, num, keep_max=True)
            for pool_start in range(0, len(pool), pool_rows):
                pool_block = pool.unit(pool_start, min(pool_start + pool_rows, len(pool)))
                found, positions = search(query_block, pool_block, min(num, len(pool_block)))
                heap.add_result(found, positions + pool_start)
                advance(stop - start)
            heap.finalize()
            yield start, heap.I, heap.D


def _no_progress(count: int) -> None:
    pass


def _search_function(num: int) -> Callable[[Float32, Float32, int], tuple[Float32, Int64]]:
    """Return exact float32 search (queries, pool, k) -> (similarities, positions), on the GPU when there is one."""
    if faiss.get_num_gpus() == 0 or num > GPU_MAX_K:
        console.detail("neighbours by FAISS on the CPU")
        return lambda queries, pool, k: faiss.knn(queries, pool, k, metric=faiss.METRIC_INNER_PRODUCT)
    console.detail("neighbours by FAISS on the GPU")
    resources = faiss.StandardGpuResources()
    return lambda queries, pool, k: faiss.knn_gpu(resources, queries, pool, k, metric=faiss.METRIC_INNER_PRODUCT)


def similarities(queries: Vectors, query_positions: Int64, pool: Vectors, pool_positions: Int64) -> Float64:
    """Return the exact cosines of pairs, (P,) in [-1, 1]: float64 dot products, each summed in the same order."""
    result = np.empty(len(query_positions))
    for start in range(0, len(result), EXACT_PAIRS):
        pairs = slice(start, start + EXACT_PAIRS)
        distinct, place = np.unique(query_positions[pairs], return_inverse=True)  # a query has many pairs: decode once
        result[pairs] = np.einsum("pd,pd->p", queries.exact(distinct)[place], pool.exact(pool_positions[pairs]))
    return np.clip(result, -1.0, 1.0)


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


def first_identical(vectors: Vectors) -> Int64:
    """Return for every vector the first position at which the very same numbers stand, (N,)."""
    multipliers = np.random.default_rng(0).integers(2**63, size=vectors.dim, dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), HASH_ROWS):
        bits = vectors.raw(start, min(start + HASH_ROWS, len(vectors))).view(np.uint32).astype(np.uint64)
        hashes[start : start + len(bits)] = np.einsum("nd,d->n", bits, multipliers)  # modulo 2^64
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    first = first[group]
    copies = np.flatnonzero(first != np.arange(len(vectors)))
    for start in range(0, len(copies), HASH_ROWS):
        rows = copies[start : start + HASH_ROWS]
        same = vectors.take(rows).raw(0, len(rows)) == vectors.take(first[rows]).raw(0, len(rows))
        unlike = rows[~same.all(axis=1)]  # only their hashes agree
        first[unlike] = unlike
    return first
