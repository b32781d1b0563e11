"""Spherical k-means of points in memory: Lloyd's iterations in which a point searches only near its present centroid.

After the first assignment, a point of cluster a is compared with the 64 centroids nearest to a's, however many there
are; over the iterations it moves further. Source: Agustsson et al. 2017 (k²-means).

S points and K centroids of length 1, D numbers each.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...features.grouping import Groups, group_by
from ...features.search.centroids import (
    EXACT_CENTROIDS,
    neighbors_of_centroids,
    on_device,
    search_candidates,
    search_centroids,
    train_coarse_quantizer,
)
from ...features.search.products import product
from ...features.search.similarity import tolerance
from ...features.threads import Workers
from ...store.vectors import Float32, Float64, Int32, Int64, unit_length
from .sampling import allocate, seeded_keys

NUM_NEIGHBORS = 64  # measured: the objective is within 0.1 % of comparing with all centroids
NUM_ITERATIONS = 20  # chosen
EARLY_STOP = 1e-4  # relative gain below which iterations end
UNGROUPED_CENTROIDS = 128  # more are initialized group by group
GROUPS_FACTOR = 4  # groups = this times the root of K; chosen: as much work for the groups as within them
GROUP_ITERATIONS = 5  # chosen: groups need no good clusters
DRAWN_POINTS = 64  # points a centroid from which k-means++ draws, as its cost is their product
ROUNDING = 1e-6  # of squared distances, relative: below it two points are the same
POINTS_A_CENTROID = 256  # FAISS's own limit: more points move a centroid little
JOB_POINTS = 4_096  # points a job of a thread
FIRST_CANDIDATES = 256  # of the coarse quantizer that makes the first assignment


@dataclass(frozen=True)
class State:
    """All that the next iteration depends on."""

    iteration: int  # done
    centroids: Float32  # (K, D)
    assignments: Int32  # (S,)
    sums: Float64  # (K, D) of the points of each cluster
    objective: float  # sum of all distances, 1 - cosine, to the centroids before these
    gain: float  # of the last iteration, relative to the objective


def initial_state(points: Float32, num_clusters: int, seed: int, threads: Workers) -> State:
    """Return the state before the first iteration on points (S, D), at least K of them."""
    initial = initial_centroids(points, num_clusters, seed, threads)
    is_exact = num_clusters <= EXACT_CENTROIDS
    coarse = None if is_exact else train_coarse_quantizer(initial, FIRST_CANDIDATES, threads, seed)
    assignments, _ = search_centroids(points, initial, threads, coarse)
    sums = np.zeros(initial.shape)
    add_points(sums, points, np.arange(len(points)), assignments, threads)
    centroids = mean_centroids(sums, np.bincount(assignments, minlength=num_clusters), initial)
    return State(0, centroids, assignments, sums, np.inf, np.inf)


def iterate(
    state: State,
    points: Float32,
    threads: Workers,
    *,
    num_iterations: int = NUM_ITERATIONS,
    keep: Callable[[State], None] = lambda state: None,
) -> State:
    """Return the state after `num_iterations`, or when one gains less than 0.01 %; `keep` is given every state."""
    while state.iteration < num_iterations and state.gain >= EARLY_STOP:
        assignments, distances = reassign(points, state.assignments, state.centroids, threads)
        objective = float(distances.sum(dtype=np.float64))
        relocate_empty_clusters(assignments, distances, len(state.centroids), points.shape[1])
        moved = np.flatnonzero(assignments != state.assignments)
        sums = state.sums.copy()
        add_points(sums, points, moved, assignments[moved], threads)
        add_points(sums, points, moved, state.assignments[moved], threads, sign=-1)
        gain = (state.objective - objective) / max(objective, np.finfo(float).tiny)
        centroids = mean_centroids(sums, np.bincount(assignments, minlength=len(sums)), state.centroids)
        state = State(state.iteration + 1, centroids, assignments, sums, objective, gain)
        keep(state)
    return state


def reassign(points: Float32, assignments: Int32, centroids: Float32, threads: Workers) -> tuple[Int32, Float32]:
    """Return the nearest of the centroids near the present one of every point, and 1 - cosine to it, (S,) each."""
    if len(centroids) <= 2 * NUM_NEIGHBORS:  # a product with all of them costs less than grouping points by cluster
        nearest, cosines = search_centroids(points, centroids, threads)
        return nearest, np.maximum(1 - cosines, 0)
    targets = on_device(centroids)
    neighbors = neighbors_of_centroids(centroids, NUM_NEIGHBORS, threads)
    groups = group_by(assignments, len(centroids))
    nearest, cosines = np.empty(len(points), np.int32), np.empty(len(points), np.float32)

    def search(clusters: Int64) -> None:
        for cluster in clusters.tolist():
            rows = groups.of(cluster)
            search_candidates(points, rows, targets, neighbors[cluster], JOB_POINTS, nearest, cosines)

    list(threads.map(search, _jobs(groups)))  # waits for all, and raises what one raises
    return nearest, np.maximum(1 - cosines, 0)


def _jobs(groups: Groups) -> list[Int64]:
    """Return the clusters that have points, divided into jobs of about JOB_POINTS points."""
    filled = np.flatnonzero(groups.sizes)
    bounds = np.flatnonzero(np.diff(groups.offsets[filled] // JOB_POINTS)) + 1
    return np.split(filled, bounds) if len(filled) else []


def relocate_empty_clusters(assignments: Int32, distances: Float32, num_clusters: int, dim: int) -> None:
    """Give every empty cluster, in place, the farthest point of one of the costliest clusters, while there are any.

    Clusters of one and the same point give nothing.
    """
    sizes = np.bincount(assignments, minlength=num_clusters)
    empty, filled = np.flatnonzero(sizes == 0), np.flatnonzero(sizes)
    if not len(empty):
        return
    groups = group_by(assignments, num_clusters, -distances)
    farthest = groups.rows[groups.offsets[filled]]  # of each cluster that has points
    costs = np.bincount(assignments, distances, num_clusters)
    farthest = farthest[np.argsort(-costs[filled], kind="stable")]
    farthest = farthest[distances[farthest] > tolerance(dim) * max(1.0, float(distances.mean()))][: len(empty)]
    assignments[farthest] = empty[: len(farthest)]


def add_points(sums: Float64, points: Float32, rows: Int64, clusters: Int32, threads: Workers, sign: int = 1) -> None:
    """Add points (S, D) at `rows` (M,) to the sums of their clusters (M,), or subtract them, in a fixed order."""
    groups = group_by(clusters, len(sums))

    def add(job: Int64) -> None:
        stop = int(groups.offsets[job[-1] + 1])
        for start in range(int(groups.offsets[job[0]]), stop, JOB_POINTS):
            part = groups.rows[start : min(start + JOB_POINTS, stop)]
            present, places = np.unique(clusters[part], return_index=True)
            sums[present] += sign * np.add.reduceat(points[rows[part]], places, axis=0, dtype=np.float64)

    list(threads.map(add, _jobs(groups)))


def mean_centroids(sums: Float64, sizes: Int64, previous: Float32) -> Float32:
    """Return the centroids (K, D) of clusters with these sums and sizes; an empty one stays where it was."""
    means = unit_length(sums.astype(np.float32))
    stays = (sizes == 0) | ~means.any(axis=1)
    means[stays] = previous[stays]
    return means


def initial_centroids(points: Float32, num_clusters: int, seed: int, threads: Workers) -> Float32:
    """Return K of the points (S, D) by k-means++, (K, D).

    More than 128 are drawn within groups of points, those around fewer centroids. A group gets centroids by its share
    of the squared distances. So the cost grows with S sqrt(K), not with S K.
    """
    rng = np.random.default_rng([seed, 5])
    if num_clusters <= UNGROUPED_CENTROIDS:
        return points[_draw(points, np.arange(len(points)), num_clusters, rng)]
    num_groups = round(GROUPS_FACTOR * num_clusters**0.5)
    num_sampled = min(len(points), POINTS_A_CENTROID * num_groups)
    sample = points[np.sort(rng.choice(len(points), num_sampled, replace=False))]
    coarse = iterate(initial_state(sample, num_groups, seed, threads), sample, threads, num_iterations=GROUP_ITERATIONS)
    labels, cosines = search_centroids(points, coarse.centroids, threads)
    groups = group_by(labels, num_groups)
    costs = np.bincount(labels, np.maximum(1 - cosines, 0), num_groups).astype(np.float64)
    counts = allocate(groups.sizes, np.array([num_clusters]), seeded_keys(num_groups, seed, 5), weights=costs)

    def draw(group: int) -> Int64:
        return _draw(points, groups.of(group), int(counts[group]), np.random.default_rng([seed, 6, group]))

    drawn: Float32 = points[np.concatenate(list(threads.map(draw, np.flatnonzero(counts).tolist())))]
    return drawn


def _draw(points: Float32, rows: Int64, num: int, rng: np.random.Generator) -> Int64:
    """Return `num` of the `rows` by k-means++; where there are very many, among a sample of them."""
    if len(rows) > DRAWN_POINTS * num:
        rows = np.sort(rng.choice(rows, DRAWN_POINTS * num, replace=False))
    drawn: Int64 = rows[kmeans_plus_plus(points[rows], num, rng)]
    return drawn


def kmeans_plus_plus(points: Float32, num: int, rng: np.random.Generator) -> Int64:
    """Return different places of `num` of the points (S, D), far from each other. One thread.

    Greedy k-means++ (Arthur and Vassilvitskii 2007): draws a few points by their squared distance to the chosen ones,
    and chooses the one that reduces the sum of these distances most.
    """
    squares = np.einsum("nd,nd->n", points, points)
    targets = on_device(points)

    def squared_distances(places: Int64) -> Float32:
        """Return those of all points to the ones at `places` (M,), (S, M), with zero where rounding leaves a little."""
        sums = squares[:, None] + squares[places]
        distances: Float32 = sums - 2 * product(targets, on_device(points[places]))
        distances[distances < ROUNDING * sums] = 0
        return distances

    num_drawn = 2 + int(np.log(num))
    chosen = np.empty(num, np.int64)
    chosen[0] = rng.integers(len(points))
    nearest = squared_distances(chosen[:1])[:, 0]
    nearest[chosen[0]] = 0
    for count in range(1, num):
        running = np.cumsum(nearest, dtype=np.float64)
        if running[-1] == 0:  # only copies are left
            chosen[count:] = np.setdiff1d(np.arange(len(points)), chosen[:count])[: num - count]
            break
        drawn = np.searchsorted(running, rng.random(num_drawn) * running[-1], side="right")
        drawn = np.minimum(drawn, len(points) - 1)
        reduced = np.minimum(squared_distances(drawn), nearest[:, None])
        best = int(reduced.sum(axis=0, dtype=np.float64).argmin())
        chosen[count] = drawn[best]
        nearest = reduced[:, best].copy()
        nearest[drawn[best]] = 0
    return chosen
