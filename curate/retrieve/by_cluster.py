"""Pool images of the clusters that queries fall into.

N pool images, K clusters, D numbers a vector.
"""

from dataclasses import replace

import numpy as np
import pyarrow.compute as pc

from ... import console
from ...features.search.neighbors import Identity, SearchSettings, nearest
from ...store.vectors import Float32, Int64, Vectors, unit_length
from ..cluster.kmeans import cluster_vectors
from ..inputs import EmbeddedImages
from .assignment import QuerySet, Retrieved

CLUSTER_COLUMN = "cluster_0"  # the finest clusters of a pool that `cluster` made
NUM_RESAMPLINGS = 10  # of the clusters that a pool without any is put into
SUM_ROWS = 16_384  # vectors summed at a time; fixed, so that sums do not depend on anything else


def num_own_clusters(pool: EmbeddedImages) -> int | None:
    """Return how many clusters the pool's own column has, None where there is no such column."""
    if CLUSTER_COLUMN not in pool.source.manifest.names():
        return None
    return len(pc.unique(pc.drop_null(pool.column(CLUSTER_COLUMN))))


def clusters_of(pool: EmbeddedImages, num_clusters: int | None, seed: int) -> tuple[Int64, Float32]:
    """Return the cluster of every pool image, (N,), and the centroids (K, D): the pool's own, else made here."""
    if num_clusters is None and num_own_clusters(pool):
        clusters = pc.fill_null(pool.column(CLUSTER_COLUMN), -1).to_numpy().astype(np.int64)
        return clusters, mean_directions(pool.vectors, clusters)
    why = "the pool has no column cluster_0: " if num_clusters is None else ""
    num_clusters = num_clusters or max(1, round(len(pool) ** 0.5))
    console.say(f"{why}making {num_clusters:,} clusters of its images")
    made = cluster_vectors(pool.vectors, num_clusters, num_resamplings=NUM_RESAMPLINGS, seed=seed)
    return made.assignments.astype(np.int64), made.centroids


def mean_directions(vectors: Vectors, clusters: Int64) -> Float32:
    """Return the mean of each cluster's unit vectors at length 1, (K, D), zero where it is empty; -1 is no cluster."""
    sums = np.zeros((int(clusters.max()) + 1, vectors.dim))
    for start in range(0, len(vectors), SUM_ROWS):
        rows = np.arange(start, min(start + SUM_ROWS, len(vectors)))
        rows = rows[clusters[rows] >= 0]
        by = rows[np.argsort(clusters[rows], kind="stable")]
        present, first = np.unique(clusters[by], return_index=True)
        if len(present):
            sums[present] += np.add.reduceat(vectors.exact(by), first, axis=0)
    return unit_length(sums.astype(np.float32))


def some_of_each_cluster(
    part: QuerySet,
    pool: EmbeddedImages,
    clusters: Int64,
    centroids: Float32,
    identity: Identity,
    *,
    min_queries: int,
    min_similarity: float | None,
    search: SearchSettings,
) -> tuple[Retrieved, int]:
    """Return up to the set's number of pool images of every cluster that enough of its queries fall into.

    Also returns the number of these clusters. A query falls into the cluster of the most similar centroid. Of a
    cluster come the images that are most similar to any of its queries; each stays with that query, and its rank is its
    place among those that came with it.
    """
    exactly = replace(search, recall=1.0)  # few centroids, and few queries a cluster
    filled = np.unique(clusters[clusters >= 0])
    offered = Vectors(centroids[filled], np.arange(len(filled)), pool.vectors.base)
    of_all = np.arange(len(filled))
    fallen = filled[nearest(part.images.vectors, offered, 1, order=of_all, search=exactly).indices[:, 0]]
    by_cluster = np.argsort(clusters, kind="stable")
    hit, counts = np.unique(fallen, return_counts=True)
    hit = hit[counts >= min_queries]
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    with console.progress(f"comparing within clusters of {part.name}", len(hit), "clusters") as advance:
        for cluster in hit.tolist():
            start, stop = np.searchsorted(clusters, [cluster, cluster + 1], sorter=by_cluster)
            members, mine = by_cluster[start:stop], np.flatnonzero(fallen == cluster)
            found = nearest(
                pool.vectors.take(members),
                part.images.vectors.take(mine),
                1,
                order=mine,
                identity=Identity(identity.pool[members], identity.queries[mine + part.start]),
                search=exactly,
                progress=None,
            )
            similarity = found.similarities[:, 0]
            best = np.lexsort((pool.order[members], -similarity))[: part.number]
            best = best[found.indices[best, 0] >= 0]
            if min_similarity is not None:
                best = best[similarity[best] >= min_similarity]
            parts.append((members[best], mine[found.indices[best, 0]] + part.start, similarity[best]))
            advance()
    images, query, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    by = np.lexsort((pool.order[images], -similarity, query))
    rank = np.arange(len(by)) - np.searchsorted(query[by], query[by]) + 1
    return Retrieved(images[by], query[by], rank, similarity[by]), len(hit)
