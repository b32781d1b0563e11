"""Measures of clusters: sizes, balance, agreement with labels, hubs, and clusters that look like junk.

N images, K clusters of a level, C classes, D numbers a centroid.
"""

from dataclasses import dataclass

import numpy as np

from ...features.grouping import group_by
from ...features.search.centroids import neighbors_of_centroids
from ...features.threads import workers
from ...store.vectors import Bools, Float32, Float64, Int32, Int64, unit_length
from .lloyd import NUM_NEIGHBORS

HUB_TIMES = 4.0  # chosen: a hub has at least so many times the average number of children,
HUB_NORM = 0.5  # and their mean is at most this share as long as that of the median node
LOOSE_COSINE = 0.1  # chosen: children of one node that are less alike form no groups; 0.24 to 0.77 where there are some
TINY_SHARE = 0.1  # chosen: a tiny cluster has at most this share of the average size,
FAR_DEVIATIONS = 3.5  # and is isolated by so many robust standard deviations more than the median
MIN_CLUSTERS = 10  # with fewer, none is typical, and none suspected
BLOCK_CENTROIDS = 64


@dataclass(frozen=True)
class Contingency:
    """How many images of each class each cluster has: the pairs that occur."""

    clusters: Int64
    classes: Int64
    counts: Int64


def contingency(clusters: Int64 | Int32, classes: Int64 | Int32) -> Contingency:
    """Count the pairs of the cluster and the class of labelled images."""
    num = int(classes.max(initial=0)) + 1
    pairs, counts = np.unique(clusters.astype(np.int64) * num + classes, return_counts=True)
    return Contingency(pairs // num, pairs % num, counts)


def majority(table: Contingency, num_clusters: int) -> tuple[Int64, Float64]:
    """Return the most frequent class of every cluster, -1 where none has a label, and its share, the purity; (K,)."""
    classes, shares = np.full(num_clusters, -1), np.zeros(num_clusters)
    by = np.lexsort((table.classes, -table.counts, table.clusters))
    present, first = np.unique(table.clusters[by], return_index=True)
    classes[present] = table.classes[by][first]
    shares[present] = table.counts[by][first] / np.bincount(table.clusters, table.counts)[present]
    return classes, shares


def purity(table: Contingency) -> float:
    """Return the share of images whose class is the most frequent one of their cluster."""
    most = np.zeros(int(table.clusters.max(initial=0)) + 1, np.int64)
    np.maximum.at(most, table.clusters, table.counts)
    return float(most.sum() / table.counts.sum())


def normalized_mutual_information(table: Contingency) -> float:
    """Return the mutual information of clusters and classes over the mean of their entropies, 0 to 1."""
    total = table.counts.sum()
    of_clusters, of_classes = (np.bincount(side, table.counts) / total for side in (table.clusters, table.classes))
    shares = table.counts / total
    information = (shares * np.log(shares / (of_clusters[table.clusters] * of_classes[table.classes]))).sum()
    entropies = [-(part[part > 0] * np.log(part[part > 0])).sum() for part in (of_clusters, of_classes)]
    return 1.0 if sum(entropies) == 0 else float(information / (sum(entropies) / 2))


def normalized_entropy(counts: Int64) -> float:
    """Return the entropy of counts (K,) over log K: 1 when all are equal, 0 when one has everything."""
    if len(counts) < 2:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts)))


def size_figures(sizes: Int64, sampled: Int64) -> dict[str, object]:
    """Return how balanced clusters are in the pool, and in the sample taken of it."""
    return {
        "clusters": len(sizes),
        "empty": int((sizes == 0).sum()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "entropy": normalized_entropy(sizes),
        "sample_entropy": normalized_entropy(sampled),
    }


@dataclass(frozen=True)
class Grouping:
    """How well an upper level groups the clusters below it."""

    hub: int  # the node with the most children
    share: float  # of all children that it has
    norm: float  # length of the mean of its children at length 1: 1 when they are one direction
    median_norm: float  # of nodes with several children
    cosine: float  # median over such nodes: mean cosine of two children, less that of any two
    num_nodes: int

    @property
    def is_hub(self) -> bool:
        """Whether the largest node is crowded, with children that have little in common."""
        return self.share * self.num_nodes >= HUB_TIMES and self.norm <= HUB_NORM * self.median_norm

    @property
    def is_hierarchy(self) -> bool:
        """Whether there is no hub, and children of one node are more alike than any two."""
        return self.num_nodes == 1 or not (self.is_hub or self.cosine < LOOSE_COSINE)


def grouping(children: Float32, parents: Int64 | Int32, num_nodes: int) -> Grouping:
    """Measure a level of nodes over the centroids below it, (K, D); `parents` (K,) tells the node of each."""
    unit = unit_length(children).astype(np.float64)
    groups = group_by(parents, num_nodes)
    sizes, filled = groups.sizes, np.flatnonzero(groups.sizes)
    sums = np.zeros((num_nodes, children.shape[1]))
    sums[filled] = np.add.reduceat(unit[groups.rows], groups.offsets[filled], axis=0)
    norms = np.sqrt(np.einsum("kd,kd->k", sums, sums)) / np.maximum(sizes, 1)
    several = np.flatnonzero(sizes > 1)
    hub = int(sizes.argmax())
    if not len(several):
        return Grouping(hub, 1 / num_nodes, float(norms[hub]), 1.0, 1.0, num_nodes)
    of_siblings = _mean_cosine(sizes[several], norms[several])
    total = unit.sum(axis=0)
    of_any = _mean_cosine(np.array([len(unit)]), np.array([np.sqrt(total @ total) / len(unit)]))[0]
    share, cosine = float(sizes[hub] / sizes.sum()), float(np.median(of_siblings) - of_any)
    return Grouping(hub, share, float(norms[hub]), float(np.median(norms[several])), cosine, num_nodes)


def _mean_cosine(sizes: Int64, norms: Float64) -> Float64:
    """Return the mean cosine of two different ones of `sizes` unit vectors whose mean has length `norms`."""
    cosine: Float64 = (sizes * norms**2 - 1) / (sizes - 1)
    return cosine


def isolation(centroids: Float32) -> Float64:
    """Return 1 - cosine of every centroid (K, D) to the nearest other one, (K,)."""
    if len(centroids) == 1:
        return np.zeros(1)
    with workers() as threads:
        neighbors = neighbors_of_centroids(centroids, NUM_NEIGHBORS, threads)
    distances = np.empty(len(centroids))
    for start in range(0, len(centroids), BLOCK_CENTROIDS):
        near = neighbors[start : start + BLOCK_CENTROIDS]
        own = centroids[start : start + BLOCK_CENTROIDS].astype(np.float64)
        apart = 1 - np.einsum("bd,bnd->bn", own, centroids[near].astype(np.float64))
        apart[near == np.arange(start, start + len(own))[:, None]] = np.inf
        distances[start : start + BLOCK_CENTROIDS] = apart.min(axis=1)
    return np.maximum(distances, 0)


def suspected_junk(sizes: Int64, isolated: Float64) -> Bools:
    """Return which clusters (K,) are tiny and far from all others, as broken and foreign images are."""
    filled = sizes > 0
    if filled.sum() < MIN_CLUSTERS:
        return np.zeros(len(sizes), bool)
    median = np.median(isolated[filled])
    deviation = 1.4826 * np.median(np.abs(isolated[filled] - median))  # the standard one, if they were normal
    is_far = isolated > median + FAR_DEVIATIONS * max(float(deviation), 1e-3 * float(median))
    is_tiny = sizes <= max(1.0, TINY_SHARE * sizes[filled].mean())
    suspected: Bools = filled & is_tiny & is_far
    return suspected
