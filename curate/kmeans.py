"""Spherical k-means with resampling: centroids by FAISS, on one level of a hierarchy.

N vectors, S of them sampled, D numbers a vector, K clusters.
"""

from dataclasses import dataclass

import faiss
import numpy as np

from .. import console
from ..features.neighbors import tolerance
from ..store.vectors import Float32, Int64, Vectors

POINTS_A_CENTROID = 256  # FAISS's own limit: more points move a centroid little
NUM_ITERATIONS = 20  # chosen
EARLY_STOP = 1e-4  # relative gain below which iterations end; FAISS's default never stops
BLOCK_PRODUCTS = 1 << 25  # chosen: similarities held at once, 128 MB
MAX_RESEEDINGS = 10  # chosen: rounds of filling empty clusters


@dataclass(frozen=True)
class Clustering:
    """One level of clusters."""

    centroids: Float32  # (K, D) at length 1
    assignments: Int64  # (N,) the most similar centroid, of ties the lowest
    similarities: Float32  # (N,) to it


def cluster_vectors(vectors: Vectors, num_clusters: int, *, num_resamplings: int, seed: int) -> Clustering:
    """Cluster vectors (N, D) by cosine; N is at least `num_clusters`.

    Centroids are fitted to at most 256 random rows a cluster, so the cost of resampling does not grow with N; then all
    rows are assigned, and empty clusters take the rows that are farthest from their centroids. Clusters stay empty
    only where there are fewer distinct vectors.

    Equal thread counts give equal results.
    """
    rng = np.random.default_rng(seed % 2**63)
    num_points = min(len(vectors), POINTS_A_CENTROID * num_clusters)
    sample = np.sort(rng.choice(len(vectors), num_points, replace=False))
    points = vectors.take(sample).unit(0, num_points)  # (S, D)
    centroids = fit_centroids(points, num_clusters, num_resamplings, seed)
    assignments, similarities = assign(vectors, centroids)
    for _ in range(MAX_RESEEDINGS):
        empty = np.flatnonzero(np.bincount(assignments, minlength=num_clusters) == 0)
        farthest = np.argsort(similarities, kind="stable")[: len(empty)]
        farthest = farthest[similarities[farthest] < 1 - tolerance(vectors.dim)]
        if not len(farthest):
            break
        centroids[empty[: len(farthest)]] = vectors.take(farthest).unit(0, len(farthest))
        assignments, similarities = assign(vectors, centroids)
    return Clustering(centroids, assignments, similarities)


def fit_centroids(points: Float32, num_clusters: int, num_resamplings: int, seed: int) -> Float32:
    """Return centroids (K, D) of unit vectors (S, D), k-means run again on what each cluster's centre says.

    Plain k-means follows the density of the data, so crowds get most centroids. Each resampling keeps only the r
    members closest to each centroid, r half the average cluster size, and clusters these: the same number of every
    cluster flattens the density.
    Source: Vo et al. 2024 (Automatic Data Curation for Self-Supervised Learning), section 3.3.
    """
    num_kept = max(1, round(len(points) / num_clusters / 2))
    with console.progress(f"{num_clusters:,} clusters", num_resamplings + 1, "fits") as advance:
        centroids = _kmeans(points, num_clusters, seed)
        advance()
        for step in range(1, num_resamplings + 1):
            assignments, similarities = _assign_block(points, centroids)
            ranked = np.lexsort((-similarities, assignments))
            cluster = assignments[ranked]
            place = np.arange(len(ranked)) - np.searchsorted(cluster, cluster)  # 0 for a cluster's closest
            chosen = np.sort(ranked[place < num_kept])
            if len(chosen) < num_clusters:  # too many copies of too few vectors
                break
            centroids = _kmeans(points[chosen], num_clusters, seed + step)
            advance()
    return centroids


def _kmeans(points: Float32, num_clusters: int, seed: int) -> Float32:
    kmeans = faiss.Kmeans(
        points.shape[1],
        num_clusters,
        niter=NUM_ITERATIONS,
        seed=seed % 2**31,
        spherical=True,
        gpu=faiss.get_num_gpus() > 0,
        init_method=faiss.ClusteringInitMethod_AFK_MC2,  # k-means++ by a Markov chain: as good, without K passes
        early_stop_threshold=EARLY_STOP,
        min_points_per_centroid=1,
        max_points_per_centroid=POINTS_A_CENTROID,
    )
    kmeans.train(points)
    assert kmeans.centroids is not None
    return kmeans.centroids


def assign(vectors: Vectors, centroids: Float32) -> tuple[Int64, Float32]:
    """Return the most similar centroid (K, D) of every vector (N, D), of ties the lowest, and the similarity."""
    block_rows = max(1, BLOCK_PRODUCTS // max(centroids.shape))
    assignments, similarities = np.empty(len(vectors), np.int64), np.empty(len(vectors), np.float32)
    with console.progress("assigning", len(vectors), "images") as advance:
        for start in range(0, len(vectors), block_rows):
            stop = min(start + block_rows, len(vectors))
            block = vectors.unit(start, stop)
            assignments[start:stop], similarities[start:stop] = _assign_block(block, centroids)
            advance(stop - start)
    return assignments, similarities


def _assign_block(points: Float32, centroids: Float32) -> tuple[Int64, Float32]:
    assignments, similarities = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    block_rows = max(1, BLOCK_PRODUCTS // len(centroids))
    for start in range(0, len(points), block_rows):
        products = points[start : start + block_rows] @ centroids.T  # (B, K)
        best = products.argmax(axis=1)
        assignments[start : start + len(best)] = best
        similarities[start : start + len(best)] = products[np.arange(len(best)), best]
    return assignments, similarities
