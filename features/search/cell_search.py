"""Nearest neighbours by an inverted file: each query probes its nearest cells, cell by cell for all queries at once.

Q queries, N pool vectors, K cells, W cells a query probes, k neighbours, C candidates.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from ... import console
from ...store.vectors import Float32, Int32, Int64, PageRelease, Vectors, release
from ..grouping import group_by
from ..threads import map_in_order, workers
from .candidates import TopK
from .cells import Cells, evenly_spread, open_cells
from .exact_search import Identity, KnnTask, Neighbors, SearchSettings, exact_neighbors, rerank, scan
from .products import product, unit_rows

MEASURED_QUERIES = 512  # chosen: queries that are searched exactly too
QUERY_ROWS, MIN_QUERY_ROWS = 65_536, 1_024  # queries that go through the cells together
PROBES = 1 << 24  # chosen: pairs of a query and a cell that are sorted at a time; 320 MB
PROBING_ROWS = 1_024  # chosen: queries of a product with a cell, which is then in a core's cache


def cell_neighbors(task: KnnTask, search: SearchSettings, progress: str | None) -> Neighbors:
    """Return the k nearest of the pool vectors in the cells that a query probes.

    How many it probes is measured: as many as hold the share `search.recall` of the true neighbours of a sample.
    """
    cells = open_cells(task.pool, search.seed)
    by_cell = task.within(cells.vectors(task.pool), cells.ids)
    num_probes, recall = _measured_probes(by_cell, cells, search.recall)
    num_queries = len(task.queries)
    console.say(
        f"{num_queries:,} queries of {len(cells):,} vectors, {num_probes:,} of {len(cells.centroids):,} cells probed"
        f" each, for all would be {num_queries * len(cells) * task.pool.dim:.1e} products: measured on a sample, this"
        f" finds {recall:.4f} of the neighbours (--recall {search.recall:g})"
    )
    neighbors = replace(task.no_neighbors(), recall=recall)
    num = by_cell.num_candidates()
    step = max(MIN_QUERY_ROWS, min(QUERY_ROWS, PROBES // num_probes))
    total = len(cells.centroids) * -(-num_queries // step)
    with console.progress(progress, total, "cells") as advance:
        for start in range(0, num_queries, step):
            rows = np.arange(start, min(start + step, num_queries))
            probed = _probed(task.queries, rows, cells, num_probes)
            found, approximate = _candidates(by_cell, rows, cells, probed, num, advance)
            for row in rerank(by_cell, rows, found, approximate, neighbors).tolist():
                _scan_cells(by_cell, row, cells, probed[row - start], neighbors)
    np.copyto(neighbors.indices, cells.ids[neighbors.indices], where=neighbors.indices >= 0)
    return neighbors


def _measured_probes(task: KnnTask, cells: Cells, recall: float) -> tuple[int, float]:
    """Return how many cells a query must probe to find the share `recall` of its neighbours, and the share it finds."""
    sample = evenly_spread(len(task.queries), MEASURED_QUERIES)
    identity = None if task.identity is None else Identity(task.identity.queries[sample], task.identity.pool)
    sampled = replace(task, queries=task.queries.take(sample), identity=identity)
    found = exact_neighbors(sampled, progress="measuring recall").indices
    query, column = np.nonzero(found >= 0)
    if not len(query):
        return 1, 1.0
    products = torch.from_numpy(sampled.queries.unit(0, len(sample)) @ cells.centroids.T)
    place = np.empty(products.shape, np.int32)
    by_nearness = products.argsort(dim=1, descending=True).numpy()
    np.put_along_axis(place, by_nearness, np.arange(products.shape[1])[None], axis=1)
    needed = np.sort(place[query, cells.nearest[found[query, column], 0]]) + 1
    aim = recall + (1 - recall) / 4  # what is measured is a sample
    num_probes = int(needed[min(int(np.ceil(aim * len(needed))), len(needed)) - 1])
    return num_probes, float((needed <= num_probes).mean())


def _probed(queries: Vectors, rows: Int64, cells: Cells, num_probes: int) -> Int32:
    """Return the cells that queries at `rows` probe, (B, W)."""
    centroids = unit_rows(cells.centroids)
    step = max(1, (1 << 23) // len(centroids))

    def nearest(start: int) -> Int32:
        points = unit_rows(queries.array[queries.rows[rows[start : start + step]]])
        products = torch.from_numpy(product(points, centroids))
        return products.topk(num_probes, dim=1).indices.int().numpy()

    with workers() as threads:
        return np.concatenate(list(map_in_order(nearest, range(0, len(rows), step), threads)))


def _candidates(
    task: KnnTask, rows: Int64, cells: Cells, probed: Int32, num: int, advance: Callable[..., None]
) -> tuple[Int64, Float32]:
    """Return the `num` nearest rows of the probed cells by float32 (B, C), in no order, and their similarities."""
    pool = task.pool
    best = TopK(len(rows), num)
    points = unit_rows(task.queries.array[task.queries.rows[rows]])
    release(task.queries.array)
    probes = group_by(probed.reshape(-1), len(cells.centroids))

    def compare(cell: int) -> list[tuple[Int64, Int64, Float32, Int64]]:
        probing = probes.of(cell) // probed.shape[1]
        members = cells.members(cell)
        if not len(probing) or members.start == members.stop:
            return []
        right = unit_rows(pool.array[members])
        parts = []
        for start in range(0, len(probing), PROBING_ROWS):
            some = probing[start : start + PROBING_ROWS]
            products = product(points[torch.from_numpy(some)], right)
            query, column = best.passing(some, products)
            parts.append((some, query, products[query, column], column + members.start))
        return parts

    pages = PageRelease(pool.array)
    with workers() as threads:
        for cell, parts in enumerate(map_in_order(compare, range(len(cells.centroids)), threads)):
            advance()
            for part in parts:
                best.add_pairs(*part)
            pages.add(cells.stored[cells.members(cell)].nbytes)
    values, positions = best.found()
    return np.where(values > -np.inf, positions, -1), values


def _scan_cells(task: KnnTask, row: int, cells: Cells, probed: Int32, neighbors: Neighbors) -> None:
    """Search the probed cells for one query, with all that could reach its k-th place in float64."""
    bounds = [cells.members(cell) for cell in np.sort(probed).tolist()]
    places = np.concatenate([np.arange(members.start, members.stop) for members in bounds])
    scan(task.within(task.pool.take(places), places), np.array([row]), neighbors)
    found = neighbors.indices[row]
    neighbors.indices[row] = np.where(found >= 0, places[found], -1)
