"""The self-join: which vectors hang together by similarities above a threshold, and how many are above it to each.

N vectors, D numbers a vector, K cells, P nearest cells of a row, E pairs.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ... import console
from ...store.cache import cache_folder
from ...store.vectors import RELEASED_BYTES, RELEASED_ROWS, Bools, Int64, Vectors, release
from ..threads import map_in_order, workers
from .bounds import bounded_batches
from .cells import Cells, cells_key, open_cells
from .exact_search import DEFAULTS, EXACT_PRODUCTS, SearchSettings
from .graph import Graph
from .probes import join_width
from .products import TILE, tile_above, unit_rows
from .tasks import Batch, Task

MORE = 3  # chosen: so many times the usual number of nearest cells, where that is too few
EXACT_ROWS = 4_096  # rows a block of the exact join
OWN_ROWS = 256  # rows a tile where a run meets itself: half of the products are the other half's
VISIT_ROWS = 65_536  # rows whose visits are looked up at a time
VISITORS = 4_096  # chosen: of a task, so that no task takes long and no thread waits long for another's
AHEAD = 32  # chosen: tasks that wait for each thread, for they differ in size
BATCHES = 100  # chosen: into so many parts the cells are divided; after each the join can be continued


@dataclass(frozen=True)
class Joined:
    """What hangs together."""

    labels: Int64  # (N,) the smallest position of every vector's component
    degree: Int64  # (N,) the weight of the others above the threshold; where it is `enough` or more, at least that
    recall: float  # measured share of the pairs above the threshold that were found; 1: exact


def components_above(
    vectors: Vectors, threshold: float, *, weights: Int64, enough: int, search: SearchSettings = DEFAULTS
) -> Joined:
    """Return the connected components of the graph of similarities above a threshold.

    Compares all with all where that takes a few minutes at most, else cell by cell. Two vectors that both have
    `enough` others already and are of one component need not be compared, it would change nothing: a crowd of
    near-copies costs a strip of its pairs, not all of them. A join that is stopped goes on where it was when it is
    called again.

    Args:
        weights: (N,) for how many images a vector stands.
    """
    num = len(vectors)
    products = num * num * vectors.dim
    if products <= EXACT_PRODUCTS:
        tell = console.say if products > EXACT_PRODUCTS / 100 else console.detail
        tell(f"comparing all {num:,} vectors with all: {products:.1e} products are a matter of minutes at most")
        graph = Graph(weights, enough)
        _join(graph, vectors, threshold, exact_batches(num), None, (vectors.array,), None)
        return Joined(graph.components(), graph.degree, 1.0)

    cells = open_cells(vectors, search.seed)
    by_cell = cells.vectors(vectors)
    keep = None
    if search.recall >= 1:
        width, recall = np.inf, 1.0
        bounded = bounded_batches(by_cell, cells, threshold)
        how = "all with all" if bounded is None else "all that bounds do not exclude"
        console.say(f"{num:,} vectors, {products:.1e} products: comparing {how}, as --recall 1 asks")
        batches = exact_batches(num) if bounded is None else bounded
    else:
        width, recall = join_width(by_cell, cells, threshold, search)
        if recall < search.recall:
            console.say(f"{cells.nearest.shape[1]} cells a vector hold {recall:.4f} of the pairs: looking in more")
            cells = open_cells(vectors, search.seed, MORE)
            by_cell = cells.vectors(vectors)
            width, recall = join_width(by_cell, cells, threshold, search)
        console.say(
            f"comparing {num:,} vectors cell by cell, for all with all would be {products:.1e} products: measured on a"
            f" sample, this finds {recall:.4f} of the pairs above {threshold:.4g} (--recall {search.recall:g})"
        )
        if recall < search.recall:
            console.warn(
                f"--recall {search.recall:g} is not reached, {recall:.4f} is the most; --recall 1 compares all"
            )
        batches = visit_batches(cells, width)
        keep = _once(cells, width)
    graph = Graph(weights[cells.ids], enough)
    settings = repr(
        (cells_key(vectors, search.seed, cells.nearest.shape[1]), threshold, enough, search.recall >= 1, width)
    )
    digest = hashlib.blake2b(settings.encode() + weights.tobytes(), digest_size=16)
    mapped = (by_cell.array, cells.nearest, cells.gaps)
    _join(graph, by_cell, threshold, batches, keep, mapped, cache_folder() / f"{digest.hexdigest()}-join.npy")

    smallest = np.full(num, num)
    components = graph.components()
    np.minimum.at(smallest, components, cells.ids)  # the smallest position of each component, at its root
    labels, degree = np.empty(num, np.int64), np.empty(num, np.int64)
    labels[cells.ids] = smallest[components]
    degree[cells.ids] = graph.degree
    return Joined(labels, degree, recall)


def exact_batches(num: int) -> list[Batch]:
    """Return what compares every row with every other, a block of rows with all after it at a time."""
    blocks = [slice(start, min(start + EXACT_ROWS, num)) for start in range(0, num, EXACT_ROWS)]

    def batch(number: int) -> Batch:
        return lambda: (Task(blocks[number], right) for right in blocks[number:])

    return [batch(number) for number in range(len(blocks))]


def visit_batches(cells: Cells, width: float) -> list[Batch]:
    """Return what compares the rows of every cell with each other and with those that visit it."""
    num_cells = len(cells.centroids)
    bounds = np.unique(np.linspace(0, num_cells, BATCHES + 1).astype(np.int64)).tolist()
    visitors, offsets = _visitors(cells, width)

    def batch(first: int, last: int) -> Batch:
        def tasks() -> Iterator[Task]:
            for cell in range(first, last):
                members = cells.members(cell)
                yield Task(members, members)
                for start in range(offsets[cell], offsets[cell + 1], VISITORS):
                    visiting = visitors[start : min(start + VISITORS, offsets[cell + 1])]
                    yield Task(visiting.astype(np.int64), members)

        return tasks

    return [batch(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True)]


def _visitors(cells: Cells, width: float) -> tuple[Int64, Int64]:
    """Return the rows that visit each cell but their own, rising, one cell after the other, and where each begins.

    Counted first and put in place then, or they would be in memory several times.
    """
    num_cells = len(cells.centroids)
    counts = np.zeros(num_cells, np.int64)
    for visited, _ in _visits(cells, width):
        counts += np.bincount(visited, minlength=num_cells)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    visitors = np.empty(offsets[-1], np.int32 if len(cells) < 2**31 else np.int64)
    free = offsets[:-1].copy()
    for visited, rows in _visits(cells, width):
        by_cell = np.argsort(visited, kind="stable")
        visited, rows = visited[by_cell], rows[by_cell]
        visitors[free[visited] + np.arange(len(visited)) - np.searchsorted(visited, visited)] = rows
        free += np.bincount(visited, minlength=num_cells)
    return visitors, offsets


def _visits(cells: Cells, width: float) -> Iterator[tuple[Int64, Int64]]:
    """Yield visited cells (E,) and the rows that visit them (E,), some thousand rows at a time."""
    for start in range(0, len(cells), VISIT_ROWS):
        rows = slice(start, start + VISIT_ROWS)
        row, place = np.nonzero(cells.gaps[rows, 1:] <= width)
        yield cells.nearest[rows, 1:][row, place].astype(np.int64), row + start
        release(cells.gaps)
        release(cells.nearest)


def _once(cells: Cells, width: float) -> Callable[[Int64, Int64], Bools]:
    """Return what tells which pairs (visitor, member) are not found the other way round as well, in a cell before."""

    def keep(visitor: Int64, member: Int64) -> Bools:
        own, visited = cells.nearest[visitor, 0], cells.nearest[member, 0]
        back = (cells.nearest[member, 1:] == own[:, None]) & (cells.gaps[member, 1:] <= width)
        once: Bools = (own <= visited) | ~back.any(axis=1)
        return once

    return keep


def _join(
    graph: Graph,
    vectors: Vectors,
    threshold: float,
    batches: list[Batch],
    keep: Callable[[Int64, Int64], Bools] | None,
    mapped: Sequence[npt.NDArray[np.generic]],
    kept: Path | None,
) -> None:
    """Do all tasks, and keep in the file `kept` how far they are; of what is `mapped`, pages are given back."""
    done = 0 if kept is None else graph.load(kept)
    if done:
        console.say(f"going on with an earlier search: {done / len(batches):.0%} is done")

    def compare(task: Task) -> int:
        _compare(graph, vectors, threshold, task, keep)
        in_sequence = (task.right.stop - task.right.start) * vectors.dim * vectors.array.itemsize
        visiting = 0 if isinstance(task.left, slice) else len(task.left)
        return int(in_sequence + visiting * (RELEASED_BYTES // RELEASED_ROWS))

    passed = 0
    with workers() as threads, console.progress("comparing", len(batches) - done, "parts") as advance:
        for number in range(done, len(batches)):
            for read in map_in_order(compare, batches[number](), threads, AHEAD * threads.count):
                passed += read
                if passed > RELEASED_BYTES:
                    passed = 0
                    for array in mapped:
                        release(array)
            advance()
            if kept is not None:
                graph.save(kept, number + 1)
    if kept is not None:
        kept.unlink(missing_ok=True)


def _compare(
    graph: Graph,
    vectors: Vectors,
    threshold: float,
    task: Task,
    keep: Callable[[Int64, Int64], Bools] | None,
) -> None:
    """Enter the pairs above the threshold of a task's rows, a tile at a time."""
    right = unit_rows(vectors.array[vectors.rows[task.right]])
    right_rows = np.arange(task.right.start, task.right.stop)
    is_same = isinstance(task.left, slice) and task.left == task.right
    left_rows = np.arange(task.left.start, task.left.stop) if isinstance(task.left, slice) else task.left
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
                elif keep is not None and len(one):
                    once = keep(one, other)
                    one, other = one[once], other[once]
                graph.add(one, other)


def _open(
    graph: Graph, left: Tensor, left_rows: Int64, right: Tensor, right_rows: Int64
) -> Iterator[tuple[Tensor, Int64, Tensor, Int64]]:
    """Yield what of left (B, D) and right (C, D) must be compared."""
    left_closed, right_closed = graph.closed(left_rows, right_rows)
    if not left_closed.any() or not right_closed.any():
        yield left, left_rows, right, right_rows
        return
    is_open = np.flatnonzero(~right_closed)
    for rows, columns in ((np.flatnonzero(left_closed), is_open), (np.flatnonzero(~left_closed), None)):
        if len(rows) and columns is None:
            yield left[rows], left_rows[rows], right, right_rows
        elif len(rows) and columns is not None and len(columns):
            yield left[rows], left_rows[rows], right[columns], right_rows[columns]
