"""An inverted file (IVF) of a pool: its vectors sorted into the cells of their nearest centroids, kept on disk.

Centroids are found on two levels, so that assigning a row costs about 2 sqrt(K) products and not K.

N vectors, D numbers a vector, K cells, G groups of cells, P nearest cells of a row.
"""

import hashlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import console
from ...store.arrays import allocate, kept_array, new_array, seal
from ...store.cache import cache_folder, cache_key, make_room, open_cache
from ...store.files import replacing
from ...store.vectors import RELEASED_ROWS, Float16, Float32, Int32, Int64, PageRelease, Stored, Vectors, release
from ..grouping import group_by
from ..threads import map_in_order, workers
from .products import product, unit_rows

ROWS_A_CELL = 256  # chosen: rows in a cell, on average
SAMPLE_A_CELL = 32  # chosen: rows by which a centroid is fitted
ITERATIONS = 6  # chosen: cells need not be good clusters
MIN_NEAREST = 16  # chosen: P, the cells of which a row knows, is at least this
CELLS_A_GROUP = 4  # chosen: a row looks for its cells in the nearest P / 4 groups, which hold many more
BLOCK_ROWS = 8_192  # rows assigned at a time
NAMES = ("stored", "ids", "centroids", "nearest", "gaps", "offsets")


@dataclass(frozen=True)
class Cells:
    """A pool sorted by cell. Rows are counted in that order; `ids` tells which vector of the pool each is."""

    stored: Stored  # (N, D) the vectors as stored
    ids: Int64  # (N,) positions in the pool, rising within a cell
    offsets: Int64  # (K + 1,) the rows of cell c are offsets[c] to offsets[c + 1]
    centroids: Float32  # (K, D) at length 1
    nearest: Int32  # (N, P) cells by nearness, the row's own first; -1 where there are fewer
    gaps: Float16  # (N, P) similarity to the own centroid less that to each; inf where there is none

    def __len__(self) -> int:
        return len(self.ids)

    def members(self, cell: int) -> slice:
        """Return the rows of a cell."""
        return slice(int(self.offsets[cell]), int(self.offsets[cell + 1]))

    def vectors(self, pool: Vectors) -> Vectors:
        """Return the pool's vectors in the order of rows."""
        return Vectors(self.stored, np.arange(len(self)), pool.base)


def open_cells(pool: Vectors, seed: int, times: int = 1) -> Cells:
    """Return the cells of a pool, made now or by an earlier search of the same vectors.

    Args:
        times: so many times the usual number of nearest cells is a row to know.
    """
    num_cells = max(1, len(pool) // ROWS_A_CELL)
    num_nearest = times * usual_nearest(num_cells)
    key = cells_key(pool, seed, num_nearest)
    paths = {name: cache_folder() / f"{key}-{name}.npy" for name in NAMES}
    if (kept := _kept(pool, num_nearest, paths)) is not None:
        console.detail(f"the cells of {Path(pool.base.path).name} are there from an earlier search")
        return kept
    open_cache()
    make_room(len(pool) * (pool.dim * pool.array.itemsize + 6 * num_nearest + 8) + 4 * num_cells * pool.dim)
    _write(pool, *fit_centroids(pool, num_cells, seed), num_nearest, paths)
    for path in paths.values():
        seal(path)
    return Cells(**{name: np.load(path, mmap_mode="r") for name, path in paths.items()})


def _kept(pool: Vectors, num_nearest: int, paths: dict[str, Path]) -> Cells | None:
    """Return the cells that an earlier search kept, None where any of their files is missing or damaged."""
    num, shape = len(pool), (len(pool), num_nearest)
    kinds: dict[str, tuple[npt.DTypeLike, tuple[int | None, ...]]] = {
        "stored": (pool.array.dtype, (num, pool.dim)),
        "ids": (np.int64, (num,)),
        "centroids": (np.float32, (None, pool.dim)),
        "nearest": (np.int32, shape),
        "gaps": (np.float16, shape),
        "offsets": (np.int64, (None,)),
    }
    found = {name: array for name, kind in kinds.items() if (array := kept_array(paths[name], *kind)) is not None}
    if len(found) < len(kinds) or len(found["offsets"]) != len(found["centroids"]) + 1:
        return None
    return Cells(**found)


def usual_nearest(num_cells: int) -> int:
    """Return P for K cells: it grows with them, or P cells hold less and less of the near pairs.

    Measured: 16 from 4 groups hold more than 0.99 of the pairs at 3.9e3 cells and 0.987 at 39e3; there, 34 hold 0.994
    from 4 groups and 0.998 from 8 or more.
    """
    return max(MIN_NEAREST, round(math.cbrt(num_cells)))


def cells_key(pool: Vectors, seed: int, num_nearest: int) -> str:
    """Return a name for a pool's cells, a hash of its vectors and of all that decides how they are divided."""
    digest = hashlib.blake2b(digest_size=16)
    made_by = (ROWS_A_CELL, SAMPLE_A_CELL, ITERATIONS, CELLS_A_GROUP, seed, num_nearest)
    digest.update(repr((cache_key(pool.base), pool.array.shape, pool.array.dtype.str, *made_by)).encode())
    digest.update(np.ascontiguousarray(pool.rows).data)
    sample = evenly_spread(len(pool), 64)
    digest.update(np.ascontiguousarray(pool.take(sample).raw(0, len(sample))).data)
    return digest.hexdigest()


def evenly_spread(num: int, count: int) -> Int64:
    """Return `count` of the numbers below `num`, evenly spread; all of them where there are fewer."""
    return np.unique(np.linspace(0, num - 1, min(num, count)).astype(np.int64))


def fit_centroids(pool: Vectors, num_cells: int, seed: int) -> tuple[Float32, Int64]:
    """Return centroids (K, D) by two levels of spherical k-means on a sample, and where each group of them starts.

    The groups (G + 1,) take cells in proportion to their rows, so that cells are of similar size.
    """
    rng = np.random.default_rng([seed % 2**63, 1])
    num_groups = max(1, round(num_cells**0.5))
    num_sampled = min(len(pool), SAMPLE_A_CELL * num_cells)
    sample = rng.choice(len(pool), num_sampled, replace=False)
    first = np.sort(sample[: 8 * SAMPLE_A_CELL * num_groups])
    sample.sort()
    with workers() as threads:
        coarse = spherical_kmeans(unit_rows(_stored(pool, first)), num_groups, [seed % 2**63, 2])

        def nearest(start: int) -> Int64:
            rows = unit_rows(_stored(pool, sample[start : start + BLOCK_ROWS]))
            centroids: Int64 = product(rows, coarse).argmax(axis=1)
            return centroids

        labels = np.concatenate(list(map_in_order(nearest, range(0, num_sampled, BLOCK_ROWS), threads)))
        groups = group_by(labels, num_groups)
        shares = np.round(num_cells * groups.sizes / num_sampled).astype(np.int64)
        num_cells_of = np.minimum(np.maximum(shares, 1), groups.sizes)

        def fit(group: int) -> Float32:
            points = unit_rows(_stored(pool, sample[groups.of(group)]))
            return spherical_kmeans(points, int(num_cells_of[group]), [seed % 2**63, 3, group]).cpu().numpy()

        filled = np.flatnonzero(groups.sizes).tolist()
        parts = []
        with console.progress("fitting cells", len(filled), "groups") as advance:
            for part in map_in_order(fit, filled, threads):
                parts.append(part)
                advance()
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


def spherical_kmeans(points: Tensor, num_centroids: int, seed: list[int]) -> Tensor:
    """Return centroids (K, D) at length 1 of points (S, D) at length 1, from K random ones."""
    chosen = np.random.default_rng(seed).choice(len(points), num_centroids, replace=False)
    centroids = points[torch.from_numpy(np.sort(chosen)).to(points.device)]
    for _ in range(ITERATIONS):
        nearest = torch.cat([(block @ centroids.T).argmax(dim=1) for block in torch.split(points, BLOCK_ROWS)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        lengths = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        centroids = torch.where(lengths > 0, sums / lengths.clamp_min(1e-12), centroids)  # an empty one stays
    return centroids


def _write(pool: Vectors, centroids: Float32, groups: Int64, num_nearest: int, paths: dict[str, Path]) -> None:
    """Assign all rows, sort them by cell, and put the files into place."""
    shape = len(pool), num_nearest
    with (
        tempfile.TemporaryFile(dir=cache_folder()) as nearest_file,
        tempfile.TemporaryFile(dir=cache_folder()) as gaps_file,
    ):
        nearest: Int32 = np.memmap(nearest_file, np.int32, "w+", shape=shape)
        gaps: Float16 = np.memmap(gaps_file, np.float16, "w+", shape=shape)
        allocate(nearest_file.fileno(), nearest.nbytes, cache_folder())
        allocate(gaps_file.fileno(), gaps.nbytes, cache_folder())
        _assign(pool, centroids, groups, nearest, gaps)
        by_cell = group_by(np.array(nearest[:, 0]), len(centroids))
        gathered = {"stored": pool.array, "nearest": nearest, "gaps": gaps}
        for name, source in gathered.items():
            rows = pool.rows[by_cell.rows] if name == "stored" else by_cell.rows
            with replacing(paths[name]) as temporary:
                target = new_array(temporary, source.dtype, (len(rows), source.shape[1]))
                _gather(source, rows, target)
    for name, array in (("ids", by_cell.rows), ("centroids", centroids), ("offsets", by_cell.offsets)):
        with replacing(paths[name]) as temporary, temporary.open("wb") as file:
            np.save(file, array)


def _assign(pool: Vectors, centroids: Float32, groups: Int64, nearest: Int32, gaps: Float16) -> None:
    """Write the P nearest cells of every row and how much farther they are than the nearest."""
    cells = unit_rows(centroids)
    coarse = torch.stack([part.mean(dim=0) for part in torch.split(cells, np.diff(groups).tolist())])
    coarse = torch.nn.functional.normalize(coarse)

    def assign(start: int) -> int:
        block = slice(start, min(start + BLOCK_ROWS, len(pool)))
        points = unit_rows(pool.array[pool.rows[block]])
        nearest[block], similarity = nearest_cells(points, cells, coarse, groups, nearest.shape[1])
        gaps[block] = similarity[:, :1] - similarity
        return len(points)

    pages = PageRelease(pool.array, nearest, gaps)
    with workers() as threads, console.progress("assigning to cells", len(pool), "vectors") as advance:
        for done in map_in_order(assign, range(0, len(pool), BLOCK_ROWS), threads):
            advance(done)
            pages.add(done * pool.dim * pool.array.itemsize)


def nearest_cells(points: Tensor, cells: Tensor, coarse: Tensor, groups: Int64, num: int) -> tuple[Int32, Float32]:
    """Return the P nearest cells of points (B, D) by their nearest groups, (B, P), and the similarity to each.

    Args:
        coarse: (G, D) the coarse quantizer, a centroid of each group of cells.
    """
    num_groups = min(max(1, num // CELLS_A_GROUP), len(coarse))  # that are probed
    probed = (points @ coarse.T).topk(num_groups, dim=1).indices.flatten()  # (B * num_groups,)
    probes = group_by(probed.cpu().numpy(), len(coarse))
    similarity = points.new_full((len(points), num_groups, num), -torch.inf)
    number = torch.full(similarity.shape, -1, dtype=torch.int32, device=points.device)
    for group in np.flatnonzero(probes.sizes).tolist():
        row, slot = (torch.from_numpy(part).to(points.device) for part in np.divmod(probes.of(group), num_groups))
        first, last = int(groups[group]), int(groups[group + 1])
        best = (points[row] @ cells[first:last].T).topk(min(num, last - first), dim=1)
        similarity[row, slot, : best.values.shape[1]] = best.values
        number[row, slot, : best.values.shape[1]] = best.indices.int() + first
    top = similarity.flatten(1).topk(num, dim=1)
    return number.flatten(1).gather(1, top.indices).cpu().numpy(), top.values.cpu().numpy()


def _stored(pool: Vectors, positions: Int64) -> Stored:
    """Return the vectors at `positions` (M,) as stored, (M, D)."""
    stored = np.empty((len(positions), pool.dim), pool.array.dtype)
    _gather(pool.array, pool.rows[positions], stored)
    return stored


def _gather(source: npt.NDArray[np.generic], rows: Int64, target: npt.NDArray[np.generic]) -> None:
    """Write the given rows of an array to another one, in their order; of mapped arrays, pages are given back."""
    for start in range(0, len(rows), RELEASED_ROWS):
        target[start : start + RELEASED_ROWS] = source[rows[start : start + RELEASED_ROWS]]
        release(source)
        release(target)
