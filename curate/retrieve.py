"""Pool images that resemble the query images: the nearest of each, or some of every cluster that queries fall into.

Source: section 3 and appendix A.4 of Oquab et al. 2023 (DINOv2).

Q queries, N pool images, K clusters.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..features.neighbors import Identity, nearest
from ..store import catalog
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ..store.manifest import IMAGE_FIELDS, OPTIONAL_IMAGE_FIELDS, ROW_FIELD, SELECTION_FIELDS, Provenance, open_manifest
from ..store.vectors import Float32, Float64, Int64, Vectors, unit_length
from .kmeans import cluster_vectors
from .selection import (
    EmbeddedImages,
    Input,
    check_same_model,
    describe,
    identity_of,
    open_input,
    read_embedded,
    say_choice,
    selected,
    selection_provenance,
    warn_of_plain_features,
    write_table,
)

DEFAULT_K = 4
CLUSTER_COLUMN = "cluster_0"  # the finest clusters of a pool that `cluster` made
QUERY_SOURCE = "queries"  # `source` of the queries that come along
NUM_RESAMPLINGS = 10  # of the clusters that a pool without any is put into
SUM_ROWS = 16_384  # vectors summed at a time; fixed, so that sums do not depend on anything else


@dataclass(frozen=True)
class RetrieveSettings:
    """What `dinov2 curate retrieve` can be told, beside the options that all commands share."""

    k: int | None = None  # nearest pool images of every query; None: 4, or --per-cluster
    per_cluster: int | None = None  # images of every cluster that a query falls into
    num_clusters: int | None = None  # None: the pool's own clusters, else about sqrt(N)
    include_queries: bool = False
    features: Path | None = None


@dataclass(frozen=True)
class Retrieved:
    """Pool images with the query that each came by, every pool image at most once."""

    pool: Int64  # (R,) positions in the pool
    query: Int64  # (R,) positions among the queries
    rank: Int64  # (R,) 1 for the query's nearest
    similarity: Float64  # (R,)

    def take(self, indices: Int64) -> "Retrieved":
        """Return some of them."""
        return Retrieved(self.pool[indices], self.query[indices], self.rank[indices], self.similarity[indices])

    def ordered(self) -> "Retrieved":
        """Return the same by query, then rank."""
        return self.take(np.lexsort((self.rank, self.query)))


def retrieve_images(
    queries: Path | None, pool: Path | None, output: str, settings: RetrieveSettings, options: Options
) -> Result | None:
    """Write the pool images that resemble the queries; return None after a dry run."""
    path = check_manifest_name(output)
    _check(settings)
    query_input, pool_input = _open_inputs(queries, pool, path, settings)
    check_same_model(query_input, pool_input)
    num_images = pool_input.manifest.num_rows if options.limit is None else options.limit
    num_images = min(num_images, pool_input.manifest.num_rows)
    if settings.num_clusters is not None and settings.num_clusters > num_images:
        raise ToolkitError(f"--num-clusters {settings.num_clusters} is more than {num_images} images; give fewer")
    parameters: dict[str, object] = {
        "k": settings.k or (DEFAULT_K if settings.per_cluster is None else None),
        "per_cluster": settings.per_cluster,
        "num_clusters": settings.num_clusters,
        "include_queries": settings.include_queries,
    }
    provenance = selection_provenance("curate retrieve", parameters, path, options, pool_input, query_input)
    is_made = is_up_to_date(path, provenance, options)
    if not is_made:
        warn_of_plain_features(pool_input)
    if options.dry_run:
        if not is_made:
            num_products = query_input.manifest.num_rows * pool_input.manifest.num_rows
            describe(path, [pool_input, query_input], num_products, "compare them", options)
        return None
    if not is_made:
        with recorded(path) as finished:
            images = read_embedded(query_input), read_embedded(pool_input, options.limit)
            finished.append(_retrieve(*images, path, settings, provenance))
    made = open_manifest(path)
    return Result(output, {} if made.provenance is None else made.provenance.figures)


def _check(settings: RetrieveSettings) -> None:
    if settings.k is not None and settings.per_cluster is not None:
        raise ToolkitError(f"--k {settings.k} and --per-cluster {settings.per_cluster} exclude each other; give one")
    for name, value in (
        ("--k", settings.k),
        ("--per-cluster", settings.per_cluster),
        ("--num-clusters", settings.num_clusters),
    ):
        if value is not None and value < 1:
            raise ToolkitError(f"{name} {value} would retrieve nothing; give 1 or more")
    if settings.num_clusters is not None and settings.per_cluster is None:
        raise ToolkitError(f"--num-clusters {settings.num_clusters} belongs to --per-cluster; give that too")


def _open_inputs(
    queries: Path | None, pool: Path | None, output: Path, settings: RetrieveSettings
) -> tuple[Input, Input]:
    """Open both manifests; where both are left out, the newest two by one model."""
    if queries is None and pool is None:
        queries, pool = catalog.choose_pair()
        say_choice("queries", queries)
        say_choice("pool", pool)
    return open_input("queries", queries, output), open_input("pool", pool, output, settings.features)


def _retrieve(
    queries: EmbeddedImages, pool: EmbeddedImages, path: Path, settings: RetrieveSettings, provenance: Provenance
) -> Provenance:
    identity = identity_of(queries, pool)
    figures: dict[str, object] = {"queries": len(queries), "pool": len(pool)}
    if settings.per_cluster is None:
        k = settings.k or DEFAULT_K
        _say_limits(len(queries), pool, k)
        found, num_taken = nearest_of_each(queries, pool, k, identity)
        figures["collisions"] = num_taken
        note = f"; {num_taken:,} more were wanted by several queries, and stay with the most similar"
    else:
        clusters, centroids = _clusters(pool, settings, provenance.seed)
        found, num_hit = some_of_each_cluster(queries, pool, clusters, centroids, settings.per_cluster, identity)
        figures |= {"clusters": len(centroids), "clusters_hit": num_hit}
        note = f" from {num_hit:,} of {len(centroids):,} clusters"
    if settings.include_queries:  # a pool image that is a query comes once, as the query
        found = found.take(np.flatnonzero(~np.isin(identity.pool[found.pool], identity.queries)))
    table = _table(queries, pool, found, settings.include_queries)
    figures |= {"images": table.num_rows, "retrieved": len(found.pool)}
    console.say(f"{len(queries):,} queries brought {len(found.pool):,} of {len(pool):,} pool images{note}")
    return write_table(path, table, provenance, figures)


def _say_limits(num_queries: int, pool: EmbeddedImages, k: int) -> None:
    """Say how much --k can give at most where that is not the pool, and how --per-cluster would give more."""
    num_images = len(pool)
    if k >= num_images:
        console.say(f"the pool has {num_images:,} images: every query ranks all of them")
    elif num_queries * k < num_images:
        num_clusters = _num_own_clusters(pool) or round(num_images**0.5)
        num_hit = min(num_queries, num_clusters)
        console.say(
            f"{num_queries:,} queries with --k {k} give at most {num_queries * k:,} of {num_images:,} images;"
            f" --per-cluster M would give up to M from each of the at most {num_hit:,} of {num_clusters:,} clusters"
            f" they fall into, of {num_images / num_clusters:,.0f} images on average"
        )


def nearest_of_each(queries: EmbeddedImages, pool: EmbeddedImages, k: int, identity: Identity) -> tuple[Retrieved, int]:
    """Return the k nearest pool images of every query, and how often an image was wanted by one more query.

    An image that several queries want stays with the one it is most similar to, of ties with the earlier; its rank is
    its place among that query's own neighbours.
    """
    neighbors = nearest(queries.vectors, pool.vectors, k, order=pool.order, identity=identity)
    query, column = np.nonzero(neighbors.indices >= 0)
    wanted = Retrieved(neighbors.indices[query, column], query, column + 1, neighbors.similarities[query, column])
    by = np.lexsort((wanted.query, -wanted.similarity, wanted.pool))
    _, first = np.unique(wanted.pool[by], return_index=True)
    found = wanted.take(by[first])
    return found.ordered(), len(wanted.pool) - len(found.pool)


def _num_own_clusters(pool: EmbeddedImages) -> int | None:
    """Return how many clusters the pool's own column has, None where there is no such column."""
    if CLUSTER_COLUMN not in pool.source.manifest.names():
        return None
    return len(pc.unique(pc.drop_null(pool.source.manifest.read([CLUSTER_COLUMN], len(pool)).column(0))))


def _clusters(pool: EmbeddedImages, settings: RetrieveSettings, seed: int) -> tuple[Int64, Float32]:
    """Return the cluster of every pool image, (N,), and the centroids (K, D): the pool's own, else made here."""
    if settings.num_clusters is None and _num_own_clusters(pool):
        column = pool.source.manifest.read([CLUSTER_COLUMN], len(pool)).column(0)
        clusters = pc.fill_null(column, -1).to_numpy().astype(np.int64)
        return clusters, mean_directions(pool.vectors, clusters)
    num_clusters = settings.num_clusters or max(1, round(len(pool) ** 0.5))
    why = "the pool has no column cluster_0: " if settings.num_clusters is None else ""
    console.say(f"{why}making {num_clusters:,} clusters of its images")
    made = cluster_vectors(pool.vectors, num_clusters, num_resamplings=NUM_RESAMPLINGS, seed=seed)
    return made.assignments, made.centroids


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
    queries: EmbeddedImages,
    pool: EmbeddedImages,
    clusters: Int64,
    centroids: Float32,
    num_wanted: int,
    identity: Identity,
) -> tuple[Retrieved, int]:
    """Return up to `num_wanted` pool images of every cluster that a query falls into, and the number of these clusters.

    A query falls into the cluster of the most similar centroid. Of a cluster come the images that are most similar to
    any of its queries; each stays with that query, and its rank is its place among those that came with it.
    """
    filled = np.unique(clusters[clusters >= 0])
    offered = Vectors(centroids[filled], np.arange(len(filled)), pool.vectors.base)
    fallen = filled[nearest(queries.vectors, offered, 1, order=np.arange(len(filled))).indices[:, 0]]
    by_cluster = np.argsort(clusters, kind="stable")
    hit = np.unique(fallen)
    parts = []
    with console.progress("comparing within clusters", len(hit), "clusters") as advance:
        for cluster in hit.tolist():
            start, stop = np.searchsorted(clusters[by_cluster], [cluster, cluster + 1])
            members, mine = by_cluster[start:stop], np.flatnonzero(fallen == cluster)
            found = nearest(
                pool.vectors.take(members),
                queries.vectors.take(mine),
                1,
                order=mine,
                identity=Identity(identity.pool[members], identity.queries[mine]),
                progress=None,
            )
            similarity = found.similarities[:, 0]
            best = np.lexsort((pool.order[members], -similarity))[:num_wanted]
            best = best[found.indices[best, 0] >= 0]
            parts.append((members[best], mine[found.indices[best, 0]], similarity[best]))
            advance()
    images, query, similarity = (np.concatenate(column) for column in zip(*parts, strict=True))
    by = np.lexsort((pool.order[images], -similarity, query))
    rank = np.arange(len(by)) - np.searchsorted(query[by], query[by]) + 1
    return Retrieved(images[by], query[by], rank, similarity[by]), len(hit)


def _table(queries: EmbeddedImages, pool: EmbeddedImages, found: Retrieved, include_queries: bool) -> pa.Table:
    """Return the rows to write, by query, then rank; queries that come along have rank 0 and no row."""
    has_weights = "weight" in (*pool.images.column_names, *(queries.images.column_names if include_queries else ()))
    name = queries.source.manifest.path.name.removesuffix(".parquet")
    table = _rows(selected(pool, found.pool), name, queries, found, has_weights)
    if not include_queries:
        return table
    every = np.arange(len(queries))
    themselves = Retrieved(every, every, np.zeros(len(every), np.int64), np.ones(len(every)))
    images = queries.images.append_column(ROW_FIELD, pa.nulls(len(every), ROW_FIELD.type))
    table = pa.concat_tables([table, _rows(images, QUERY_SOURCE, queries, themselves, has_weights)])
    by = np.lexsort((np.append(found.rank, themselves.rank), np.append(found.query, themselves.query)))
    return table.take(pa.array(by))


def _rows(images: pa.Table, source: str, queries: EmbeddedImages, found: Retrieved, has_weights: bool) -> pa.Table:
    """Return image columns, source, row, query_id, rank and similarity of what was found."""
    query_ids = pc.coalesce(queries.images.column("image_id"), queries.uris()).take(pa.array(found.query))
    added = {
        "source": pa.array([source] * len(found.pool), pa.string()),
        "query_id": query_ids,
        "rank": pa.array(found.rank),
        "similarity": pa.array(found.similarity),
    }
    if has_weights:
        given = images.column("weight") if "weight" in images.column_names else pa.nulls(len(found.pool), pa.float32())
        added["weight"] = pc.fill_null(given, 1.0)
    fields = [*IMAGE_FIELDS, *OPTIONAL_IMAGE_FIELDS, ROW_FIELD, *SELECTION_FIELDS]
    schema = pa.schema([field for field in fields if field.name in (*added, *images.column_names)])
    columns = [added[name] if name in added else images.column(name) for name in schema.names]
    return pa.table(columns, names=schema.names).cast(schema)
