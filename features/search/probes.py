"""How far from its own cell a row must probe others: measured on a sample of the vectors, against exact search.

N rows, S of them sampled, K cells, P nearest cells of a row, E pairs.
"""

import numpy as np
import torch

from ... import console
from ...store.vectors import Float64, Int64, PageRelease, Vectors
from ..grouping import group_by
from ..threads import map_in_order, workers
from .cells import Cells, evenly_spread
from .exact_search import Identity, KnnTask, SearchSettings, exact_neighbors
from .products import device, tile_above, unit_rows

SAMPLE_ROWS = 16_384  # chosen: rows whose pairs are sought in many cells
SAMPLE_CELLS = 8  # chosen: in how many, times P: so many that what they miss is rare
EXACT_ROWS = 256  # chosen: of those with a pair, and of those without, how many are searched exactly
STANDARD_ERRORS = 2.5  # by which the recall of a sample must exceed what is asked
MAX_PAIRS = 64  # of a row and cell, so that a crowd does not drown the others


def probe_radius(vectors: Vectors, cells: Cells, threshold: float, search: SearchSettings) -> tuple[float, float]:
    """Return how much farther than its own cell the cells are that a row probes, and the share of pairs this finds.

    Pairs of sampled rows are sought in many more cells than a join probes. How many are still missed is measured by
    exact search for some of the rows: for those with a pair and those without apart, or few would have any.

    Args:
        vectors: those of the cells, in the cells' order.
    """
    rng = np.random.default_rng([search.seed % 2**63, 4])
    rows = np.sort(rng.choice(len(cells), min(len(cells), SAMPLE_ROWS), replace=False))
    left, right, probed = _pairs_in_many_cells(vectors, cells, rows, threshold)

    has_pair = np.isin(rows, left)
    kinds = [kind for kind in (np.flatnonzero(has_pair), np.flatnonzero(~has_pair)) if len(kind)]
    samples = [kind[evenly_spread(len(kind), EXACT_ROWS)] for kind in kinds]
    sample = np.concatenate(samples)  # places in `rows`
    lengths = [len(some) for some in samples]
    weights = np.repeat([len(kind) / num for kind, num in zip(kinds, lengths, strict=True)], lengths)
    everything = np.arange(len(cells))
    identity = Identity(rows[sample], everything)
    task = KnnTask(vectors.take(rows[sample]), vectors, MAX_PAIRS, everything, identity, threshold)
    found = exact_neighbors(task, progress="measuring recall").indices
    query, column = np.nonzero(found >= 0)
    other = found[query, column]
    missed = ~(probed[sample[query]] == cells.nearest[other, 0][:, None]).any(axis=1)

    needed = [_needed_radius(cells, left, right), _needed_radius(cells, rows[sample[query[missed]]], other[missed])]
    weight = [np.ones(len(left)), weights[query[missed]]]
    return _smallest_radius(np.concatenate(needed), np.concatenate(weight), search.recall)


def _pairs_in_many_cells(vectors: Vectors, cells: Cells, rows: Int64, threshold: float) -> tuple[Int64, Int64, Int64]:
    """Return pairs (E,), (E,) above the threshold of sampled rows (S,), and the cells in which they were sought."""
    centroids = unit_rows(cells.centroids)
    num = min(SAMPLE_CELLS * cells.nearest.shape[1], len(centroids))
    points = torch.from_numpy(vectors.take(rows).unit(0, len(rows))).to(device())
    with workers():
        nearest = [(block @ centroids.T).topk(num, dim=1).indices for block in torch.split(points, 512)]
    probed = torch.cat(nearest).cpu().numpy()
    probes = group_by(probed.reshape(-1), len(centroids))

    def compare(cell: int) -> tuple[Int64, Int64]:
        place = probes.of(cell) // num
        members = cells.members(cell)
        left_rows, right_rows = rows[place], np.arange(members.start, members.stop)
        right = unit_rows(vectors.array[members])
        left, column = tile_above(points[torch.from_numpy(place)], left_rows, right, right_rows, vectors, threshold)
        is_early = np.arange(len(left)) - np.searchsorted(left, left) < MAX_PAIRS
        kept = is_early & (left_rows[left] != right_rows[column])
        return left_rows[left[kept]], right_rows[column[kept]]

    lefts, rights = [], []
    pages = PageRelease(vectors.array)
    probed_cells = np.flatnonzero(probes.sizes).tolist()
    with workers() as threads:
        for cell, (left, right) in zip(probed_cells, map_in_order(compare, probed_cells, threads), strict=True):
            lefts.append(left)
            rights.append(right)
            pages.add(cells.stored[cells.members(cell)].nbytes)
    return np.concatenate(lefts), np.concatenate(rights), probed


def _needed_radius(cells: Cells, left: Int64, right: Int64) -> Float64:
    """Return the radius at which a join compares each pair (E,): 0 within a cell, inf where it never does."""
    needed = np.full(len(left), np.inf)
    for one, other in ((left, right), (right, left)):
        is_probed = cells.nearest[one] == cells.nearest[other, 0][:, None]
        needed = np.minimum(needed, np.where(is_probed, cells.gaps[one].astype(np.float64), np.inf).min(axis=1))
    return needed


def _smallest_radius(needed: Float64, weight: Float64, recall: float) -> tuple[float, float]:
    """Return the smallest radius that finds the share `recall` of weighted pairs and a little more, and the share."""
    if not len(needed):
        return 0.0, 1.0
    ranked = np.argsort(needed, kind="stable")
    needed, share = needed[ranked], np.cumsum(weight[ranked]) / weight.sum()
    aim = recall + STANDARD_ERRORS * (recall * (1 - recall) / weight.sum()) ** 0.5  # what is measured is a sample
    place = min(int(np.searchsorted(share, aim)), int(np.isfinite(needed).sum()) - 1)
    if place < 0:
        return 0.0, 0.0
    radius = float(needed[place])
    found = share[np.searchsorted(needed, radius, side="right") - 1]
    console.detail(f"cells at most {radius:.3f} farther than the nearest hold {found:.4f} of {len(needed):,} pairs")
    return radius, float(found)
