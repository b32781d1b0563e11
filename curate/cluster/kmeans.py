"""Hierarchical k-means with resampling, of vectors that need not fit into memory.

Centroids are fitted to a sample in memory; then all vectors are assigned as they stream from disk.

N vectors, S of them sampled, D numbers a vector, K clusters (K_l at level l), B vectors of a block.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ... import console
from ...errors import ToolkitError
from ...features.grouping import group_by
from ...features.search.centroids import CoarseQuantizer, fit_coarse_quantizer, nearest_centroids, search_centroids
from ...features.search.similarity import tolerance
from ...features.threads import Workers, map_in_order, workers
from ...store.memory import memory_budget
from ...store.progress import Progress
from ...store.vectors import Float32, Int32, Int64, PageRelease, Vectors, release, unit_length
from .lloyd import POINTS_A_CENTROID, State, initial_state, iterate, reassign
from .sampling import seeded_keys

BLOCK_ROWS = 16_384  # vectors a thread reads and assigns at a time
MEASURED_ROWS = 4_096  # vectors on which recall is measured
RESAMPLING_RECALL = 0.95  # chosen: which points a resampling keeps need not be exact
MAX_REFILLS = 10  # chosen: rounds of filling empty clusters
SAMPLE_PURPOSE, MEASURE_PURPOSE = 101, 102  # of seeded keys
LEVEL_SEEDS = 1_000_003  # a prime: levels draw from seeds that resamplings and small --seed values do not reach


@dataclass(frozen=True)
class Clustering:
    """One level of clusters."""

    centroids: Float32  # (K, D) at length 1
    assignments: Int32  # (N,) the nearest centroid, of ties the lowest
    distances: Float32  # (N,) 1 - cosine to it
    agreement: float = 1.0  # measured share of vectors that found their nearest centroid; 1: all were compared


def cluster_levels(
    vectors: Vectors,
    num_clusters: Sequence[int],
    *,
    num_resamplings: int,
    seed: int,
    recall: float = 0.99,
    memory: int | None = None,
    progress: Sequence[Progress] | None = None,
) -> list[Clustering]:
    """Cluster vectors (N, D), then the centroids, then theirs: the vectors of level l are the centroids of l - 1.

    The arguments are those of `cluster_vectors`; `progress` has one for each level.
    Centroids have length 1 at every level: else short mean vectors gather everything around them in a hub.
    """
    levels: list[Clustering] = []
    for level, count in enumerate(num_clusters):
        kept, own_seed = None if progress is None else progress[level], seed + level * LEVEL_SEEDS
        made = cluster_vectors(
            vectors, count, num_resamplings=num_resamplings, seed=own_seed, recall=recall, memory=memory, progress=kept
        )
        levels.append(made)
        vectors = Vectors(made.centroids, np.arange(count), vectors.base)
    return levels


def cluster_vectors(
    vectors: Vectors,
    num_clusters: int,
    *,
    num_resamplings: int,
    seed: int,
    recall: float = 0.99,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Clustering:
    """Cluster vectors (N, D), at least `num_clusters` of them.

    Centroids are fitted to 256 rows a cluster, or as many as memory allows; then all rows are assigned, and empty
    clusters take the rows that are farthest from their centroids. Clusters stay empty only where there are fewer
    distinct vectors. The result does not depend on the number of threads, but for the last digits on some machines.

    Args:
        num_resamplings: how many times centroids are fitted again, as `fit_centroids` says.
        recall: share of the vectors that must find their nearest centroid.
        memory: bytes to take; None: a third of the machine.
        progress: where to keep what is reached.

    Raises ToolkitError when memory is too small for two points a cluster.
    """
    fitted = None if progress is None else progress.load("centroids")
    with workers() as threads:
        if fitted is None:
            rows = sample_rows(len(vectors), _sample_size(vectors, num_clusters, memory), seed)
            points = read_points(vectors, rows)
            centroids = fit_centroids(points, num_clusters, num_resamplings, seed, threads, progress)
            del points
            if progress is not None:
                progress.save("centroids", centroids=centroids)
        else:
            centroids = fitted["centroids"]
        measured = read_points(vectors, sample_rows(len(vectors), MEASURED_ROWS, seed, MEASURE_PURPOSE))
        coarse, agreement = fit_coarse_quantizer(centroids, measured, recall, threads, seed % 2**63)
        if coarse is not None:
            console.say(
                f"assigning by a coarse quantizer, to {coarse.candidates.shape[1]:,} of {num_clusters:,} centroids:"
                f" {agreement:.2%} of {len(measured):,} rows find their nearest (--recall {recall:g})"
            )
        assignments, distances = _assign_all(vectors, centroids, coarse, threads, progress)
        made = Clustering(centroids, assignments, distances, agreement)
        _fill_empty(vectors, made, threads)
    return made


def _sample_size(vectors: Vectors, num_clusters: int, memory: int | None) -> int:
    budget = memory or memory_budget(None)
    most = budget // 3 // (4 * vectors.dim)  # a resampling copies half of them; the search needs room as well
    num_points = min(len(vectors), POINTS_A_CENTROID * num_clusters, most)
    if num_points < min(len(vectors), 2 * num_clusters):
        raise ToolkitError(
            f"{budget / 2**30:.2f} GiB of memory hold {num_points:,} points, too few for {num_clusters:,} clusters;"
            " give a larger --memory, or fewer clusters"
        )
    return num_points


def sample_rows(num_rows: int, num_points: int, seed: int, purpose: int = SAMPLE_PURPOSE) -> Int64:
    """Return the rows (S,) with the lowest seeded keys, rising; by default those that centroids are fitted to."""
    if num_points >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.argpartition(seeded_keys(num_rows, seed, purpose), num_points)[:num_points])


def read_points(vectors: Vectors, rows: Int64) -> Float32:
    """Return the vectors at rising `rows` (S,) in memory at length 1, (S, D)."""
    points = np.empty((len(rows), vectors.dim), np.float32)
    pages = PageRelease(vectors.array)
    for start in range(0, len(rows), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(rows))
        points[start:stop] = vectors.take(rows[start:stop]).unit(0, stop - start)
        pages.add((stop - start) * vectors.array[0].nbytes)
    release(vectors.array)
    return points


def fit_centroids(
    points: Float32, num_clusters: int, num_resamplings: int, seed: int, threads: Workers, progress: Progress | None
) -> Float32:
    """Return centroids (K, D) of points (S, D): k-means, and k-means again of as many points of every cluster.

    Plain k-means follows the density of the data, so crowds get most centroids. Each resampling keeps only the r
    members closest to each centroid, r half the average cluster size, and clusters these: the same number of every
    cluster flattens the density.
    Source: Vo et al. 2024 (Automatic Data Curation for Self-Supervised Learning), section 3.3.
    """
    saved = None if progress is None else progress.load("fit")
    first = 0 if saved is None else int(saved["step"])
    chosen: Int64 = np.arange(len(points)) if saved is None else saved["chosen"]
    num_kept = max(1, round(len(points) / num_clusters / 2))
    with console.progress(f"{num_clusters:,} clusters", num_resamplings + 1, "fits") as advance:
        advance(first)
        for step in range(first, num_resamplings + 1):
            members = points if len(chosen) == len(points) else points[chosen]

            def keep(state: State, step: int = step, chosen: Int64 = chosen) -> None:
                if progress is not None and progress.due():
                    progress.save("fit", step=step, chosen=chosen, **vars(state))

            if saved is None:
                state = initial_state(members, num_clusters, (seed + step) % 2**63, threads)
                keep(state)
            else:
                console.say(f"going on with fit {step + 1} of {num_resamplings + 1}, which was interrupted")
                values: dict[str, Any] = {field.name: saved[field.name][()] for field in fields(State)}
                state, saved = State(**values), None
            state = iterate(state, members, threads, keep=keep)
            advance(note=f"mean distance {state.objective / len(members):.4f}")
            if step == num_resamplings:
                break
            if len(members) == len(points):
                assignments, distances = reassign(points, state.assignments, state.centroids, threads)
            else:
                measured = points[:MEASURED_ROWS]
                coarse, _ = fit_coarse_quantizer(state.centroids, measured, RESAMPLING_RECALL, threads, seed % 2**63)
                assignments, cosines = search_centroids(points, state.centroids, threads, coarse)
                distances = -cosines  # as good for an order
            chosen = np.flatnonzero(group_by(assignments, num_clusters, distances).ranks() < num_kept)
            if len(chosen) < num_clusters:  # too many copies of too few vectors
                break
    return state.centroids


def _assign_all(
    vectors: Vectors, centroids: Float32, coarse: CoarseQuantizer | None, threads: Workers, progress: Progress | None
) -> tuple[Int32, Float32]:
    """Return the centroid of every vector and the distance to it, (N,) each; resumes where it was interrupted."""
    num, done, checksum, pages = len(vectors), 0, 0, PageRelease(vectors.array)
    assignments, distances = np.empty(num, np.int32), np.empty(num, np.float32)
    if progress is not None:
        assignments = progress.mapped("assignments", np.int32, num)
        distances = progress.mapped("distances", np.float32, num)
        saved = progress.load("assigned")
        # The arrays are written through a map: what a crash of the machine left of them need not be whole.
        rows = 0 if saved is None else min(int(saved["rows"]), num)
        found = _checksum(0, assignments, distances, range(rows))
        if saved is not None and found == saved.get("checksum"):
            done, checksum = rows, found

    def assign(start: int) -> int:
        block = slice(start, min(start + BLOCK_ROWS, num))
        assignments[block], distances[block] = _assign(vectors, block, centroids, coarse)
        return block.stop - start

    with console.progress("assigning", num, "images") as advance:
        advance(done)
        for count in map_in_order(assign, range(done, num, BLOCK_ROWS), threads):
            checksum = _checksum(checksum, assignments, distances, range(done, done + count))
            done += count
            advance(count)
            pages.add(count * vectors.array[0].nbytes)
            if progress is not None and progress.due():
                for array in (assignments, distances):
                    if isinstance(array, np.memmap):
                        array.flush()
                progress.save("assigned", rows=done, checksum=checksum)
    release(vectors.array)
    return np.array(assignments), np.array(distances)


def _checksum(checksum: int, assignments: Int32, distances: Float32, rows: range) -> int:
    """Return the CRC-32 of what was written for `rows`, a block at a time, after what `checksum` is of."""
    for start in range(rows.start, rows.stop, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, rows.stop))
        for array in (assignments, distances):
            checksum = zlib.crc32(array[block].tobytes(), checksum)
    return checksum


def _assign(
    vectors: Vectors, block: slice, centroids: Float32, coarse: CoarseQuantizer | None
) -> tuple[Int64, Float32]:
    stored = vectors.raw(block.start, block.stop)
    assignments, _ = nearest_centroids(unit_length(stored), centroids, coarse)
    return assignments, _cosine_distances(stored, centroids, assignments)


def _cosine_distances(stored: Float32, centroids: Float32, assignments: Int64) -> Float32:
    """Return 1 - cosine of vectors as stored (B, D) to their centroids, summed in float64, (B,)."""
    distances = np.empty(len(stored), np.float32)
    for start in range(0, len(stored), 512):  # stays in the cache
        block = slice(start, start + 512)
        points = stored[block].astype(np.float64)
        targets = centroids[assignments[block]].astype(np.float64)
        squares = np.einsum("nd,nd->n", points, points) * np.einsum("nd,nd->n", targets, targets)
        cosines = np.einsum("nd,nd->n", points, targets) / np.sqrt(np.where(squares > 0, squares, 1.0))
        distances[block] = 1 - np.clip(cosines, -1, 1)
    return distances


def _fill_empty(vectors: Vectors, made: Clustering, threads: Workers) -> None:
    """Move empty clusters, in place, to the vectors that are farthest from their centroids."""
    for _ in range(MAX_REFILLS):
        empty = np.flatnonzero(np.bincount(made.assignments, minlength=len(made.centroids)) == 0)
        far = np.flatnonzero(made.distances > tolerance(vectors.dim))
        if not len(empty) or not len(far):
            break
        farthest = np.sort(far[np.argsort(-made.distances[far], kind="stable")[: len(empty)]])
        new = read_points(vectors, farthest)
        empty = empty[: len(farthest)]
        made.centroids[empty] = new

        def join(start: int, new: Float32 = new, empty: Int64 = empty) -> int:
            block = slice(start, min(start + BLOCK_ROWS, len(vectors)))
            places, found = _assign(vectors, block, new, None)
            is_nearer = found < made.distances[block]
            made.assignments[block][is_nearer] = empty[places[is_nearer]]
            made.distances[block][is_nearer] = found[is_nearer]
            return block.stop - start

        pages = PageRelease(vectors.array)
        for count in map_in_order(join, range(0, len(vectors), BLOCK_ROWS), threads):
            pages.add(count * vectors.array[0].nbytes)
