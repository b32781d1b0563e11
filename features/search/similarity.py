"""Exact similarities of pairs, by which every search is ranked, and which vectors are identical.

N vectors, D numbers a vector, P pairs.
"""

import numpy as np

from ...store.vectors import Float32, Float64, Int64, Vectors, release
from ..threads import in_parallel

BLOCK_PAIRS = 1 << 20  # pairs computed together, at most
DECODED_BYTES = 192 << 20  # what their vectors may take
PAIRS_A_STEP = 512  # 2 MB at D = 384: stays in the cache
HASH_ROWS = 16_384  # rows a block of `first_identical`


def tolerance(dim: int) -> float:
    """Return how far a float32 cosine of two rounded unit vectors of length D can be from the exact one.

    The bound of a D-term float32 sum in any order, D 2^-24, once more for the two norms, and a little for the rest.
    """
    return (2 * dim + 32) * 2.0**-24


def similarities(queries: Vectors, query_positions: Int64, pool: Vectors, pool_positions: Int64) -> Float64:
    """Return the exact cosines of pairs, (P,) in [-1, 1]: float64 sums, always in the same order.

    Vectors with the same numbers have a cosine of exactly 1, a zero vector 0 to all.
    """
    result = np.empty(len(query_positions))
    for start in range(0, len(result), BLOCK_PAIRS):
        pairs = slice(start, start + BLOCK_PAIRS)
        _compute(queries, query_positions[pairs], pool, pool_positions[pairs], result[pairs])
    return result


def _compute(queries: Vectors, query_positions: Int64, pool: Vectors, pool_positions: Int64, result: Float64) -> None:
    """Write the cosines of pairs to `result`, a part at a time where their vectors would take too much memory."""
    distinct_queries, query_place = np.unique(query_positions, return_inverse=True)
    distinct_pool, pool_place = np.unique(pool_positions, return_inverse=True)
    if 4 * pool.dim * (len(distinct_queries) + len(distinct_pool)) > DECODED_BYTES and len(result) > PAIRS_A_STEP:
        half = len(result) // 2
        for part in (slice(0, half), slice(half, None)):
            _compute(queries, query_positions[part], pool, pool_positions[part], result[part])
        return
    left, left_squares = _with_squares(queries, distinct_queries)
    right, right_squares = _with_squares(pool, distinct_pool)

    def step(start: int) -> None:
        pairs = slice(start, start + PAIRS_A_STEP)
        query, place = query_place[pairs], pool_place[pairs]
        dots = np.einsum("pd,pd->p", left[query].astype(np.float64), right[place].astype(np.float64))
        lengths = np.sqrt(left_squares[query] * right_squares[place])
        result[pairs] = np.clip(dots / np.where(lengths > 0, lengths, 1.0), -1.0, 1.0)

    in_parallel(step, range(0, len(result), PAIRS_A_STEP))


def _with_squares(vectors: Vectors, positions: Int64) -> tuple[Float32, Float64]:
    """Return the vectors at `positions` as stored (P, D), and their squared lengths (P,)."""
    stored = vectors.take(positions).raw(0, len(positions))
    squares = np.empty(len(positions))
    for start in range(0, len(positions), PAIRS_A_STEP):
        block = stored[start : start + PAIRS_A_STEP].astype(np.float64)
        squares[start : start + len(block)] = np.einsum("pd,pd->p", block, block)
    return stored, squares


def first_identical(vectors: Vectors) -> Int64:
    """Return for every vector the first position with the very same numbers, (N,)."""
    multipliers = np.random.default_rng(0).integers(2**63, size=vectors.dim, dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(vectors), np.uint64)
    for start in range(0, len(vectors), HASH_ROWS):
        bits = vectors.raw(start, min(start + HASH_ROWS, len(vectors))).view(np.uint32).astype(np.uint64)
        hashes[start : start + len(bits)] = np.einsum("nd,d->n", bits, multipliers)  # modulo 2^64
        release(vectors.array)
    _, places, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    first: Int64 = places[inverse]
    del hashes, places, inverse
    copies = np.flatnonzero(first != np.arange(len(vectors)))
    for start in range(0, len(copies), HASH_ROWS):
        rows = copies[start : start + HASH_ROWS]
        same = vectors.take(rows).raw(0, len(rows)) == vectors.take(first[rows]).raw(0, len(rows))
        unlike = rows[~same.all(axis=1)]  # only their hashes agree
        first[unlike] = unlike
    return first
