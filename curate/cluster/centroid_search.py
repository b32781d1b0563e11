"""The nearest centroid of vectors: among all of them, or, of very many, among those that a coarse centroid lists.

Every product is made by one thread and has a shape that does not depend on how many there are.

B vectors, K centroids, G coarse centroids, L listed by each, D numbers a vector.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...features.search.products import device, product
from ...features.threads import Workers, map_in_order
from ...store.vectors import Float32, Int64, unit_length
from .allocation import Int32

Metric = Literal["cosine", "euclidean"]

EXACT_CENTROIDS = 2_048  # measured: with fewer, lists cost more than they save
COARSE_FACTOR = 8  # coarse centroids = this times the root of K; measured on K = 4,000, from 1 to 8
COARSE_ITERATIONS = 4  # chosen: lists need no good clusters
FIRST_LISTED = 128  # centroids a list to begin with
PRODUCTS = 1 << 20  # scores at a time, 4 MB: they stay in the cache


@dataclass(frozen=True)
class Centroids:
    """Centroids, made ready for products."""

    vectors: Float32  # (K, D), for cosine at length 1
    metric: Metric

    def __len__(self) -> int:
        return len(self.vectors)

    def offsets(self) -> Float32 | None:
        """Return half the squared lengths (K,), which scores are less by; None for cosine."""
        return None if self.metric == "cosine" else np.einsum("kd,kd->k", self.vectors, self.vectors) / 2


@dataclass(frozen=True)
class Lists:
    """For every coarse centroid those of the fine ones that are nearest to it."""

    coarse: Centroids  # G
    listed: Int64  # (G, L), rising


def nearest_centroids(points: Float32, centroids: Centroids, lists: Lists | None = None) -> tuple[Int64, Float32]:
    """Return the centroid of the highest score for each of the points (B, D), of ties the lowest, and the score.

    A score is the product with the centroid, less half of its squared length for Euclidean distances. One thread.
    """
    targets, offsets = torch.from_numpy(centroids.vectors).to(device()), centroids.offsets()
    if lists is None:
        return _best(torch.from_numpy(points).to(device()), targets, offsets)
    heads, _ = nearest_centroids(points, lists.coarse)
    best, scores = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    by = np.argsort(heads, kind="stable")
    present, starts = np.unique(heads[by], return_index=True)
    for head, rows in zip(present, np.split(by, starts[1:]), strict=True):
        listed = lists.listed[head]
        sources = torch.from_numpy(points[rows]).to(targets.device)
        chosen = targets[torch.from_numpy(listed).to(targets.device)]
        place, scores[rows] = _best(sources, chosen, None if offsets is None else offsets[listed])
        best[rows] = listed[place]
    return best, scores


def _best(points: Tensor, targets: Tensor, offsets: Float32 | None) -> tuple[Int64, Float32]:
    best, scores = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    step = max(32, PRODUCTS // len(targets))
    for start in range(0, len(points), step):
        products = product(points[start : start + step], targets)
        if offsets is not None:
            products -= offsets
        place = products.argmax(axis=1)
        best[start : start + len(place)] = place
        scores[start : start + len(place)] = products[np.arange(len(place)), place]
    return best, scores


def search_points(
    points: Float32, centroids: Centroids, threads: Workers, lists: Lists | None = None
) -> tuple[Int32, Float32]:
    """Return the same of points (S, D) in memory, by several threads; (S,) each."""
    assignments, scores = np.empty(len(points), np.int32), np.empty(len(points), np.float32)
    step = 4_096 if lists is None else 65_536  # a list is worth its making for many points

    def search(start: int) -> None:
        part = slice(start, start + step)
        assignments[part], scores[part] = nearest_centroids(points[part], centroids, lists)

    for _ in map_in_order(search, range(0, len(points), step), threads):
        pass
    return assignments, scores


def make_lists(centroids: Centroids, num_listed: int, threads: Workers, seed: int) -> Lists:
    """Return lists of the `num_listed` centroids that are nearest to each of about 8 sqrt(K) coarse centroids."""
    count = min(len(centroids), COARSE_FACTOR * round(len(centroids) ** 0.5))
    chosen = np.sort(np.random.default_rng([seed, 11]).choice(len(centroids), count, replace=False))
    coarse = Centroids(centroids.vectors[chosen], centroids.metric)
    for _ in range(COARSE_ITERATIONS):
        own, _ = search_points(centroids.vectors, coarse, threads)
        by = np.argsort(own, kind="stable")
        present, starts = np.unique(own[by], return_index=True)
        means = coarse.vectors.copy()
        sums = np.add.reduceat(centroids.vectors[by], starts, axis=0)
        counts = np.diff(starts, append=len(by)).astype(np.float32)
        means[present] = unit_length(sums) if centroids.metric == "cosine" else sums / counts[:, None]
        coarse = Centroids(means, centroids.metric)
    return Lists(coarse, neighbours_of(coarse.vectors, centroids, num_listed, threads))


def neighbours_of(points: Float32, centroids: Centroids, num: int, threads: Workers) -> Int64:
    """Return for each of the points (B, D) the `num` centroids of the highest scores, by number, (B, num)."""
    num = min(num, len(centroids))
    targets, offsets = torch.from_numpy(centroids.vectors).to(device()), centroids.offsets()
    step = max(32, PRODUCTS // len(centroids))

    def search(start: int) -> Int64:
        products = product(torch.from_numpy(points[start : start + step]).to(targets.device), targets)
        if offsets is not None:
            products -= offsets
        return np.sort(np.argpartition(products, len(centroids) - num, axis=1)[:, len(centroids) - num :], axis=1)

    return np.concatenate(list(map_in_order(search, range(0, len(points), step), threads)))


def suited_lists(
    centroids: Centroids, sample: Float32, recall: float, threads: Workers, seed: int
) -> tuple[Lists | None, float]:
    """Return lists by which at least `recall` of a sample (B, D) find their nearest centroid, and the measured share.

    Lists grow until they are good enough; None, and 1, where comparing with all centroids is as cheap.
    """
    if len(centroids) <= EXACT_CENTROIDS or recall >= 1:
        return None, 1.0
    truth, _ = search_points(sample, centroids, threads)
    num_listed = FIRST_LISTED
    while COARSE_FACTOR * len(centroids) ** 0.5 + num_listed < len(centroids) / 2:
        lists = make_lists(centroids, num_listed, threads, seed)
        found, _ = search_points(sample, centroids, threads, lists)
        share = float((found == truth).mean())
        if share >= recall:
            return lists, share
        num_listed *= 2
    return None, 1.0
