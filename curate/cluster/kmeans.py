"""k-means with resampling of vectors that need not fit into memory, one level of a hierarchy.

Centroids are fitted to a sample in memory; then all vectors are assigned as they stream from disk.

N vectors, S of them sampled, D numbers a vector, K clusters, B vectors of a block.
"""

from dataclasses import dataclass, replace

import numpy as np

from ... import console
from ...errors import ToolkitError
from ...features.search.similarity import tolerance
from ...features.threads import Workers, map_in_order, workers
from ...store.memory import memory_budget
from ...store.progress import Array, Progress
from ...store.vectors import Float32, Float64, Int64, Vectors, release
from .allocation import Int32
from .centroid_search import Centroids, Lists, Metric, nearest_centroids, search_points, suited_lists
from .lloyd import POINTS_A_CENTROID, Init, State, centroid_means, fit, iterate, near_assignments
from .sampling import seeded_keys

BLOCK_ROWS = 16_384  # vectors a thread reads and assigns at a time
RELEASED_ROWS = 1 << 18  # mapped pages are given back after so many
MEASURED_ROWS = 4_096  # rows by which lists are judged
MAX_REFILLS = 10  # chosen: rounds of filling empty clusters
SAMPLE_PURPOSE, MEASURE_PURPOSE = 101, 102  # of seeded keys


@dataclass(frozen=True)
class KMeansSettings:
    """How clusters are made."""

    resample: int = 10  # fits to the same number of points of every cluster
    metric: Metric = "cosine"
    init: Init = "k-means++"
    polish: int = 0  # iterations over all vectors at the end
    recall: float = 0.99  # share of the vectors that must find their nearest centroid
    memory: int | None = None  # bytes; None: a third of the machine


@dataclass(frozen=True)
class Clustering:
    """One level of clusters."""

    centroids: Float32  # (K, D), for cosine at length 1
    assignments: Int32  # (N,) the nearest centroid, of ties the lowest
    distances: Float32  # (N,) to it: 1 - cosine, or the Euclidean distance
    agreement: float = 1.0  # measured share of vectors that found their nearest centroid; 1: all were compared


@dataclass(frozen=True)
class _Progress:
    """Where a clustering keeps what it has reached."""

    saved: Progress | None
    level: int

    def load(self, name: str) -> dict[str, Array] | None:
        return None if self.saved is None else self.saved.load(f"{name}-{self.level}")

    def save(self, name: str, **arrays: object) -> None:
        if self.saved is not None:
            self.saved.save(f"{name}-{self.level}", **arrays)  # type: ignore[arg-type]

    def due(self) -> bool:
        return self.saved is not None and self.saved.due()


def cluster_vectors(
    vectors: Vectors,
    num_clusters: int,
    *,
    num_resamplings: int,
    seed: int,
    settings: KMeansSettings = KMeansSettings(),
    saved: Progress | None = None,
    level: int = 0,
) -> Clustering:
    """Cluster vectors (N, D), at least `num_clusters` of them.

    Centroids are fitted to 256 rows a cluster, or as many as memory allows; then all rows are assigned, and empty
    clusters take the rows that are farthest from their centroids. Clusters stay empty only where there are fewer
    distinct vectors. The result does not depend on the number of threads, but for the last digits on some machines.

    Raises ToolkitError when memory is too small for two points a cluster.
    """
    progress = _Progress(saved, level)
    whole = progress.load("done")
    if whole is not None:
        return Clustering(whole["centroids"], whole["assignments"], whole["distances"], float(whole["agreement"]))
    fitted = progress.load("centroids")
    with workers() as threads:
        if fitted is None:
            centroids = _fit_sample(vectors, num_clusters, num_resamplings, seed, settings, progress, threads)
            for step in range(settings.polish):
                centroids = _polished(vectors, centroids, f"polishing, {step + 1} of {settings.polish}", threads)
            measured = _measured(vectors, settings.metric, seed)
            progress.save("centroids", centroids=centroids.vectors)
        else:
            centroids = Centroids(fitted["centroids"], settings.metric)
            measured = _measured(vectors, settings.metric, seed)
        lists, agreement = suited_lists(centroids, measured, settings.recall, threads, seed % 2**63)
        if lists is not None:
            console.say(
                f"assigning by lists of {lists.listed.shape[1]:,} of {num_clusters:,} centroids:"
                f" {agreement:.2%} of {len(measured):,} rows find their nearest (--recall {settings.recall:g})"
            )
        assignments, distances = _assign_all(vectors, centroids, lists, progress, threads)
        made = Clustering(centroids.vectors, assignments, distances, agreement)
        made = _filled(vectors, made, settings.metric, threads)
    progress.save(
        "done",
        centroids=made.centroids,
        assignments=made.assignments,
        distances=made.distances,
        agreement=made.agreement,
    )
    return made


def _fit_sample(
    vectors: Vectors,
    num_clusters: int,
    num_resamplings: int,
    seed: int,
    settings: KMeansSettings,
    progress: _Progress,
    threads: Workers,
) -> Centroids:
    budget = settings.memory or memory_budget(None)
    most = budget // 3 // (4 * vectors.dim)  # a resampling copies half of them; the search needs room as well
    num_points = min(len(vectors), POINTS_A_CENTROID * num_clusters, most)
    if num_points < min(len(vectors), 2 * num_clusters):
        raise ToolkitError(
            f"{budget / 2**30:.2f} GiB of memory hold {num_points:,} points, too few for {num_clusters:,} clusters;"
            " give a larger --memory, or fewer clusters"
        )
    points = read_points(vectors, sample_rows(len(vectors), num_points, seed), settings.metric)
    vectors_of = fit_centroids(points, num_clusters, num_resamplings, seed, settings, progress, threads)
    return Centroids(vectors_of, settings.metric)


def sample_rows(num_rows: int, num_points: int, seed: int) -> Int64:
    """Return the rows (S,) that centroids are fitted to, rising: those with the lowest seeded keys."""
    if num_points >= num_rows:
        return np.arange(num_rows)
    return np.sort(np.argpartition(seeded_keys(num_rows, seed, SAMPLE_PURPOSE), num_points)[:num_points])


def read_points(vectors: Vectors, rows: Int64, metric: Metric) -> Float32:
    """Return the vectors at rising `rows` (S,) in memory, (S, D), for cosine at length 1."""
    points = np.empty((len(rows), vectors.dim), np.float32)
    for number, start in enumerate(range(0, len(rows), BLOCK_ROWS)):
        stop = min(start + BLOCK_ROWS, len(rows))
        part = vectors.take(rows[start:stop])
        points[start:stop] = part.unit(0, stop - start) if metric == "cosine" else part.raw(0, stop - start)
        if number % 16 == 15:
            release(vectors.array)
    release(vectors.array)
    return points


def _measured(vectors: Vectors, metric: Metric, seed: int) -> Float32:
    rows = np.sort(np.argsort(seeded_keys(len(vectors), seed, MEASURE_PURPOSE), kind="stable")[:MEASURED_ROWS])
    return read_points(vectors, rows, metric)


def fit_centroids(
    points: Float32,
    num_clusters: int,
    num_resamplings: int,
    seed: int,
    settings: KMeansSettings,
    progress: _Progress,
    threads: Workers,
) -> Float32:
    """Return centroids (K, D) of points (S, D), k-means run again on what each cluster's centre says.

    Plain k-means follows the density of the data, so crowds get most centroids. Each resampling keeps only the r
    members closest to each centroid, r half the average cluster size, and clusters these: the same number of every
    cluster flattens the density.
    Source: Vo et al. 2024 (Automatic Data Curation for Self-Supervised Learning), section 3.3.
    """
    metric = settings.metric
    kept = progress.load("fit")
    first = 0 if kept is None else int(kept["step"])
    chosen: Int64 = np.arange(len(points)) if kept is None else kept["chosen"]
    num_kept = max(1, round(len(points) / num_clusters / 2))
    with console.progress(f"{num_clusters:,} clusters", num_resamplings + 1, "fits") as advance:
        if first:
            advance(first)
        for step in range(first, num_resamplings + 1):
            members = points if len(chosen) == len(points) else points[chosen]

            def keep(state: State, step: int = step, chosen: Int64 = chosen) -> None:
                if progress.due():
                    progress.save("fit", step=step, chosen=chosen, **vars(state))

            if kept is None:
                state = fit(members, num_clusters, metric, settings.init, (seed + step) % 2**63, threads)
                keep(state)
            else:
                console.say(f"going on with fit {step + 1} of {num_resamplings + 1}, which was interrupted")
                state, kept = _state(kept), None
            state = iterate(state, members, metric, threads, keep=keep)
            advance(note=f"mean distance {state.objective / len(members):.4f}")
            if step == num_resamplings:
                break
            centroids = Centroids(state.centroids, metric)
            if len(members) == len(points):
                assignments, distances = near_assignments(points, state.assignments, centroids, threads)
            else:
                lists, _ = suited_lists(centroids, points[:MEASURED_ROWS], 0.95, threads, seed % 2**63)
                assignments, scores = search_points(points, centroids, threads, lists)
                squares = 0.0 if metric == "cosine" else np.einsum("nd,nd->n", points, points) / 2
                distances = (squares - scores).astype(np.float32)
            ranked = np.lexsort((distances, assignments))
            sizes = np.bincount(assignments, minlength=num_clusters)
            place = np.arange(len(ranked)) - (np.cumsum(sizes) - sizes)[assignments[ranked]]  # 0 for the closest
            chosen = np.sort(ranked[place < num_kept])
            if len(chosen) < num_clusters:  # too many copies of too few vectors
                break
    return state.centroids


def _state(kept: dict[str, Array]) -> State:
    return State(
        int(kept["iteration"]),
        kept["centroids"],
        kept["assignments"],
        kept["sums"],
        float(kept["objective"]),
        float(kept["gain"]),
    )


def _assign_all(
    vectors: Vectors, centroids: Centroids, lists: Lists | None, progress: _Progress, threads: Workers
) -> tuple[Int32, Float32]:
    """Return the centroid of every vector and the distance to it, (N,) each; goes on where it was interrupted."""
    num, saved = len(vectors), progress.saved
    done = 0
    assignments, distances = np.empty(num, np.int32), np.empty(num, np.float32)
    if saved is not None and num > RELEASED_ROWS:
        assignments = saved.mapped(f"assignments-{progress.level}", np.int32, num)
        distances = saved.mapped(f"distances-{progress.level}", np.float32, num)
        reached = progress.load("assigned")
        done = 0 if reached is None else int(reached["rows"])

    def assign(start: int) -> int:
        part = slice(start, min(start + BLOCK_ROWS, num))
        assignments[part], distances[part] = _assigned(vectors, part, centroids, lists)
        return part.stop - start

    with console.progress("assigning", num, "images") as advance:
        advance(done)
        for count in map_in_order(assign, range(done, num, BLOCK_ROWS), threads):
            done += count
            advance(count)
            if done % RELEASED_ROWS < BLOCK_ROWS:
                release(vectors.array)
            if progress.due() and isinstance(assignments, np.memmap) and isinstance(distances, np.memmap):
                assignments.flush()
                distances.flush()
                progress.save("assigned", rows=done)
    release(vectors.array)
    return np.array(assignments), np.array(distances)


def _assigned(vectors: Vectors, part: slice, centroids: Centroids, lists: Lists | None) -> tuple[Int64, Float32]:
    stored = vectors.raw(part.start, part.stop)
    points = vectors.unit(part.start, part.stop) if centroids.metric == "cosine" else stored
    assignments, _ = nearest_centroids(points, centroids, lists)
    return assignments, exact_distances(stored, centroids, assignments)


def exact_distances(stored: Float32, centroids: Centroids, assignments: Int64) -> Float32:
    """Return the distance of vectors as stored (B, D) to their centroids, summed in float64, (B,)."""
    distances = np.empty(len(stored))
    for start in range(0, len(stored), 512):  # stays in the cache
        part = slice(start, start + 512)
        points = stored[part].astype(np.float64)
        targets = centroids.vectors[assignments[part]].astype(np.float64)
        if centroids.metric == "cosine":
            squares = np.einsum("nd,nd->n", points, points) * np.einsum("nd,nd->n", targets, targets)
            cosines = np.einsum("nd,nd->n", points, targets) / np.sqrt(np.where(squares > 0, squares, 1.0))
            distances[part] = 1 - np.clip(cosines, -1, 1)
        else:
            distances[part] = np.sqrt(np.einsum("nd,nd->n", points - targets, points - targets))
    return distances.astype(np.float32)


def _polished(vectors: Vectors, centroids: Centroids, what: str, threads: Workers) -> Centroids:
    """Return the means of all vectors that are nearest to each centroid, after one pass over them."""
    sums: Float64 = np.zeros(centroids.vectors.shape)
    sizes = np.zeros(len(centroids), np.int64)

    def add(start: int) -> tuple[Int64, Int64, Float64, int]:
        part = slice(start, min(start + BLOCK_ROWS // 4, len(vectors)))
        points = vectors.unit(part.start, part.stop) if centroids.metric == "cosine" else vectors.raw(*_ends(part))
        assignments, _ = nearest_centroids(points, centroids)
        by = np.argsort(assignments, kind="stable")
        present, places, counts = np.unique(assignments[by], return_index=True, return_counts=True)
        return present, counts, np.add.reduceat(points[by], places, axis=0, dtype=np.float64), len(points)

    with console.progress(what, len(vectors), "images") as advance:
        for number, (present, counts, part_sums, count) in enumerate(
            map_in_order(add, range(0, len(vectors), BLOCK_ROWS // 4), threads)
        ):
            sums[present] += part_sums
            sizes[present] += counts
            advance(count)
            if number % 64 == 63:
                release(vectors.array)
    return replace(centroids, vectors=centroid_means(sums, sizes, centroids.vectors, centroids.metric))


def _ends(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def _filled(vectors: Vectors, made: Clustering, metric: Metric, threads: Workers) -> Clustering:
    """Return the clustering with empty clusters at the vectors that are farthest from their centroids."""
    centroids, assignments, distances = made.centroids.copy(), made.assignments, made.distances
    for _ in range(MAX_REFILLS):
        empty = np.flatnonzero(np.bincount(assignments, minlength=len(centroids)) == 0)
        least = tolerance(vectors.dim) * (1.0 if metric == "cosine" else max(1.0, float(distances.max(initial=0))))
        far = np.flatnonzero(distances > least)
        if not len(empty) or not len(far):
            break
        farthest = np.sort(far[np.argsort(-distances[far], kind="stable")[: len(empty)]])
        new = Centroids(read_points(vectors, farthest, metric), metric)
        empty = empty[: len(farthest)]
        centroids[empty] = new.vectors

        def join(start: int, new: Centroids = new, empty: Int64 = empty) -> None:
            part = slice(start, min(start + BLOCK_ROWS, len(vectors)))
            places, found = _assigned(vectors, part, new, None)
            is_nearer = found < distances[part]
            assignments[part][is_nearer] = empty[places[is_nearer]]
            distances[part][is_nearer] = found[is_nearer]

        for number, _ in enumerate(map_in_order(join, range(0, len(vectors), BLOCK_ROWS), threads)):
            if number % 16 == 15:
                release(vectors.array)
    return replace(made, centroids=centroids)
