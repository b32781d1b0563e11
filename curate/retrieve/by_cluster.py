"""Pool images of the clusters that queries fall into.

N pool images, K clusters, D numbers a vector.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa

from ... import console
from ...errors import ToolkitError
from ...features.grouping import group_by
from ...features.search.neighbors import Identity, SearchSettings, nearest
from ...store.vectors import Float32, Int64, Vectors, unit_length
from ..cluster.kmeans import cluster_vectors
from ..inputs import EmbeddedImages
from .assignment import Pairs, QuerySet

CLUSTER_COLUMN = "cluster_0"  # the finest clusters of a pool that `cluster` made
NUM_RESAMPLINGS = 10  # where clusters are made here
SUM_ROWS = 16_384  # vectors summed at a time; fixed, so that sums do not depend on anything else


def clusters_of(pool: EmbeddedImages, num_clusters: int | None, seed: int) -> tuple[Int64, Float32]:
    """Return the cluster of every pool image, (N,), and the centroids (K, D): the pool's own, else made here.

    An image in no cluster has -1.
    """
    if num_clusters is None and CLUSTER_COLUMN in pool.source.manifest.names():
        column = pool.column(CLUSTER_COLUMN)
        if not pa.types.is_integer(column.type):
            path = pool.source.manifest.path
            raise ToolkitError(
                f"`{CLUSTER_COLUMN}` of {path} is {column.type}, not cluster numbers; give --num-clusters"
            )
        numbers = column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy()
        present, clusters = np.unique(np.maximum(numbers, -1), return_inverse=True)
        clusters -= int(present[0] < 0)  # numbered without gaps: those of others may be of any size
        if clusters.max() >= 0:
            return clusters, spherical_centroids(pool.vectors, clusters)
    num_clusters = num_clusters or max(1, round(len(pool) ** 0.5))
    console.say(f"making {num_clusters:,} clusters of the pool's images")
    made = cluster_vectors(pool.vectors, num_clusters, num_resamplings=NUM_RESAMPLINGS, seed=seed)
    return made.assignments.astype(np.int64), made.centroids


def spherical_centroids(vectors: Vectors, clusters: Int64) -> Float32:
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


def nearest_in_clusters(
    part: QuerySet,
    pool: EmbeddedImages,
    clusters: Int64,
    centroids: Float32,
    identity: Identity,
    min_queries: int,
    above: float,
    search: SearchSettings,
) -> tuple[Pairs, int]:
    """Return up to the set's number of pool images of every cluster that enough of its queries fall into.

    Also returns the number of these clusters. A query falls into the cluster of the most similar centroid. A cluster
    gives the images that are most similar to any of its queries, each with that query and with a similarity above
    `above`. The rank of an image is its place among those of its query.
    """
    exact = replace(search, recall=1.0)  # few centroids, and few queries a cluster
    filled = np.unique(clusters[clusters >= 0])
    offered = Vectors(centroids[filled], np.arange(len(filled)), pool.vectors.base)
    found = nearest(part.images.vectors, offered, 1, order=np.arange(len(filled)), search=exact)
    queries = group_by(filled[found.indices[:, 0]], len(centroids))
    images = group_by(clusters + 1, len(centroids) + 1)  # 0: in no cluster
    hit = np.flatnonzero(queries.sizes >= min_queries)
    if not len(hit):
        console.warn(f"no cluster holds {min_queries} queries of {part.name}; lower --min-queries")
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    with console.progress(f"comparing within clusters of {part.name}", len(hit), "clusters") as advance:
        for cluster in hit.tolist():
            members, mine = images.of(cluster + 1), queries.of(cluster)
            inside, asked = pool.vectors.take(members), part.images.vectors.take(mine)
            same = Identity(identity.pool[members], identity.queries[mine + part.start])
            found = nearest(inside, asked, 1, order=mine, identity=same, above=above, search=exact, progress=None)
            similarity, place = found.similarities[:, 0], found.indices[:, 0]
            best = np.lexsort((pool.order[members], -similarity))[: part.number]
            best = best[place[best] >= 0]
            parts.append((members[best], mine[place[best]] + part.start, similarity[best]))
            advance()
    chosen, query, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    ranks = group_by(query, part.start + len(part), -similarity, pool.order[chosen]).ranks() + 1
    return Pairs(chosen, query, ranks, similarity), len(hit)
