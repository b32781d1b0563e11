"""What can be said of clusters: sizes, balance, agreement with labels, hubs, and clusters that look like junk.

N images, K clusters of a level, C classes, D numbers a centroid.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...features.threads import workers
from ...store.vectors import Float32, Float64, Int64, unit_length
from ..inputs import EmbeddedImages
from .centroid_search import Centroids, Metric
from .lloyd import neighbour_lists
from .sampling import normalised_entropy

HUB_TIMES = 4.0  # chosen: a hub has at least so many times the average children,
HUB_NORM = 0.5  # and their mean is at most this share as long as the median node's
LOOSE_COSINE = 0.1  # chosen: children of one node that are less alike form no groups; 0.24 to 0.77 where there are some
TINY_SHARE = 0.1  # chosen: a tiny cluster has at most this share of the average size,
FAR_DEVIATIONS = 3.5  # and is isolated by so many robust standard deviations more than the median
FEWEST_TO_JUDGE = 10  # clusters, below which nothing is typical
BLOCK_CENTROIDS = 4_096


@dataclass(frozen=True)
class Classes:
    """The labels of a pool as numbers."""

    codes: npt.NDArray[np.int32]  # (N,) -1 where there is none
    names: list[str]  # C


def read_classes(images: EmbeddedImages) -> Classes:
    """Return the labels of all images."""
    encoded = [table.column("label").combine_chunks().dictionary_encode() for table in images.batches(["label"])]
    if not encoded:
        return Classes(np.empty(0, np.int32), [])
    joined = pa.chunked_array(encoded).unify_dictionaries()
    codes = [chunk.indices.fill_null(-1).to_numpy().astype(np.int32) for chunk in joined.chunks]
    return Classes(np.concatenate(codes), joined.chunk(0).dictionary.to_pylist())


@dataclass(frozen=True)
class Joint:
    """How many images of each class each cluster holds: the pairs that occur."""

    clusters: Int64
    codes: Int64
    counts: Int64


def joint_counts(clusters: npt.NDArray[np.integer], classes: Classes) -> Joint:
    """Count the images with a label by cluster and class."""
    has_label = np.flatnonzero(classes.codes >= 0)
    num = max(len(classes.names), 1)
    pairs, counts = np.unique(clusters[has_label].astype(np.int64) * num + classes.codes[has_label], return_counts=True)
    return Joint(pairs // num, pairs % num, counts)


def joint_above(joint: Joint, parents: Int64) -> Joint:
    """Return the same for the clusters of the next level, of which `parents` (K,) tells."""
    num = int(joint.codes.max(initial=0)) + 1
    pairs, place = np.unique(parents[joint.clusters] * num + joint.codes, return_inverse=True)
    return Joint(pairs // num, pairs % num, np.bincount(place, joint.counts, len(pairs)).astype(np.int64))


def majority(joint: Joint, num_clusters: int) -> tuple[Int64, Float64]:
    """Return the most frequent class of every cluster, -1 where none has a label, and its share, the purity; (K,)."""
    names, shares = np.full(num_clusters, -1), np.zeros(num_clusters)
    by = np.lexsort((joint.codes, -joint.counts, joint.clusters))
    present, first = np.unique(joint.clusters[by], return_index=True)
    names[present] = joint.codes[by][first]
    totals = np.bincount(joint.clusters, joint.counts, num_clusters)
    shares[present] = joint.counts[by][first] / totals[present]
    return names, shares


def purity(joint: Joint, num_clusters: int) -> float:
    """Return the share of images whose class is the most frequent one of their cluster."""
    _, shares = majority(joint, num_clusters)
    totals = np.bincount(joint.clusters, joint.counts, num_clusters)
    return float((shares * totals).sum() / max(totals.sum(), 1))


def normalised_information(joint: Joint) -> float:
    """Return the mutual information of clusters and classes over the mean of their entropies, 0 to 1."""
    total = joint.counts.sum()
    of_clusters, of_codes = (np.bincount(side, joint.counts) / total for side in (joint.clusters, joint.codes))
    shares = joint.counts / total
    information = (shares * np.log(shares / (of_clusters[joint.clusters] * of_codes[joint.codes]))).sum()
    entropies = [-(part[part > 0] * np.log(part[part > 0])).sum() for part in (of_clusters, of_codes)]
    mean = sum(entropies) / 2
    return 1.0 if mean == 0 else float(information / mean)


def size_figures(sizes: Int64, sampled: Int64) -> dict[str, object]:
    """Return how balanced clusters are, in the pool and in what was taken of it."""
    return {
        "clusters": len(sizes),
        "empty": int((sizes == 0).sum()),
        "smallest": int(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": int(sizes.max()),
        "entropy": normalised_entropy(sizes),
        "sample_entropy": normalised_entropy(sampled),
    }


@dataclass(frozen=True)
class Grouping:
    """How well an upper level groups the clusters below it."""

    hub: int  # the node with the most children
    share: float  # of all children that it has
    norm: float  # length of the mean of its children at length 1: 1 when they are one direction
    median_norm: float  # of nodes with several children
    cosine: float  # median over such nodes of how alike two children are, less how alike any two are

    def is_hub(self, num_nodes: int) -> bool:
        """Tell whether the largest node is a hub: crowded, with children that have little in common."""
        return num_nodes > 1 and self.share * num_nodes >= HUB_TIMES and self.norm <= HUB_NORM * self.median_norm

    def is_loose(self) -> bool:
        """Tell whether children of one node are hardly more alike than any two."""
        return self.cosine < LOOSE_COSINE


def grouping(children: Float32, parents: Int64, num_nodes: int) -> Grouping:
    """Measure a level of nodes over the centroids below it, (K, D); `parents` (K,) tells the node of each."""
    unit = unit_length(children).astype(np.float64)
    sizes = np.bincount(parents, minlength=num_nodes)
    sums = np.zeros((num_nodes, children.shape[1]))
    by = np.argsort(parents, kind="stable")
    present, first = np.unique(parents[by], return_index=True)
    sums[present] = np.add.reduceat(unit[by], first, axis=0)
    norms = np.sqrt(np.einsum("kd,kd->k", sums, sums)) / np.maximum(sizes, 1)
    several = np.flatnonzero(sizes > 1)
    hub = int(sizes.argmax())
    if not len(several):
        return Grouping(hub, 1 / num_nodes, float(norms[hub]), 1.0, 1.0)
    alike = _mean_cosine(sizes[several], norms[several])
    total = unit.sum(axis=0)
    any_two = _mean_cosine(np.array([len(unit)]), np.array([np.sqrt(total @ total) / len(unit)]))[0]
    return Grouping(
        hub,
        float(sizes[hub] / sizes.sum()),
        float(norms[hub]),
        float(np.median(norms[several])),
        float(np.median(alike) - any_two),
    )


def _mean_cosine(sizes: Int64, norms: Float64) -> Float64:
    """Return the mean cosine of two different ones of `sizes` unit vectors whose mean has length `norms`."""
    cosine: Float64 = (sizes * norms**2 - 1) / (sizes - 1)
    return cosine


def isolation(centroids: Float32, metric: Metric) -> Float64:
    """Return the distance of every centroid (K, D) to the nearest other one, (K,): 1 - cosine, or the Euclidean."""
    made = Centroids(centroids, metric)
    if len(made) == 1:
        return np.zeros(1)
    with workers() as threads:
        near = neighbour_lists(made, threads)
    distances = np.empty(len(made))
    step = max(1, BLOCK_CENTROIDS // near.shape[1])
    for start in range(0, len(made), step):
        own = centroids[start : start + step].astype(np.float64)
        others = centroids[near[start : start + step]].astype(np.float64)  # (B, 64, D)
        if metric == "cosine":
            apart = 1 - np.einsum("bd,bnd->bn", own, others)
        else:
            apart = np.sqrt(((others - own[:, None]) ** 2).sum(axis=2))
        is_itself = near[start : start + step] == np.arange(start, start + len(own))[:, None]
        distances[start : start + step] = np.where(is_itself, np.inf, apart).min(axis=1)
    return np.maximum(distances, 0)


def suspected_junk(sizes: Int64, isolated: Float64) -> npt.NDArray[np.bool_]:
    """Tell which clusters (K,) are tiny and far from all others, as broken and foreign images are."""
    filled = sizes > 0
    if filled.sum() < FEWEST_TO_JUDGE:
        return np.zeros(len(sizes), bool)
    median = np.median(isolated[filled])
    deviation = 1.4826 * np.median(np.abs(isolated[filled] - median))  # the standard one, were they normal
    is_far = isolated > median + FAR_DEVIATIONS * max(float(deviation), 1e-3 * float(median))
    is_tiny = sizes <= max(1.0, TINY_SHARE * sizes[filled].mean())
    suspected: npt.NDArray[np.bool_] = filled & is_tiny & is_far
    return suspected


def class_sizes(classes: Classes, positions: Int64) -> tuple[Int64, Int64]:
    """Return how many images each class has in the pool and among those at `positions`, (C,) each."""
    counts: Sequence[Int64] = [
        np.bincount(codes[codes >= 0], minlength=len(classes.names))
        for codes in (classes.codes, classes.codes[positions])
    ]
    return counts[0], counts[1]
