"""k-means of points in memory: Lloyd's iterations in which a point looks only at centroids near its own.

After the first assignment, a point of cluster a is compared with the 64 centroids nearest to a's, however many there
are; it wanders further from iteration to iteration. Source: Agustsson et al. 2017 (k²-means).

S points, K clusters, D numbers a point.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...features.search.products import device, product
from ...features.search.similarity import tolerance
from ...features.threads import Workers, map_in_order
from ...store.vectors import Float32, Float64, Int64, unit_length
from .allocation import Int32, allocate
from .centroid_search import EXACT_CENTROIDS, Centroids, Metric, make_lists, neighbours_of, search_points
from .sampling import seeded_keys

Init = Literal["k-means++", "sampled"]

NUM_NEIGHBOURS = 64  # measured: the objective of comparing with all, within 0.1 %
NUM_ITERATIONS = 20  # chosen
EARLY_STOP = 1e-4  # relative gain below which iterations end
UNGROUPED_CENTROIDS = 128  # with more, starting centroids are drawn group by group
GROUPS_FACTOR = 4  # groups = this times the root of K; chosen: as much work for the groups as within them
GROUP_ITERATIONS = 5  # chosen: groups need no good clusters
SPREAD_POINTS = 64  # points a centroid among which starting ones are looked for, as the cost is their product
ROUNDING = 1e-6  # of squared distances, relative: below it two points are the same
POINTS_A_CENTROID = 256  # FAISS's own limit: more points move a centroid little
JOB_POINTS = 4_096  # points a job of a thread
FIRST_LISTED = 256  # lists by which points first find their centroids


@dataclass(frozen=True)
class State:
    """Iterations on their way: all that the next one depends on."""

    iteration: int  # done
    centroids: Float32  # (K, D)
    assignments: Int32  # (S,)
    sums: Float64  # (K, D) of the points of each cluster
    objective: float  # the sum of all distances before these centroids, 1 - cosine or half the squared ones
    gain: float  # of the last iteration, relative to the objective


Keep = Callable[[State], None]


def fit(points: Float32, num_clusters: int, metric: Metric, init: Init, seed: int, threads: Workers) -> State:
    """Return where iterations on points (S, D), at least K of them, start: centroids and who is nearest to which.

    For cosine the points have length 1.
    """
    vectors = starting_points(points, num_clusters, metric, init, seed, threads)
    centroids = Centroids(vectors, metric)
    lists = None
    if num_clusters > EXACT_CENTROIDS:
        lists = make_lists(centroids, FIRST_LISTED, threads, seed)
    assignments, _ = search_points(points, centroids, threads, lists)
    sums = np.zeros(vectors.shape)
    add_points(sums, points, np.arange(len(points)), assignments, threads)
    sizes = np.bincount(assignments, minlength=num_clusters)
    return State(0, centroid_means(sums, sizes, vectors, metric), assignments, sums, np.inf, np.inf)


def iterate(
    state: State,
    points: Float32,
    metric: Metric,
    threads: Workers,
    *,
    num_iterations: int = NUM_ITERATIONS,
    keep: Keep = lambda state: None,
) -> State:
    """Return the state after so many iterations, or when they gain less than 0.01 %; `keep` sees every one."""
    while state.iteration < num_iterations and state.gain >= EARLY_STOP:
        state = _iteration(state, points, metric, threads)
        keep(state)
    return state


def _iteration(state: State, points: Float32, metric: Metric, threads: Workers) -> State:
    assignments, distances = near_assignments(points, state.assignments, Centroids(state.centroids, metric), threads)
    objective = float(distances.sum(dtype=np.float64))
    fill_empty(assignments, distances, len(state.centroids), points.shape[1])
    moved = np.flatnonzero(assignments != state.assignments)
    sums = state.sums.copy()
    add_points(sums, points, moved, assignments[moved], threads)
    add_points(sums, points, moved, state.assignments[moved], threads, sign=-1)
    sizes = np.bincount(assignments, minlength=len(sums))
    centroids = centroid_means(sums, sizes, state.centroids, metric)
    gain = (state.objective - objective) / max(objective, np.finfo(float).tiny)
    return State(state.iteration + 1, centroids, assignments, sums, objective, gain)


def near_assignments(
    points: Float32, assignments: Int32, centroids: Centroids, threads: Workers
) -> tuple[Int32, Float32]:
    """Return the nearest of the centroids near the present one for every point (S,), and its distance to it.

    Distances are 1 - cosine, or half the squared Euclidean.
    """
    if len(centroids) <= 2 * NUM_NEIGHBOURS:  # a product with all of them costs less than sorting points by cluster
        nearest, scores = search_points(points, centroids, threads)
        squares = 1.0 if centroids.metric == "cosine" else np.einsum("nd,nd->n", points, points) / 2
        return nearest, np.maximum(squares - scores, 0).astype(np.float32)
    targets, offsets = torch.from_numpy(centroids.vectors).to(device()), centroids.offsets()
    near = neighbour_lists(centroids, threads)
    by = np.argsort(assignments, kind="stable")
    ends = np.cumsum(np.bincount(assignments, minlength=len(centroids)))
    starts = np.append(0, ends[:-1])
    found, distances = np.empty(len(points), np.int32), np.empty(len(points), np.float32)

    def look(clusters: Int64) -> None:
        for cluster in clusters.tolist():
            listed = near[cluster]
            chosen = targets[torch.from_numpy(listed).to(targets.device)]
            for start in range(int(starts[cluster]), int(ends[cluster]), JOB_POINTS):
                rows = by[start : min(start + JOB_POINTS, int(ends[cluster]))]
                members = points[rows]
                scores = product(torch.from_numpy(members).to(targets.device), chosen)
                own = 1.0 if offsets is None else np.einsum("nd,nd->n", members, members) / 2
                if offsets is not None:
                    scores -= offsets[listed]
                best = scores.argmax(axis=1)
                found[rows] = listed[best]
                distances[rows] = own - scores[np.arange(len(rows)), best]

    filled = np.flatnonzero(ends > starts)
    jobs = np.split(filled, np.flatnonzero(np.diff(ends[filled] // JOB_POINTS)) + 1)
    for _ in map_in_order(look, jobs, threads):
        pass
    return found, np.maximum(distances, 0)


def neighbour_lists(centroids: Centroids, threads: Workers) -> Int64:
    """Return the centroids near each, (K, 64) and itself among them: of very many, the near ones that a list holds."""
    if len(centroids) <= 2 * EXACT_CENTROIDS:
        return neighbours_of(centroids.vectors, centroids, NUM_NEIGHBOURS, threads)
    lists = make_lists(centroids, 4 * NUM_NEIGHBOURS, threads, 0)
    heads, _ = search_points(centroids.vectors, lists.coarse, threads)
    near = np.empty((len(centroids), NUM_NEIGHBOURS), np.int64)
    targets, offsets = torch.from_numpy(centroids.vectors).to(device()), centroids.offsets()

    def look(head: int) -> None:
        members = np.flatnonzero(heads == head)
        listed = np.union1d(lists.listed[head], members)
        chosen = torch.from_numpy(listed).to(targets.device)
        scores = product(targets[torch.from_numpy(members).to(targets.device)], targets[chosen])
        if offsets is not None:
            scores -= offsets[listed]
        best = np.argpartition(scores, len(listed) - NUM_NEIGHBOURS, axis=1)[:, len(listed) - NUM_NEIGHBOURS :]
        near[members] = np.sort(listed[best], axis=1)

    for _ in map_in_order(look, np.unique(heads).tolist(), threads):
        pass
    return near


def fill_empty(assignments: Int32, distances: Float32, num_clusters: int, dim: int) -> None:
    """Give every empty cluster, in place, the farthest member of one of the costliest clusters, while these have any.

    Clusters of one and the same point give nothing.
    """
    sizes = np.bincount(assignments, minlength=num_clusters)
    empty = np.flatnonzero(sizes == 0)
    if not len(empty):
        return
    costs = np.bincount(assignments, distances, num_clusters)
    by = np.lexsort((-distances, assignments))
    farthest = by[(np.cumsum(sizes) - sizes)[sizes > 0]]  # of each cluster that has points
    farthest = farthest[np.argsort(-costs[sizes > 0], kind="stable")]
    farthest = farthest[distances[farthest] > tolerance(dim) * max(1.0, float(distances.mean()))][: len(empty)]
    assignments[farthest] = empty[: len(farthest)]


def add_points(sums: Float64, points: Float32, rows: Int64, clusters: Int32, threads: Workers, sign: int = 1) -> None:
    """Add points (S, D) at `rows` (M,) to the sums of their clusters (M,), or take them away, in a fixed order."""
    by = np.argsort(clusters, kind="stable")
    ranked = clusters[by]
    firsts = np.flatnonzero(np.diff(ranked, prepend=-1))
    jobs = np.split(firsts, np.flatnonzero(np.diff(firsts // JOB_POINTS)) + 1) if len(firsts) else []
    bounds = [int(job[0]) for job in jobs] + [len(by)]

    def add(job: int) -> None:
        for start in range(bounds[job], bounds[job + 1], JOB_POINTS):
            part = slice(start, min(start + JOB_POINTS, bounds[job + 1]))
            present, places = np.unique(ranked[part], return_index=True)
            members = points[rows[by[part]]]
            sums[present] += sign * np.add.reduceat(members, places, axis=0, dtype=np.float64)

    for _ in map_in_order(add, range(len(jobs)), threads):
        pass


def centroid_means(sums: Float64, sizes: Int64, before: Float32, metric: Metric) -> Float32:
    """Return the centroids (K, D) of clusters with these sums and sizes; an empty one stays where it was."""
    if metric == "cosine":
        means = unit_length(sums.astype(np.float32))
        is_none = (sizes == 0) | ~means.any(axis=1)
    else:
        means = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
        is_none = sizes == 0
    means[is_none] = before[is_none]
    return means


def starting_points(
    points: Float32, num_clusters: int, metric: Metric, init: Init, seed: int, threads: Workers
) -> Float32:
    """Return K of the points (S, D), (K, D): any ("sampled"), or those that are far from each other ("k-means++").

    More than 128 are drawn in groups of points around fewer centroids; a group gets as many as its share of the
    squared distances. So the cost grows with S sqrt(K), not with S K.
    """
    rng = np.random.default_rng([seed, 5])
    if init == "sampled":
        return points[np.sort(rng.choice(len(points), num_clusters, replace=False))]
    if num_clusters <= UNGROUPED_CENTROIDS:
        return points[spread_members(points, np.arange(len(points)), num_clusters, rng)]
    num_groups = round(GROUPS_FACTOR * num_clusters**0.5)
    few = np.sort(rng.choice(len(points), min(len(points), POINTS_A_CENTROID * num_groups), replace=False))
    first = fit(points[few], num_groups, metric, init, seed, threads)
    coarse = iterate(first, points[few], metric, threads, num_iterations=GROUP_ITERATIONS)
    groups, scores = search_points(points, Centroids(coarse.centroids, metric), threads)
    squares = np.einsum("nd,nd->n", points, points)
    distances = np.maximum(1 - scores if metric == "cosine" else squares / 2 - scores, 0)
    sizes = np.bincount(groups, minlength=num_groups)
    counts = allocate(
        sizes,
        np.array([num_clusters]),
        seeded_keys(num_groups, seed, 5),
        weights=np.bincount(groups, distances, num_groups).astype(np.float64),
    )
    by = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])

    def draw(group: int) -> Int64:
        return spread_members(points, by[group], int(counts[group]), np.random.default_rng([seed, 6, group]))

    started: Float32 = points[np.concatenate(list(map_in_order(draw, np.flatnonzero(counts).tolist(), threads)))]
    return started


def spread_members(points: Float32, members: Int64, num: int, rng: np.random.Generator) -> Int64:
    """Return `num` of the rows `members` (M,) whose points (S, D) are far from each other; of a crowd, among some."""
    if len(members) > SPREAD_POINTS * num:
        members = np.sort(rng.choice(members, SPREAD_POINTS * num, replace=False))
    drawn: Int64 = members[spread_points(points[members], num, rng)]
    return drawn


def spread_points(points: Float32, num: int, rng: np.random.Generator) -> Int64:
    """Return different places of `num` of the points (S, D), far from each other. One thread.

    Greedy k-means++ (Arthur and Vassilvitskii 2007): of a few points that are drawn by their squared distance to the
    chosen ones, the one that lessens the sum of these distances most.
    """
    squares = np.einsum("nd,nd->n", points, points)
    targets = torch.from_numpy(points).to(device())
    num_drawn = 2 + int(np.log(num))
    chosen = np.empty(num, np.int64)
    chosen[0] = rng.integers(len(points))
    nearest = _squared_distances(targets, squares, chosen[:1])[:, 0]
    nearest[chosen[0]] = 0
    for count in range(1, num):
        running = np.cumsum(nearest, dtype=np.float64)
        if running[-1] == 0:  # only copies are left
            rest = np.setdiff1d(np.arange(len(points)), chosen[:count], assume_unique=False)
            chosen[count:] = rest[: num - count]
            break
        drawn = np.searchsorted(running, rng.random(num_drawn) * running[-1], side="right")
        drawn = np.minimum(drawn, len(points) - 1)
        lessened = np.minimum(_squared_distances(targets, squares, drawn), nearest[:, None])
        best = int(lessened.sum(axis=0, dtype=np.float64).argmin())
        chosen[count] = drawn[best]
        nearest = lessened[:, best].copy()
        nearest[drawn[best]] = 0
    return chosen


def _squared_distances(targets: Tensor, squares: Float32, places: Int64) -> Float32:
    """Return those of all points (S, D) to the ones at `places` (M,), (S, M), without what rounding makes of zero."""
    products = product(targets, targets[torch.from_numpy(places).to(targets.device)])
    sums = squares[:, None] + squares[places]
    distances = sums - 2 * products
    distances[distances < ROUNDING * sums] = 0
    return distances
