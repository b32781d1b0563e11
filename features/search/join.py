"""The self-join: components of the graph of similarities above a threshold, and every vector's degree in it.

N vectors, D numbers a vector, K cells, P nearest cells of a row, E pairs.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ... import console
from ...store.manifest import Provenance
from ...store.progress import Progress
from ...store.vectors import RELEASED_BYTES, RELEASED_ROWS, Bools, Int64, PageRelease, Vectors, release
from ..threads import map_in_order, workers
from .cells import Cells, cells_key, open_cells
from .exact_search import DEFAULTS, EXACT_PRODUCTS, SearchSettings
from .graph import Graph
from .probes import probe_radius
from .products import TILE, tile_above, unit_rows

MORE = 3  # chosen: so many times the usual number of nearest cells, where that is too few
EXACT_ROWS = 4_096  # rows a block of the exact join
OWN_ROWS = 256  # rows a tile where a run meets itself: half of the products are the other half's
PROBE_ROWS = 65_536  # rows whose probed cells are listed at a time
TASK_ROWS = 4_096  # chosen: rows of a task, so that no task takes long and no thread waits long for another's
AHEAD = 32  # chosen: tasks that wait for each thread, for they differ in size
BATCHES = 100  # chosen: into so many parts the cells are divided; after each the join can be resumed

Task = tuple[Int64 | slice, slice]  # rows to compare with a run of rows; with those after them if it is the same run
Once = Callable[[Int64, Int64], Bools]


@dataclass(frozen=True)
class Components:
    """Connected components."""

    labels: Int64  # (N,) the smallest position of every vector's component
    degree: Int64  # (N,) the weight of the others above the threshold; where it is `enough` or more, at least that
    recall: float  # measured share of the pairs above the threshold that were found; 1: exact


def components_above(
    vectors: Vectors, threshold: float, *, weights: Int64, enough: int, search: SearchSettings = DEFAULTS
) -> Components:
    """Return the connected components of the graph of similarities above a threshold.

    Compares all with all where that takes a few minutes at most or `search.recall` is 1, else cell by cell. Two vectors
    of one component that both have `enough` others are not compared, for it would change nothing: a crowd of
    near-copies costs a strip of its pairs, not all of them. A join that was stopped resumes when it is called again.

    Args:
        weights: (N,) how many images a vector stands for.
    """
    num = len(vectors)
    products = num * num * vectors.dim
    if products <= EXACT_PRODUCTS or search.recall >= 1:
        tell = console.say if products > EXACT_PRODUCTS / 100 else console.detail
        why = "a matter of minutes at most" if products <= EXACT_PRODUCTS else "as --recall 1 asks"
        tell(f"comparing all {num:,} vectors with all, {products:.1e} products: {why}")
        key = cells_key(vectors, search.seed, 0)
        plan = Plan(vectors, np.arange(num), exact_batches(num), (vectors.array,), key)
    else:
        plan = _plan_by_cells(vectors, threshold, search)

    graph = Graph(weights[plan.ids], enough)
    weights_key = hashlib.blake2b(weights.tobytes(), digest_size=16).hexdigest()
    details = plan.key, weights_key, threshold, enough, plan.radius
    _join(graph, plan, threshold, Progress(Provenance("graph", "join", {}, search.seed), *details))

    smallest = np.full(num, num)
    components = graph.components()
    np.minimum.at(smallest, components, plan.ids)  # the smallest position of each component, at its root
    labels, degree = np.empty(num, np.int64), np.empty(num, np.int64)
    labels[plan.ids] = smallest[components]
    degree[plan.ids] = graph.degree
    return Components(labels, degree, plan.recall)


@dataclass(frozen=True)
class Plan:
    """What a join compares. Tasks count the vectors in the plan's order."""

    vectors: Vectors
    ids: Int64  # (N,) the position of each before
    batches: list[Iterator[Task]]
    mapped: tuple[npt.NDArray[np.generic], ...]  # arrays whose pages are given back
    key: str  # a hash of the vectors and of their order
    recall: float = 1.0
    radius: float = np.inf
    once: Once | None = None


def _plan_by_cells(vectors: Vectors, threshold: float, search: SearchSettings) -> Plan:
    """Return what compares all pairs in cells within a measured radius."""
    cells = open_cells(vectors, search.seed)
    radius, recall = probe_radius(cells.vectors(vectors), cells, threshold, search)
    if recall < search.recall:
        console.say(f"{cells.nearest.shape[1]} cells a vector hold {recall:.4f} of the pairs: probing more")
        cells = open_cells(vectors, search.seed, MORE)
        radius, recall = probe_radius(cells.vectors(vectors), cells, threshold, search)
    console.say(
        f"{len(vectors):,} vectors, {len(vectors) ** 2 * vectors.dim:.1e} products if all are compared: comparing cell"
        f" by cell. Measured on a sample, this finds {recall:.4f} of the pairs above {threshold:.4g}"
        f" (--recall {search.recall:g})"
    )
    if recall < search.recall:
        console.warn(f"--recall {search.recall:g} is not reached, {recall:.4f} is the most; --recall 1 compares all")
    by_cell = cells.vectors(vectors)
    mapped = by_cell.array, cells.nearest, cells.gaps
    key = cells_key(vectors, search.seed, cells.nearest.shape[1])
    batches, once = probe_batches(cells, radius), partial(_is_once, cells, radius)
    return Plan(by_cell, cells.ids, batches, mapped, key, recall, radius, once)


def exact_batches(num: int) -> list[Iterator[Task]]:
    """Return what compares every row with every other, a block of rows with all after it at a time."""
    blocks = [slice(start, min(start + EXACT_ROWS, num)) for start in range(0, num, EXACT_ROWS)]
    return [zip(repeat(left), blocks[number:]) for number, left in enumerate(blocks)]


def probe_batches(cells: Cells, radius: float) -> list[Iterator[Task]]:
    """Return what compares the rows of every cell with each other and with those that probe it."""
    num_cells = len(cells.centroids)
    bounds = np.unique(np.linspace(0, num_cells, BATCHES + 1).astype(np.int64)).tolist()
    probing, offsets = _probing_rows(cells, radius)

    def tasks(first: int, last: int) -> Iterator[Task]:
        for cell in range(first, last):
            members = cells.members(cell)
            yield members, members
            for start in range(offsets[cell], offsets[cell + 1], TASK_ROWS):
                yield probing[start : min(start + TASK_ROWS, offsets[cell + 1])].astype(np.int64), members

    return [tasks(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]


def _probing_rows(cells: Cells, radius: float) -> tuple[Int64, Int64]:
    """Return the rows that probe each cell but their own, rising, one cell after the other, and where each begins.

    They are counted first and then put in place, or they would be in memory several times.
    """
    num_cells = len(cells.centroids)
    counts = np.zeros(num_cells, np.int64)
    for probed, _ in _probes(cells, radius):
        counts += np.bincount(probed, minlength=num_cells)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    probing = np.empty(offsets[-1], np.int32 if len(cells) < 2**31 else np.int64)
    free = offsets[:-1].copy()
    for probed, rows in _probes(cells, radius):
        by_cell = np.argsort(probed, kind="stable")
        probed, rows = probed[by_cell], rows[by_cell]
        probing[free[probed] + np.arange(len(probed)) - np.searchsorted(probed, probed)] = rows
        free += np.bincount(probed, minlength=num_cells)
    return probing, offsets


def _probes(cells: Cells, radius: float) -> Iterator[tuple[Int64, Int64]]:
    """Yield probed cells (E,) and the rows that probe them (E,), some thousand rows at a time."""
    for start in range(0, len(cells), PROBE_ROWS):
        rows = slice(start, start + PROBE_ROWS)
        row, place = np.nonzero(cells.gaps[rows, 1:] <= radius)
        yield cells.nearest[rows, 1:][row, place].astype(np.int64), row + start
        release(cells.gaps)
        release(cells.nearest)


def _is_once(cells: Cells, radius: float, row: Int64, member: Int64) -> Bools:
    """Tell which pairs (probing row, member) are not found the other way round in an earlier cell too."""
    own, probed = cells.nearest[row, 0], cells.nearest[member, 0]
    back = (cells.nearest[member, 1:] == own[:, None]) & (cells.gaps[member, 1:] <= radius)
    is_once: Bools = (own <= probed) | ~back.any(axis=1)
    return is_once


def _join(graph: Graph, plan: Plan, threshold: float, progress: Progress) -> None:
    """Do all tasks; `progress` keeps how far they are."""
    done, vectors, batches = 0, plan.vectors, plan.batches
    if (kept := progress.load("graph")) is not None:
        graph.parent, graph.degree, done = kept["parent"], kept["degree"], int(kept["done"])
        console.say(f"resuming an earlier search: {done / len(batches):.0%} is done")

    def compare(task: Task) -> int:
        _compare(graph, vectors, threshold, task, plan.once)
        left, right = task
        in_sequence = (right.stop - right.start) * vectors.dim * vectors.array.itemsize
        here_and_there = 0 if isinstance(left, slice) else len(left) * (RELEASED_BYTES // RELEASED_ROWS)
        return int(in_sequence + here_and_there)

    pages = PageRelease(*plan.mapped)
    with workers() as threads, console.progress("comparing", len(batches) - done, "parts") as advance:
        for number in range(done, len(batches)):
            for num_bytes in map_in_order(compare, batches[number], threads, AHEAD * threads.count):
                pages.add(num_bytes)
            advance()
            if progress.due():
                progress.save("graph", parent=graph.parent, degree=graph.degree, done=number + 1)
    progress.remove()


def _compare(graph: Graph, vectors: Vectors, threshold: float, task: Task, once: Once | None) -> None:
    """Add the pairs above the threshold of a task's rows, a tile at a time."""
    left_run, right_run = task
    right = unit_rows(vectors.array[vectors.rows[right_run]])
    right_rows = np.arange(right_run.start, right_run.stop)
    is_same = isinstance(left_run, slice) and left_run == right_run
    left_rows = np.arange(left_run.start, left_run.stop) if isinstance(left_run, slice) else left_run
    step = OWN_ROWS if is_same else TILE[0]
    for start in range(0, len(left_rows), step):
        rows = left_rows[start : start + step]
        left = right[start : start + len(rows)] if is_same else unit_rows(vectors.array[vectors.rows[rows]])
        first = start if is_same else 0
        for near, near_rows, others, other_rows in _open(graph, left, rows, right[first:], right_rows[first:]):
            for column in range(0, len(other_rows), TILE[1]):
                part = slice(column, column + TILE[1])
                one, other = tile_above(near, near_rows, others[part], other_rows[part], vectors, threshold)
                one, other = near_rows[one], other_rows[part][other]
                if is_same:
                    after = other > one
                    one, other = one[after], other[after]
                elif once is not None and len(one):
                    is_once = once(one, other)
                    one, other = one[is_once], other[is_once]
                graph.add(one, other)


def _open(
    graph: Graph, left: Tensor, left_rows: Int64, right: Tensor, right_rows: Int64
) -> Iterator[tuple[Tensor, Int64, Tensor, Int64]]:
    """Yield what of left (B, D) and right (C, D) must be compared."""
    left_closed, right_closed = graph.closed(left_rows, right_rows)
    if not left_closed.any() or not right_closed.any():
        yield left, left_rows, right, right_rows
        return
    rows, columns = np.flatnonzero(left_closed), np.flatnonzero(~right_closed)
    if len(columns):
        yield left[rows], left_rows[rows], right[columns], right_rows[columns]
    if not left_closed.all():
        rows = np.flatnonzero(~left_closed)
        yield left[rows], left_rows[rows], right, right_rows
