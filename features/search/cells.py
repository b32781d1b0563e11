"""The cells of a pool: its vectors sorted by their nearest centroid, kept on disk for the next search of that pool.

Centroids are found on two levels, so that assigning a row costs about 2 sqrt(K) products and not K.

N vectors, D numbers a vector, K cells, G groups of cells, P nearest cells of a row.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import console
from ...store.cache import cache_folder, cache_key, make_room, open_cache
from ...store.vectors import RELEASED_BYTES, RELEASED_ROWS, Float32, Int64, Stored, Vectors, release
from ..threads import map_in_order, workers
from .products import product, unit_rows

ROWS_A_CELL = 256  # chosen: rows in a cell, on average
SAMPLE_A_CELL = 32  # chosen: rows by which a centroid is fitted
ITERATIONS = 6  # chosen: cells need not be good clusters
LEAST_NEAREST = 16  # chosen: P, the cells of which a row knows, is at least this
CELLS_A_GROUP = 4  # chosen: a row looks for its cells in the nearest P / 4 groups, which hold many more
BLOCK_ROWS = 8_192  # rows assigned at a time

Int32 = npt.NDArray[np.int32]
Float16 = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Cells:
    """A pool sorted by cell. Rows are counted in that order here; `ids` tells which vector of the pool each is."""

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


NAMES = ("stored", "ids", "centroids", "nearest", "gaps", "offsets")  # the last one says that all are there


def open_cells(pool: Vectors, seed: int, more: int = 1) -> Cells:
    """Return the cells of a pool, made now or by an earlier search of the same vectors.

    Args:
        more: how many times the usual number of nearest cells a row is to know.
    """
    num_cells = max(1, len(pool) // ROWS_A_CELL)
    num_nearest = more * usual_nearest(num_cells)
    key = cells_key(pool, seed, num_nearest)
    paths = {name: cache_folder() / f"{key}-{name}.npy" for name in NAMES}
    if all(path.exists() for path in paths.values()):
        console.detail(f"the cells of {Path(pool.base.path).name} are there from an earlier search")
        for path in paths.values():
            os.utime(path)
        return _mapped(paths)
    open_cache()
    make_room(len(pool) * (pool.dim * pool.array.itemsize + 6 * num_nearest + 8) + 4 * num_cells * pool.dim)
    centroids, groups = fit_centroids(pool, num_cells, seed)
    _write(pool, centroids, groups, num_nearest, paths)
    return _mapped(paths)


def usual_nearest(num_cells: int) -> int:
    """Return P for K cells: it grows with them, or P cells hold less and less of the near pairs.

    Measured: 16 from 4 groups hold more than 0.99 of the pairs at 3.9e3 cells and 0.987 at 39e3; there, 34 hold 0.994
    from 4 groups and 0.998 from 8 or more.
    """
    return max(LEAST_NEAREST, round(math.cbrt(num_cells)))


def cells_key(pool: Vectors, seed: int, num_nearest: int) -> str:
    """Return a name for a pool's cells: by the vectors it is made of, and what they are divided by."""
    digest = hashlib.blake2b(digest_size=16)
    made_by = (ROWS_A_CELL, SAMPLE_A_CELL, ITERATIONS, CELLS_A_GROUP, seed, num_nearest)
    digest.update(repr((cache_key(pool.base), pool.array.shape, pool.array.dtype.str, *made_by)).encode())
    digest.update(np.ascontiguousarray(pool.rows).data)
    probes = np.linspace(0, len(pool) - 1, min(len(pool), 64)).astype(np.int64)
    digest.update(np.ascontiguousarray(pool.take(probes).raw(0, len(probes))).data)
    return digest.hexdigest()


def _mapped(paths: dict[str, Path]) -> Cells:
    return Cells(**{name: np.load(path, mmap_mode="r") for name, path in paths.items()})


def fit_centroids(pool: Vectors, num_cells: int, seed: int) -> tuple[Float32, Int64]:
    """Return centroids (K, D) by two levels of spherical k-means on a sample, and where each group of them starts.

    The groups (G + 1,) take cells in proportion to their rows, so that cells are of like size.
    """
    rng = np.random.default_rng([seed % 2**63, 1])
    num_groups = max(1, round(num_cells**0.5))
    num_sampled = min(len(pool), SAMPLE_A_CELL * num_cells)
    sample = rng.choice(len(pool), num_sampled, replace=False)
    first = np.sort(sample[: 8 * SAMPLE_A_CELL * num_groups])
    sample.sort()
    with workers() as threads:
        coarse = spherical_kmeans(unit_rows(_stored(pool, first)), num_groups, [seed % 2**63, 2])

        def group_of(start: int) -> Int64:
            rows = unit_rows(_stored(pool, sample[start : start + BLOCK_ROWS]))
            nearest: Int64 = product(rows, coarse).argmax(axis=1)
            return nearest

        group = np.concatenate(list(map_in_order(group_of, range(0, num_sampled, BLOCK_ROWS), threads)))
        sizes = np.bincount(group, minlength=num_groups)
        num_cells_of = np.minimum(np.maximum(np.round(num_cells * sizes / num_sampled).astype(np.int64), 1), sizes)
        by_group = sample[np.argsort(group, kind="stable")]
        starts = np.concatenate([[0], np.cumsum(sizes)])

        def fit(number: int) -> Tensor:
            points = unit_rows(_stored(pool, by_group[starts[number] : starts[number + 1]]))
            return spherical_kmeans(points, int(num_cells_of[number]), [seed % 2**63, 3, number])

        filled = np.flatnonzero(sizes).tolist()
        parts = []
        with console.progress("fitting cells", len(filled), "groups") as advance:
            for part in map_in_order(fit, filled, threads):
                parts.append(part.cpu().numpy())
                advance()
    groups = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return np.concatenate(parts), groups


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
    count = (len(pool), num_nearest)
    with _temporary("nearest") as nearest_path, _temporary("gaps") as gaps_path:
        nearest: Int32 = np.lib.format.open_memmap(nearest_path, mode="w+", dtype=np.int32, shape=count)
        gaps: Float16 = np.lib.format.open_memmap(gaps_path, mode="w+", dtype=np.float16, shape=count)
        _assign(pool, centroids, groups, nearest, gaps)
        own = np.array(nearest[:, 0])
        ids = np.argsort(own, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(own, minlength=len(centroids)))])
        del own
        written: dict[str, npt.NDArray[np.generic]] = {"ids": ids, "centroids": centroids, "offsets": offsets}
        for name in NAMES:
            temporary = paths[name].with_name(f".{paths[name].name}.{os.getpid()}.tmp")
            try:
                if name in written:
                    with temporary.open("wb") as file:
                        np.save(file, written[name])
                else:
                    source = {"stored": pool.array, "nearest": nearest, "gaps": gaps}[name]
                    _gather(source, pool.rows[ids] if name == "stored" else ids, temporary)
                os.replace(temporary, paths[name])
            finally:
                temporary.unlink(missing_ok=True)


def _assign(pool: Vectors, centroids: Float32, groups: Int64, nearest: Int32, gaps: Float16) -> None:
    """Write the P nearest cells of every row and how much farther they are than the nearest."""
    cells = unit_rows(centroids)
    heads = torch.stack([part.mean(dim=0) for part in torch.split(cells, np.diff(groups).tolist())])
    heads = torch.nn.functional.normalize(heads)

    def assign(start: int) -> int:
        stop = min(start + BLOCK_ROWS, len(pool))
        near, similarity = nearest_cells(
            unit_rows(_stored(pool, slice(start, stop))), cells, heads, groups, nearest.shape[1]
        )
        nearest[start:stop] = near
        gaps[start:stop] = similarity[:, :1] - similarity
        return stop - start

    with workers() as threads, console.progress("assigning to cells", len(pool), "vectors") as advance:
        passed = 0
        for done in map_in_order(assign, range(0, len(pool), BLOCK_ROWS), threads):
            advance(done)
            passed += done * pool.dim * pool.array.itemsize
            if passed > RELEASED_BYTES:
                passed = 0
                for array in (pool.array, nearest, gaps):
                    release(array)


def nearest_cells(points: Tensor, cells: Tensor, heads: Tensor, groups: Int64, num: int) -> tuple[Int32, Float32]:
    """Return the P nearest cells of points (B, D) by their nearest groups, (B, P), and the similarity to each."""
    beam = min(max(1, num // CELLS_A_GROUP), len(heads))
    near = (points @ heads.T).topk(beam, dim=1).indices.flatten()  # (B * beam,)
    order = near.argsort(stable=True)
    row, slot = order // beam, order % beam
    bounds = np.concatenate([[0], np.cumsum(np.bincount(near.cpu().numpy(), minlength=len(heads)))]).tolist()
    similarity = points.new_full((len(points), beam, num), -torch.inf)
    number = torch.full(similarity.shape, -1, dtype=torch.int32, device=points.device)
    for group, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if start == stop:
            continue
        first, last = int(groups[group]), int(groups[group + 1])
        best = (points[row[start:stop]] @ cells[first:last].T).topk(min(num, last - first), dim=1)
        place = row[start:stop], slot[start:stop]
        similarity[place[0], place[1], : best.values.shape[1]] = best.values
        number[place[0], place[1], : best.values.shape[1]] = best.indices.int() + first
    top = similarity.flatten(1).topk(num, dim=1)
    return number.flatten(1).gather(1, top.indices).cpu().numpy(), top.values.cpu().numpy()


def _stored(pool: Vectors, positions: Int64 | slice) -> Stored:
    if isinstance(positions, slice):
        return pool.array[pool.rows[positions]]
    stored = np.empty((len(positions), pool.dim), pool.array.dtype)
    for start in range(0, len(positions), RELEASED_ROWS):
        some = pool.rows[positions[start : start + RELEASED_ROWS]]
        stored[start : start + len(some)] = pool.array[some]
        release(pool.array)
    return stored


def _gather(source: npt.NDArray[np.generic], rows: Int64, target: Path) -> None:
    """Write the given rows of an array to a .npy file, in their order."""
    written = np.lib.format.open_memmap(target, mode="w+", dtype=source.dtype, shape=(len(rows), *source.shape[1:]))
    for start in range(0, len(rows), RELEASED_ROWS):
        written[start : start + RELEASED_ROWS] = source[rows[start : start + RELEASED_ROWS]]
        release(source)
        release(written)
    written.flush()


@contextmanager
def _temporary(name: str) -> Iterator[Path]:
    """Yield where a file may be written that is gone afterwards."""
    path = cache_folder() / f".{name}.{os.getpid()}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
