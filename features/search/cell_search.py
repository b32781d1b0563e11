"""Nearest neighbours by cells: every query visits the cells nearest to it, cell by cell for all queries at once.

Q queries, N pool vectors, K cells, W cells a query visits, k neighbours, C candidates.
"""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from ... import console
from ...store.vectors import RELEASED_BYTES, Float32, Float64, Int64, Vectors, release
from ..threads import map_in_order, workers
from .candidates import Best, no_progress
from .cells import Cells, Int32, open_cells
from .exact_search import Identity, Neighbors, SearchSettings, exact_neighbors, num_candidates_for, settle
from .products import product, unit_rows
from .similarity import similarities, tolerance

MEASURED_QUERIES = 512  # chosen: queries that are searched exactly too
QUERY_ROWS, LEAST_ROWS = 65_536, 1_024  # queries that go through the cells together
VISITS = 1 << 24  # chosen: visits, of a query to a cell, that are sorted at a time; 320 MB
SETTLED_QUERIES = 4_096
VISITORS = 1_024  # of a cell whose products are in a core's cache


def cell_neighbors(
    queries: Vectors,
    pool: Vectors,
    k: int,
    *,
    order: Int64,
    identity: Identity | None,
    above: float,
    search: SearchSettings,
    progress: str | None,
) -> Neighbors:
    """Return the k nearest of the pool vectors in the cells that a query visits; k is cut to N.

    How many it visits is measured: as many as hold the share `search.recall` of the true neighbours of a sample.
    """
    k = min(k, len(pool))
    cells = open_cells(pool, search.seed)
    by_cell, order = cells.vectors(pool), order[cells.ids]
    if identity is not None:
        identity = Identity(identity.queries, identity.pool[cells.ids])
    width, recall = _measured_width(queries, by_cell, cells, k, order, identity, above, search)
    console.say(
        f"{len(queries):,} queries of {len(pool):,} vectors by cells, {width:,} of {len(cells.centroids):,} each, for"
        f" all would be {len(queries) * len(pool) * pool.dim:.1e} products: measured on a sample, this finds"
        f" {recall:.4f} of the neighbours (--recall {search.recall:g})"
    )
    neighbors = Neighbors(np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf), recall)
    num = num_candidates_for(k, len(pool), identity)
    step = max(LEAST_ROWS, min(QUERY_ROWS, VISITS // width))
    total = len(cells.centroids) * -(-len(queries) // step)
    bar = nullcontext(no_progress) if progress is None else console.progress(progress, total, "cells")
    with bar as advance:
        for start in range(0, len(queries), step):
            rows = np.arange(start, min(start + step, len(queries)))
            visited = _visited(queries, rows, cells, width)
            found, approximate = _candidates(queries, rows, by_cell, cells, visited, num, advance)
            for part in range(0, len(rows), SETTLED_QUERIES):
                some = slice(part, part + SETTLED_QUERIES)
                candidates = found[some].astype(np.int64), approximate[some]
                left = settle(neighbors, rows[some], *candidates, queries, by_cell, order, identity, above)
                for row in left.tolist():
                    _search_again(neighbors, row, visited[row - start], queries, by_cell, cells, order, identity, above)
    np.copyto(neighbors.indices, cells.ids[neighbors.indices], where=neighbors.indices >= 0)
    return neighbors


def _measured_width(
    queries: Vectors,
    by_cell: Vectors,
    cells: Cells,
    k: int,
    order: Int64,
    identity: Identity | None,
    above: float,
    search: SearchSettings,
) -> tuple[int, float]:
    """Return how many cells a query must visit to find the wanted share of its neighbours, and the share it finds."""
    sample = np.unique(np.linspace(0, len(queries) - 1, min(len(queries), MEASURED_QUERIES)).astype(np.int64))
    sampled = None if identity is None else Identity(identity.queries[sample], identity.pool)
    some = queries.take(sample)
    found = exact_neighbors(
        some, by_cell, k, order=order, identity=sampled, above=above, progress="measuring recall"
    ).indices
    query, column = np.nonzero(found >= 0)
    if not len(query):
        return 1, 1.0
    products = torch.from_numpy(some.unit(0, len(some)) @ cells.centroids.T)
    place = np.empty(products.shape, np.int32)
    np.put_along_axis(
        place, products.argsort(dim=1, descending=True).numpy(), np.arange(products.shape[1])[None], axis=1
    )
    needed = np.sort(place[query, cells.nearest[found[query, column], 0]]) + 1
    aim = search.recall + (1 - search.recall) / 4  # what is measured is a sample
    width = int(needed[min(int(np.ceil(aim * len(needed))), len(needed)) - 1])
    return width, float((needed <= width).mean())


def _visited(queries: Vectors, rows: Int64, cells: Cells, width: int) -> Int32:
    """Return the cells that queries at `rows` visit, (B, W)."""
    centroids = unit_rows(cells.centroids)
    step = max(1, (1 << 23) // len(centroids))
    visited = np.empty((len(rows), width), np.int32)

    def visit(start: int) -> None:
        points = unit_rows(queries.array[queries.rows[rows[start : start + step]]])
        products = torch.from_numpy(product(points, centroids))
        visited[start : start + step] = products.topk(width, dim=1).indices.numpy()

    with workers() as threads:
        for _ in map_in_order(visit, range(0, len(rows), step), threads):
            pass
    return visited


def _candidates(
    queries: Vectors,
    rows: Int64,
    by_cell: Vectors,
    cells: Cells,
    visited: Int32,
    num: int,
    advance: Callable[..., None],
) -> tuple[Int64, Float32]:
    """Return the `num` nearest rows of the visited cells by float32 (B, C) and their similarities, in no order."""
    best = Best(len(rows), num)
    points = unit_rows(queries.array[queries.rows[rows]])
    release(queries.array)
    by_visit = np.argsort(visited.reshape(-1), kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(visited.reshape(-1), minlength=len(cells.centroids)))])

    def compare(cell: int) -> list[tuple[Int64, Int64, Float32, Int64]]:
        visiting = by_visit[bounds[cell] : bounds[cell + 1]] // visited.shape[1]
        members = cells.members(cell)
        if not len(visiting) or members.start == members.stop:
            return []
        right = unit_rows(by_cell.array[members])
        parts = []
        for start in range(0, len(visiting), VISITORS):
            some = visiting[start : start + VISITORS]
            products = product(points[torch.from_numpy(some)], right)
            query, column = best.near(some, products)
            parts.append((some, query, products[query, column], column + members.start))
        return parts

    passed = 0
    with workers() as threads:
        for cell, parts in enumerate(map_in_order(compare, range(len(cells.centroids)), threads)):
            advance()
            for some, query, products, positions in parts:
                best.add_of(some, query, products, positions)
            passed += (cells.offsets[cell + 1] - cells.offsets[cell]) * by_cell.dim * by_cell.array.itemsize
            if passed > RELEASED_BYTES:
                passed = 0
                release(by_cell.array)
    values, positions = best.found()
    return np.where(values > -np.inf, positions, -1), values


def _search_again(
    neighbors: Neighbors,
    row: int,
    visited: Int32,
    queries: Vectors,
    by_cell: Vectors,
    cells: Cells,
    order: Int64,
    identity: Identity | None,
    above: float,
) -> None:
    """Search the visited cells for one query, with all that could reach its k-th place in float64."""
    places = np.concatenate([np.arange(cells.offsets[cell], cells.offsets[cell + 1]) for cell in np.sort(visited)])
    if identity is not None:
        places = places[identity.pool[places] != identity.queries[row]]
    kth = max(float(neighbors.similarities[row, -1]), above)
    query = queries.unit(row, row + 1)[0]
    near: Float64 = by_cell.take(places).unit(0, len(places)) @ query
    places = places[near >= kth - tolerance(by_cell.dim)]
    exact = similarities(queries, np.full(len(places), row), by_cell, places)
    places, exact = places[exact > above], exact[exact > above]
    best = np.lexsort((order[places], -exact))[: neighbors.indices.shape[1]]
    neighbors.indices[row], neighbors.similarities[row] = -1, -np.inf
    neighbors.indices[row, : len(best)], neighbors.similarities[row, : len(best)] = places[best], exact[best]
