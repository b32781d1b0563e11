"""The exact self-join by bounds: a cell that cannot hold a neighbour above the threshold is not probed.

Of two vectors nearer than a chord r, one in cell a and one in cell b, neither is farther than r from the plane half
way between the two centroids, except as far as a vector may be nearer to another centroid than to its own.

N rows, D numbers a vector, K cells.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ... import console
from ...store.vectors import Float32, Float64, Int64, Vectors
from ..threads import map_in_order, workers
from .cells import Cells, evenly_spread
from .products import product, unit_rows
from .similarity import tolerance

SAMPLE_ROWS = 2_048  # chosen: rows by which it is measured how much the bounds leave
PRODUCTS = 1 << 23  # numbers a product
BATCH_CELLS = 64  # chosen: cells whose probing rows are found together
WORTH_IT = 0.7  # chosen: share of the pairs left by the bounds from which all with all is as quick

Task = tuple[Int64 | slice, slice]  # rows to compare with a run of rows; with those after them if it is the same run


def bounded_batches(vectors: Vectors, cells: Cells, threshold: float) -> list[Iterator[Task]] | None:
    """Return what compares every row with all that can be above the threshold to it; None where that is most.

    Args:
        vectors: those of the cells, in the cells' order.
    """
    chord = float(np.sqrt(max(2 - 2 * threshold, 0.0)))
    centroids = unit_rows(cells.centroids)
    sizes = np.diff(cells.offsets)

    sample = evenly_spread(len(cells), SAMPLE_ROWS)
    own = np.asarray(cells.nearest[sample, 0])
    products = product(unit_rows(vectors.array[sample]), centroids)
    farther = np.take_along_axis(products, own[:, None].astype(np.int64), axis=1) - products
    between = torch.cdist(centroids[own.tolist()], centroids).cpu().numpy()  # (S, K)
    share = float(((farther <= chord * between) @ sizes).mean()) / len(cells)
    console.detail(f"bounds leave {share:.1%} of the pairs")
    if share > WORTH_IT:
        return None
    similarity, slack = _own_similarity(vectors, cells)

    def tasks(first: int, last: int) -> Iterator[Task]:
        between = torch.cdist(centroids, centroids[first:last]).cpu().numpy()  # (K, cells of the batch)
        allowed = chord * between + slack[first:last] + 1e-4 + 2 * tolerance(vectors.dim)  # cdist errs by less
        probing = list(_probing_rows(vectors, cells, similarity, allowed, first, last))
        for cell in range(first, last):
            members = cells.members(cell)
            yield members, members
            rows = np.concatenate([part[cell - first] for part in probing])
            if len(rows) and members.start < members.stop:
                yield rows, members

    return [tasks(first, min(first + BATCH_CELLS, len(sizes))) for first in range(0, len(sizes), BATCH_CELLS)]


def _own_similarity(vectors: Vectors, cells: Cells) -> tuple[Float32, Float32]:
    """Return the similarity of every row to its own centroid, (N,), and of each cell the most by which any is larger.

    Cells are found in two steps, so that a row's cell need not be the very nearest.
    """
    centroids = unit_rows(cells.centroids)
    step = max(1, PRODUCTS // len(centroids))
    similarity, slack = np.empty(len(cells), np.float32), np.zeros(len(centroids), np.float32)

    def block(start: int) -> tuple[Int64, Float32]:
        stop = min(start + step, len(cells))
        own = cells.nearest[start:stop, 0].astype(np.int64)
        products = product(unit_rows(vectors.array[start:stop]), centroids)
        similarity[start:stop] = np.take_along_axis(products, own[:, None], axis=1)[:, 0]
        return own, products.max(axis=1) - similarity[start:stop]

    with workers() as threads, console.progress("finding bounds", len(cells), "vectors") as advance:
        for own, nearer in map_in_order(block, range(0, len(cells), step), threads):
            np.maximum.at(slack, own, nearer)
            advance(len(own))
    return similarity, slack


def _probing_rows(
    vectors: Vectors, cells: Cells, similarity: Float32, allowed: Float32 | Float64, first: int, last: int
) -> Iterator[list[Int64]]:
    """Yield for blocks of rows in cells before each of the cells `first` to `last` those that must probe it."""
    centroids = unit_rows(cells.centroids[first:last])
    step = max(1, PRODUCTS // (last - first) // 16)
    for start in range(0, int(cells.offsets[last]), step):
        stop = min(start + step, int(cells.offsets[last]))
        own = cells.nearest[start:stop, 0].astype(np.int64)
        farther = similarity[start:stop, None] - product(unit_rows(vectors.array[start:stop]), centroids)
        probes = (farther <= allowed[own]) & (own[:, None] < np.arange(first, last))
        yield [np.flatnonzero(column) + start for column in probes.T]
