"""The nearest by float32, all queries against all of a pool: by products of tiles, on a GPU by FAISS.

A product is compared with the k-th best of its query so far. The few that pass are collected, and cut to the best now
and then. So next to nothing is spent beside the products, which run at the machine's full rate. Vectors that are
searched among themselves are multiplied once for both sides: half the products.

Q queries, N pool vectors, D numbers a vector, C candidates, B queries of a tile, T pool vectors of a tile, E products.
"""

import threading
from collections.abc import Callable, Iterator

import faiss
import numpy as np
import torch
from torch import Tensor

from ... import console
from ...store.vectors import Float32, Int64, PageRelease, Vectors
from ..threads import Workers, map_in_order, workers
from .products import device, product, unit_rows

BLOCK_BYTES = 1 << 29  # chosen: what the queries that go through the pool together may take; 190,000 of 384, k = 64
TILE = 1_024  # chosen: queries and pool vectors of a tile; its product and vectors stay in a cache
GPU_TILE_POOL = 1 << 17
GPU_MAX_K = 2_048  # FAISS finds no more of each query on a GPU
SLACK = 2  # candidates that are collected before they are cut to the best, times C

Advance = Callable[..., None]


class TopK:
    """The `num` largest products of each query so far."""

    def __init__(self, num_queries: int, num: int) -> None:
        self.num = num
        self.values = np.full((num_queries, SLACK * num), -np.inf, np.float32)
        self.positions = np.full((num_queries, SLACK * num), -1)
        self.counts = np.zeros(num_queries, np.int64)
        self.least = np.full(num_queries, -np.inf, np.float32)  # what a candidate must exceed
        self.lock = threading.Lock()

    def add(self, products: Float32, start: int, *, transposed: bool = False) -> None:
        """Add the products (B, T) of all queries with the pool vectors from `start` on; (T, B) where `transposed`.

        Threads may add tiles in any order.
        """
        by_query = products.T if transposed else products
        query, column = np.empty(0, np.int64), np.empty(0, np.int64)
        with self.lock:
            is_first = self.least[0] == -np.inf  # of all queries, for they have seen equally many vectors
            if not is_first and transposed:
                column, query = np.divmod(np.flatnonzero(products > self.least), products.shape[1])
                order = np.argsort(query, kind="stable")
                query, column = query[order], column[order]
            elif not is_first:
                query, column = np.divmod(np.flatnonzero(products > self.least[:, None]), products.shape[1])
            if is_first or np.bincount(query, minlength=1).max() > self.num:
                largest = _largest(by_query, min(self.num, by_query.shape[1]))
                query, column = np.repeat(np.arange(len(largest)), largest.shape[1]), largest.reshape(-1)
            self.add_pairs(np.arange(len(self.counts)), query, by_query[query, column], column + start)

    def passing(self, queries: Int64, products: Float32) -> tuple[Int64, Int64]:
        """Return the places, rising, of the products (B, T) of `queries` (B,) that exceed the least so far.

        At most `num` of a query. More may be added meanwhile; `add_pairs` sorts that out.
        """
        passes = products > self.least[queries, None]
        many = np.flatnonzero(np.count_nonzero(passes, axis=1) > self.num)
        if len(many):
            passes[many] = False
            passes[many[:, None], _largest(products[many], self.num)] = True
        query, column = np.divmod(np.flatnonzero(passes), products.shape[1])
        return query, column

    def add_pairs(self, queries: Int64, query: Int64, products: Float32, positions: Int64) -> None:
        """Add products (E,) with the pool vectors at `positions`, at most `num` of each of some `queries` (B,).

        Args:
            query: (E,) places in `queries`, rising.
        """
        more = np.bincount(query, minlength=len(queries))
        self._cut(queries[self.counts[queries] + more > self.values.shape[1]])
        place = self.counts[queries[query]] + np.arange(len(query)) - (np.cumsum(more) - more)[query]
        self.values[queries[query], place] = products
        self.positions[queries[query], place] = positions
        self.counts[queries] += more
        self._cut(queries[(self.least[queries] == -np.inf) & (self.counts[queries] >= self.num)])

    def found(self) -> tuple[Float32, Int64]:
        """Return the largest products (B, C), in no order, and their positions."""
        self._cut()
        return self.values[:, : self.num], self.positions[:, : self.num]

    def _cut(self, queries: Int64 | slice = slice(None)) -> None:
        """Keep the `num` largest of some queries."""
        values, positions = self.values[queries], self.positions[queries]
        top = _largest(values, self.num)
        self.values[queries, : self.num] = values = np.take_along_axis(values, top, axis=1)
        self.values[queries, self.num :] = -np.inf
        self.positions[queries, : self.num] = np.take_along_axis(positions, top, axis=1)
        self.counts[queries] = self.num
        self.least[queries] = values.min(axis=1)


def _largest(values: Float32, num: int) -> Int64:
    """Return where the `num` largest of every row are, (B, num), in no order."""
    if num == values.shape[1]:
        return np.broadcast_to(np.arange(num), values.shape)
    places: Int64 = np.argpartition(values, values.shape[1] - num, axis=1)[:, values.shape[1] - num :]
    return places


def candidates(
    queries: Vectors,
    pool: Vectors,
    num: int,
    progress: str | None = "searching neighbours",
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, Int64, Float32]]:
    """Yield (start, positions, similarities) for blocks of queries: the `num` nearest by float32, (B, num) each.

    Similarities are in no order, and within `tolerance(D)` of the exact ones, as are those of what is left out. `num`
    is at most N.
    """
    on_gpu = device().type == "cuda" and faiss.get_num_gpus() > 0 and num <= GPU_MAX_K
    console.detail(f"neighbours by {'FAISS on the GPU' if on_gpu else 'products of tiles'}")
    search = _by_gpu if on_gpu else _by_tiles
    with workers() as threads, console.progress(progress, len(queries), "queries") as advance:
        rows = max(1, block_bytes // (4 * pool.dim + 12 * SLACK * num))
        bounds = np.linspace(0, len(queries), -(-len(queries) // rows) + 1).astype(np.int64).tolist()
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            for found, positions in search(queries, start, stop, pool, num, threads, advance):
                yield start, positions, found
                start += len(found)


def _by_tiles(
    queries: Vectors, start: int, stop: int, pool: Vectors, num: int, threads: Workers, advance: Advance
) -> Iterator[tuple[Float32, Int64]]:
    blocks = _tiles(start, stop)
    points = [unit_rows(queries.array[queries.rows[first:last]]) for first, last in blocks]
    best = [TopK(last - first, num) for first, last in blocks]
    is_self_join = queries.are(pool)
    others = _tiles(0, start) + _tiles(stop, len(pool)) if is_self_join else _tiles(0, len(pool))

    def decode(tile: tuple[int, int]) -> Tensor:
        return unit_rows(pool.array[pool.rows[slice(*tile)]])

    def tasks() -> Iterator[tuple[int, Tensor, int, int]]:
        if is_self_join:
            for other, (first, _) in enumerate(blocks):
                for number in range(other + 1):
                    yield number, points[other], first, other
        pages = PageRelease(pool.array)
        for (first, last), right in zip(others, map_in_order(decode, others, threads), strict=True):
            for number in range(len(blocks)):
                yield number, right, first, number
            pages.add((last - first) * pool.dim * pool.array.itemsize)

    def compare(task: tuple[int, Tensor, int, int]) -> int:
        number, right, first, other = task
        products = product(points[number], right)
        best[number].add(products, first)
        if other != number:
            best[other].add(products, blocks[number][0], transposed=True)
        return products.size * (1 if other == number else 2)

    compared, shown_queries = 0, 0
    for num_products in map_in_order(compare, tasks(), threads):
        compared += num_products
        advance(compared // len(pool) - shown_queries)
        shown_queries = compared // len(pool)
    return map_in_order(TopK.found, best, threads)


def _tiles(start: int, stop: int) -> list[tuple[int, int]]:
    return [(first, min(first + TILE, stop)) for first in range(start, stop, TILE)]


def _by_gpu(
    queries: Vectors, start: int, stop: int, pool: Vectors, num: int, threads: Workers, advance: Advance
) -> Iterator[tuple[Float32, Int64]]:
    import faiss.contrib.torch_utils  # from here on, `knn_gpu` takes tensors

    resources = faiss.StandardGpuResources()
    left = unit_rows(queries.array[queries.rows[start:stop]])
    values = left.new_empty((len(left), 0))
    positions = torch.empty((len(left), 0), dtype=torch.int64, device=left.device)
    for first in range(0, len(pool), GPU_TILE_POOL):
        right = unit_rows(pool.array[pool.rows[first : first + GPU_TILE_POOL]])
        found = faiss.knn_gpu(resources, left, right, min(num, len(right)), metric=faiss.METRIC_INNER_PRODUCT)
        values = torch.cat([values, found[0]], dim=1)
        positions = torch.cat([positions, found[1] + first], dim=1)
        top = values.topk(min(num, values.shape[1]), dim=1)
        values, positions = top.values, positions.gather(1, top.indices)
    advance(stop - start)
    yield values.cpu().numpy(), positions.cpu().numpy()
