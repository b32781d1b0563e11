"""The nearest centroid of every vector: among all or, of very many, among the candidates of a coarse quantizer.

One thread makes each product, and the shape of a product does not depend on the number of threads: results repeat.

B points, K centroids, G coarse centroids, L candidates of each, D numbers a vector. All vectors have length 1.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...store.vectors import Float32, Int32, Int64, unit_length
from ..grouping import group_by
from ..threads import Workers
from .products import device, product

EXACT_CENTROIDS = 2_048  # measured: with fewer, a coarse quantizer costs more than it saves
COARSE_FACTOR = 8  # coarse centroids = this times the root of K; measured on K = 4,000, from 1 to 8
COARSE_ITERATIONS = 4  # chosen: a coarse quantizer needs no good clusters
FIRST_CANDIDATES = 128  # of a coarse centroid, to begin with
PRODUCTS = 1 << 20  # similarities at a time, 4 MB: they stay in the cache


@dataclass(frozen=True)
class CoarseQuantizer:
    """Coarse centroids, and the centroids among which the points of each look for their nearest."""

    centroids: Float32  # (G, D)
    candidates: Int64  # (G, L) the centroids nearest to each, rising


def nearest_centroids(
    points: Float32, centroids: Float32, coarse: CoarseQuantizer | None = None
) -> tuple[Int64, Float32]:
    """Return the most similar centroid of points (B, D), of ties the lowest, and the cosine, (B,) each. One thread."""
    targets = on_device(centroids)
    nearest, cosines = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    if coarse is None:
        step = max(32, PRODUCTS // len(centroids))
        for start in range(0, len(points), step):
            block = slice(start, start + step)
            nearest[block], cosines[block] = _best(points[block], targets)
        return nearest, cosines
    labels, _ = nearest_centroids(points, coarse.centroids)
    groups = group_by(labels, len(coarse.centroids))
    step = max(32, PRODUCTS // coarse.candidates.shape[1])
    for label in np.flatnonzero(groups.sizes).tolist():
        search_candidates(points, groups.of(label), targets, coarse.candidates[label], step, nearest, cosines)
    return nearest, cosines


def search_candidates(
    points: Float32,
    rows: Int64,
    centroids: Tensor,
    candidates: Int64,
    step: int,
    nearest: npt.NDArray[np.integer],
    cosines: Float32,
) -> None:
    """Write the nearest of a few candidates, and the cosine to it, for the points at `rows`, `step` at a time."""
    chosen = _take(centroids, candidates)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        place, cosines[block] = _best(points[block], chosen)
        nearest[block] = candidates[place]


def _best(points: Float32, targets: Tensor) -> tuple[Int64, Float32]:
    products = product(on_device(points), targets)
    place = products.argmax(axis=1)
    return place, products[np.arange(len(place)), place]


def search_centroids(
    points: Float32, centroids: Float32, threads: Workers, coarse: CoarseQuantizer | None = None
) -> tuple[Int32, Float32]:
    """Return what `nearest_centroids` does, by several threads."""
    nearest, cosines = np.empty(len(points), np.int32), np.empty(len(points), np.float32)
    step = 4_096 if coarse is None else 65_536  # gathering candidates is worth it for many points

    def search(start: int) -> None:
        block = slice(start, start + step)
        nearest[block], cosines[block] = nearest_centroids(points[block], centroids, coarse)

    list(threads.map(search, range(0, len(points), step)))  # waits for all, and raises what one raises
    return nearest, cosines


def train_coarse_quantizer(centroids: Float32, num_candidates: int, threads: Workers, seed: int) -> CoarseQuantizer:
    """Return about 8 sqrt(K) coarse centroids of the centroids (K, D), each with the nearest of these."""
    num_coarse = min(len(centroids), COARSE_FACTOR * round(len(centroids) ** 0.5))
    chosen = np.random.default_rng([seed, 11]).choice(len(centroids), num_coarse, replace=False)
    coarse = centroids[np.sort(chosen)]
    for _ in range(COARSE_ITERATIONS):
        labels, _ = search_centroids(centroids, coarse, threads)
        groups = group_by(labels, num_coarse)
        filled = np.flatnonzero(groups.sizes)
        sums = np.add.reduceat(centroids[groups.rows], groups.offsets[filled], axis=0)
        coarse[filled] = unit_length(sums)
    return CoarseQuantizer(coarse, several_nearest(coarse, centroids, num_candidates, threads))


def fit_coarse_quantizer(
    centroids: Float32, sample: Float32, recall: float, threads: Workers, seed: int
) -> tuple[CoarseQuantizer | None, float]:
    """Return a quantizer by which the share `recall` of a sample (B, D) finds its nearest centroid, and that share.

    Candidates are doubled until they suffice. Where comparing with all centroids is as cheap: None, and 1.
    """
    if len(centroids) <= EXACT_CENTROIDS or recall >= 1:
        return None, 1.0
    exact, _ = search_centroids(sample, centroids, threads)
    num_candidates = FIRST_CANDIDATES
    while COARSE_FACTOR * len(centroids) ** 0.5 + num_candidates < len(centroids) / 2:
        coarse = train_coarse_quantizer(centroids, num_candidates, threads, seed)
        found, _ = search_centroids(sample, centroids, threads, coarse)
        share = float((found == exact).mean())
        if share >= recall:
            return coarse, share
        num_candidates *= 2
    return None, 1.0


def several_nearest(points: Float32, centroids: Float32, num: int, threads: Workers) -> Int64:
    """Return the `num` nearest centroids of points (B, D), rising, (B, num); `num` is cut to K."""
    targets = on_device(centroids)
    step = max(32, PRODUCTS // len(centroids))

    def search(start: int) -> Int64:
        return _highest(product(on_device(points[start : start + step]), targets), min(num, len(centroids)))

    return np.concatenate(list(threads.map(search, range(0, len(points), step))))


def neighbors_of_centroids(centroids: Float32, num: int, threads: Workers) -> Int64:
    """Return the `num` centroids nearest to each, itself among them, rising, (K, num); of very many, approximately."""
    if len(centroids) <= 2 * EXACT_CENTROIDS:
        return several_nearest(centroids, centroids, num, threads)
    coarse = train_coarse_quantizer(centroids, 4 * num, threads, 0)
    labels, _ = search_centroids(centroids, coarse.centroids, threads)
    groups = group_by(labels, len(coarse.centroids))
    neighbors = np.empty((len(centroids), num), np.int64)
    targets = on_device(centroids)

    def search(label: int) -> None:
        members = groups.of(label)
        candidates = np.union1d(coarse.candidates[label], members)
        places = _highest(product(_take(targets, members), _take(targets, candidates)), num)
        neighbors[members] = candidates[places]

    list(threads.map(search, np.flatnonzero(groups.sizes).tolist()))
    return neighbors


def _highest(products: Float32, num: int) -> Int64:
    """Return the columns of the `num` highest products of each row, rising."""
    least = products.shape[1] - num
    return np.sort(np.argpartition(products, least, axis=1)[:, least:], axis=1)


def on_device(vectors: Float32) -> Tensor:
    """Return vectors where products are computed."""
    return torch.from_numpy(vectors).to(device())


def _take(vectors: Tensor, rows: Int64) -> Tensor:
    return vectors[torch.from_numpy(rows).to(vectors.device)]
