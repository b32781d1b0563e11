"""Nearest neighbours by cosine: exact where that takes a few minutes at most, else by an index of the pool.

Q queries, N pool vectors, D numbers a vector, k neighbours.
"""

import numpy as np

from ... import console
from ...store.vectors import Int64, Vectors
from .candidates import BLOCK_BYTES
from .cell_search import cell_neighbors
from .exact_search import DEFAULTS, KnnTask, exact_neighbors
from .exact_search import EXACT_PRODUCTS as EXACT_PRODUCTS  # all of these are for those who search
from .exact_search import Identity as Identity
from .exact_search import Neighbors as Neighbors
from .exact_search import SearchSettings as SearchSettings
from .similarity import first_identical as first_identical
from .similarity import similarities as similarities
from .similarity import tolerance as tolerance

INDEXED_FOR = 13_000  # measured: comparing so many queries with a whole pool takes as long as sorting it into cells


def nearest(
    queries: Vectors,
    pool: Vectors,
    k: int,
    *,
    order: Int64,
    identity: Identity | None = None,
    above: float = -np.inf,
    search: SearchSettings = DEFAULTS,
    progress: str | None = "searching neighbours",
) -> Neighbors:
    """Return the k nearest pool vectors of every query; k is cut to N.

    The search is exact where comparing all with all takes minutes at most, where it is quicker than sorting the pool
    into cells, or where `search.recall` is 1. Cells left by an earlier search do not count, or they would show in the
    result. Else each query probes as many cells as hold the share `search.recall` of a sample's true neighbours.

    Args:
        order: (N,) rank of every pool vector by (image_id, uri, row), by which ties are broken.
        identity: pairs to leave out.
        above: only neighbours with a larger similarity are wanted.
        progress: what the progress line says, None for no line.
    """
    task = KnnTask(queries, pool, k, order, identity, above)
    products = len(queries) * len(pool) * pool.dim
    if products > EXACT_PRODUCTS and search.recall < 1 and len(queries) >= INDEXED_FOR:
        return cell_neighbors(task, search, progress)
    if products > EXACT_PRODUCTS:
        why = "--recall 1" if search.recall >= 1 else "so few are not worth sorting the pool into cells"
        console.say(f"comparing {len(queries):,} with all of {len(pool):,} vectors, {products:.1e} products: {why}")
    block_bytes = BLOCK_BYTES if search.memory is None else min(BLOCK_BYTES, search.memory // 8)
    return exact_neighbors(task, progress=progress, block_bytes=block_bytes)
