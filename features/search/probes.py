"""How many cells a row must visit: found by measuring on a sample of the vectors themselves, against exact search.

N rows, S of them sampled, K cells, P nearest cells of a row, E pairs.
"""

import numpy as np
import torch

from ... import console
from ...store.vectors import RELEASED_BYTES, Float64, Int64, Vectors, release
from ..threads import map_in_order, workers
from .cells import Cells
from .exact_search import Identity, SearchSettings, exact_neighbors
from .products import device, tile_above, unit_rows

SAMPLE_ROWS = 16_384  # chosen: rows whose pairs are looked for in many cells
SAMPLE_CELLS = 8  # chosen: in how many, times P: so many that what they miss is rare
EXACT_ROWS = 256  # chosen: of those with a pair, and of those without, how many are searched exactly
SURENESS = 2.5  # standard errors by which the recall of a sample must exceed what is asked
MOST_PAIRS = 64  # of a row and cell, so that a crowd does not drown the others


def join_width(vectors: Vectors, cells: Cells, threshold: float, search: SearchSettings) -> tuple[float, float]:
    """Return how much farther than its own cell a row must visit others, and the share of pairs that this finds.

    Pairs of the sampled rows are looked for in many more cells than a join visits. How many these miss is measured
    by exact search for some of the rows, those with a pair and those without apart, or few would have any.

    Args:
        vectors: those of the cells, in the cells' order.
    """
    rng = np.random.default_rng([search.seed % 2**63, 4])
    rows = np.sort(rng.choice(len(cells), min(len(cells), SAMPLE_ROWS), replace=False))
    left, right, seen = _pairs_in_many_cells(vectors, cells, rows, threshold)
    has_pair = np.isin(rows, left)
    # All of these are searched exactly: as many with a pair as without, each standing for its share.
    groups = [group for group in (np.flatnonzero(has_pair), np.flatnonzero(~has_pair)) if len(group)]
    spread = [
        np.unique(np.linspace(0, len(group) - 1, min(len(group), EXACT_ROWS)).astype(np.int64)) for group in groups
    ]
    some = np.concatenate([group[places] for group, places in zip(groups, spread, strict=True)])
    stands_for = np.concatenate(
        [np.full(len(places), len(group) / len(places)) for group, places in zip(groups, spread, strict=True)]
    )
    found = exact_neighbors(
        vectors.take(rows[some]),
        vectors,
        MOST_PAIRS,
        order=np.arange(len(cells)),
        identity=Identity(rows[some], np.arange(len(cells))),
        above=threshold,
        progress="measuring recall",
    ).indices
    query, column = np.nonzero(found >= 0)
    other = found[query, column]
    missed = ~(seen[some[query]] == cells.nearest[other, 0][:, None]).any(axis=1)
    needed = [_needed_gap(cells, left, right), _needed_gap(cells, rows[some[query[missed]]], other[missed])]
    weight = [np.ones(len(left)), stands_for[query[missed]]]
    return _smallest_width(np.concatenate(needed), np.concatenate(weight), search.recall)


def _pairs_in_many_cells(vectors: Vectors, cells: Cells, rows: Int64, threshold: float) -> tuple[Int64, Int64, Int64]:
    """Return pairs (E,), (E,) above the threshold of sampled rows (S,), and the cells in which they were sought."""
    centroids = unit_rows(cells.centroids)
    num = min(SAMPLE_CELLS * cells.nearest.shape[1], len(centroids))
    points = torch.from_numpy(vectors.take(rows).unit(0, len(rows))).to(device())
    with workers():
        near = [(block @ centroids.T).topk(num, dim=1).indices for block in torch.split(points, 512)]
    seen = torch.cat(near).cpu().numpy()
    by_cell = np.argsort(seen.reshape(-1), kind="stable")
    bounds = np.concatenate([[0], np.cumsum(np.bincount(seen.reshape(-1), minlength=len(centroids)))])

    def compare(cell: int) -> tuple[Int64, Int64]:
        place = by_cell[bounds[cell] : bounds[cell + 1]] // num
        members = cells.members(cell)
        right_rows = np.arange(members.start, members.stop)
        left, right = tile_above(
            points[torch.from_numpy(place)],
            rows[place],
            unit_rows(vectors.array[members]),
            right_rows,
            vectors,
            threshold,
        )
        kept = (np.arange(len(left)) - np.searchsorted(left, left) < MOST_PAIRS) & (
            rows[place[left]] != right_rows[right]
        )
        return rows[place[left[kept]]], right_rows[right[kept]]

    parts, passed = [], 0
    visited = np.flatnonzero(np.diff(bounds)).tolist()
    with workers() as threads:
        for cell, part in zip(visited, map_in_order(compare, visited, threads), strict=True):
            parts.append(part)
            members = cells.members(cell)
            passed += (members.stop - members.start) * vectors.dim * vectors.array.itemsize
            if passed > RELEASED_BYTES:
                passed = 0
                release(vectors.array)
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), seen


def _needed_gap(cells: Cells, left: Int64, right: Int64) -> Float64:
    """Return how wide a join must be to compare each pair (E,): 0 within a cell, inf where it never is."""
    needed = np.full(len(left), np.inf)
    for one, other in ((left, right), (right, left)):
        visits = cells.nearest[one] == cells.nearest[other, 0][:, None]
        gaps = np.where(visits, cells.gaps[one].astype(np.float64), np.inf).min(axis=1)
        needed = np.minimum(needed, gaps)
    return needed


def _smallest_width(needed: Float64, weight: Float64, recall: float) -> tuple[float, float]:
    """Return the smallest width that finds the share `recall` of weighted pairs and a little more, and the share."""
    if not len(needed):
        return 0.0, 1.0
    ranked = np.argsort(needed, kind="stable")
    needed, share = needed[ranked], np.cumsum(weight[ranked]) / weight.sum()
    aim = recall + SURENESS * (recall * (1 - recall) / weight.sum()) ** 0.5  # what is measured is a sample
    place = min(int(np.searchsorted(share, aim)), int(np.isfinite(needed).sum()) - 1)
    if place < 0:
        return 0.0, 0.0
    width = float(needed[place])
    found = share[np.searchsorted(needed, width, side="right") - 1]
    console.detail(f"cells at most {width:.3f} farther than the nearest hold {found:.4f} of {len(needed):,} pairs")
    return width, float(found)
