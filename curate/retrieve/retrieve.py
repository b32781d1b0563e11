"""Pool images that resemble the query images: the nearest of each, or some of every cluster that queries fall into.

Source: section 3 and appendix A.4 of Oquab et al. 2023 (DINOv2).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import Identity, Neighbors, SearchSettings, nearest
from ...store import catalog
from ...store.artifact import Options, Result, check_manifest_name, make
from ...store.manifest import OPTIONAL_IMAGE_FIELDS, ROW_FIELD, SELECTION_FIELDS, Provenance
from ...store.memory import memory_budget
from ...store.vectors import Int64
from ..inputs import (
    EmbeddedImages,
    check_same_model,
    describe,
    distinct_names,
    open_input,
    read_embedded,
    say_choice,
    split_number,
    warn_of_plain_features,
)
from ..selection import Selection, selection_provenance, write_table
from .assignment import Pairs, QuerySet, assign_to_most_similar, candidates, cap, concatenate, fill
from .by_cluster import clusters_of, nearest_in_clusters
from .same_image import identity_of

DEFAULT_K = 4
NOT_PARAMETERS = ("features", "where", "memory")  # settings that are recorded otherwise, or do not change the rows
QUERY_SOURCE = "queries"  # `source` of the queries that come along


@dataclass(frozen=True)
class Queries:
    """A query set as the command line names it."""

    path: Path
    number: int | None = None  # its own --k or --per-cluster


@dataclass(frozen=True)
class RetrieveSettings:
    """Settings of `dinov2 curate retrieve`, without the options that all commands share."""

    k: int | None = None  # nearest pool images of every query; None: 4, or --per-cluster
    per_cluster: int | None = None  # images of every cluster that enough queries fall into
    num_clusters: int | None = None  # None: the pool's own clusters, else about sqrt(N)
    include_queries: bool = False
    features: Path | None = None
    fill: bool = False  # the next nearest takes the place of an image that went to another query
    min_queries: int = 1  # of a set in a cluster, for it to give any; the paper: 4
    max_images: int | None = None  # of a query set; the paper: a million
    min_similarity: float | None = None
    where: str | None = None  # condition on the pool's rows
    memory: str | None = None  # None: a third of the machine
    recall: float = 0.99  # of searches too large to compare all with all


def parse_queries(texts: Sequence[str]) -> tuple[Queries, ...]:
    """Return the query sets of Q.parquet or Q.parquet=N.

    Raises ToolkitError when N is no whole number above 0.
    """
    sets = []
    for text in texts:
        path, number = split_number(text)
        if number is not None and not (number.isascii() and number.isdigit() and int(number) > 0):
            raise ToolkitError(f"--queries {text}: {number!r} is no number of images; give such as {path}=32")
        sets.append(Queries(path, None if number is None else int(number)))
    return tuple(sets)


def retrieve_images(
    queries: Sequence[Queries] | Path | None,
    pool: Path | None,
    output: str,
    settings: RetrieveSettings,
    options: Options,
) -> Result | None:
    """Write the pool images that resemble the queries; return None after a dry run."""
    path = check_manifest_name(output)
    _check(settings)
    sets = [Queries(queries)] if isinstance(queries, Path) else list(queries or ())
    if not sets and pool is None:
        chosen, pool = catalog.choose_pair()
        say_choice("queries", chosen)
        say_choice("pool", pool)
        sets = [Queries(chosen)]
    query_inputs = [open_input("queries", part.path, path) for part in sets] or [open_input("queries", None, path)]
    names = distinct_names([part.manifest.path for part in query_inputs])
    pool_input = open_input("pool", pool, path, settings.features, settings.where)
    for part in query_inputs:
        check_same_model(part, pool_input)
    num_images = pool_input.num_rows(options.limit)
    if settings.num_clusters is not None and settings.num_clusters > num_images:
        raise ToolkitError(f"--num-clusters {settings.num_clusters} is more than {num_images} images; give fewer")

    default = settings.per_cluster or settings.k or DEFAULT_K
    numbers = [part.number or default for part in sets] or [default]
    parameters = {name: value for name, value in asdict(settings).items() if name not in NOT_PARAMETERS}
    parameters["k" if settings.per_cluster is None else "per_cluster"] = numbers[0] if len({*numbers}) == 1 else numbers
    provenance = selection_provenance("curate retrieve", parameters, path, options, pool_input, *query_inputs)

    def describe_work() -> None:
        warn_of_plain_features(pool_input)
        num_products = sum(part.manifest.num_rows for part in query_inputs) * num_images
        describe(path, [pool_input, *query_inputs], num_products, "compare them", options)

    def work() -> Provenance:
        warn_of_plain_features(pool_input)
        images = [read_embedded(part) for part in query_inputs]
        starts = np.cumsum([0, *(len(part) for part in images)])[:-1].tolist()
        parts = [QuerySet(*values) for values in zip(names, images, numbers, starts, strict=True)]
        return _retrieve(parts, read_embedded(pool_input, options.limit), path, settings, provenance)

    return make(output, provenance, options, describe=describe_work, work=work)


def _check(settings: RetrieveSettings) -> None:
    if settings.k is not None and settings.per_cluster is not None:
        raise ToolkitError(f"--k {settings.k} and --per-cluster {settings.per_cluster} exclude each other; give one")
    for name in ("k", "per_cluster", "num_clusters", "min_queries", "max_images"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ToolkitError(f"--{name.replace('_', '-')} {value} would retrieve nothing; give 1 or more")
    for name, value in (("--num-clusters", settings.num_clusters), ("--min-queries", settings.min_queries)):
        if settings.per_cluster is None and value not in (None, 1):
            raise ToolkitError(f"{name} {value} belongs to --per-cluster; give that too")
    if settings.fill and settings.per_cluster is not None:
        raise ToolkitError("--fill belongs to --k, for a cluster has no next nearest; leave out --per-cluster")
    if settings.min_similarity is not None and not -1 <= settings.min_similarity <= 1:
        raise ToolkitError(f"--min-similarity {settings.min_similarity} is no cosine; give a number from -1 to 1")
    memory_budget(settings.memory)
    if not 0 < settings.recall <= 1:
        raise ToolkitError(f"--recall {settings.recall} is no share of the neighbours; give a number above 0, up to 1")


def _retrieve(
    sets: list[QuerySet], pool: EmbeddedImages, path: Path, settings: RetrieveSettings, provenance: Provenance
) -> Provenance:
    identity = identity_of([part.images for part in sets], pool)
    searching = SearchSettings(memory_budget(settings.memory), settings.recall, provenance.seed)
    above = -np.inf if settings.min_similarity is None else float(np.nextafter(settings.min_similarity, -np.inf))
    are_queries = np.flatnonzero(identity.pool >= 0) if settings.include_queries else np.empty(0, np.int64)
    num_queries = sum(len(part) for part in sets)
    figures: dict[str, object] = {"queries": num_queries, "pool": len(pool)}

    def search(part: QuerySet, queries: Int64, k: int) -> Neighbors:
        vectors, title = part.images.vectors.take(queries - part.start), f"searching neighbours of {part.name}"
        same = Identity(identity.queries[queries], identity.pool)
        return nearest(
            vectors, pool.vectors, k, order=pool.order, identity=same, above=above, search=searching, progress=title
        )

    if settings.per_cluster is None:
        most = sum(len(part) * part.number for part in sets)
        if most < len(pool):
            console.say(
                f"--k retrieves at most {most:,} of {len(pool):,} images; --per-cluster M takes up to M of every"
                " cluster with a query"
            )
        lists = [search(part, part.places, part.number) for part in sets]
        found = [candidates(part, neighbors) for part, neighbors in zip(sets, lists, strict=True)]
        figures["recall"] = min(neighbors.recall for neighbors in lists)
    else:
        clusters, centroids = clusters_of(pool, settings.num_clusters, provenance.seed)
        by_set = [
            nearest_in_clusters(part, pool, clusters, centroids, identity, settings.min_queries, above, searching)
            for part in sets
        ]
        found, num_hit = [pairs for pairs, _ in by_set], sum(num for _, num in by_set)
        figures |= {"clusters": len(centroids), "clusters_hit": num_hit}
        console.say(f"queries fall into {num_hit:,} of {len(centroids):,} clusters")
    if settings.fill:
        filled, fill_figures = fill(sets, lists, len(pool), search, are_queries)
        figures |= fill_figures
        assigned = [filled.of(part) for part in sets]
    else:
        assigned = [assign_to_most_similar(pairs) for pairs in found]
    retrieved = assign_to_most_similar(concatenate([cap(pairs, settings.max_images) for pairs in assigned]))
    retrieved = retrieved.take(np.flatnonzero(~np.isin(retrieved.pool, are_queries)))  # these come once, as queries

    rows = _rows(sets, pool, retrieved, identity.queries, settings.include_queries)
    num_candidates, num_distinct = sum(len(pairs) for pairs in found), len(np.unique(concatenate(found).pool))
    composition = [
        {
            "source": part.name,
            "queries": len(part),
            "number": part.number,
            "wanted": len(pairs),
            "distinct": len(np.unique(pairs.pool)),
            "images": len(retrieved.of(part)),
            "share": len(retrieved.of(part)) / max(len(retrieved), 1),
        }
        for part, pairs in zip(sets, found, strict=True)
    ]
    num_collisions = num_candidates - num_distinct
    figures |= {"images": len(rows.places), "retrieved": len(retrieved), "wanted": num_candidates}
    figures |= {"distinct": num_distinct, "collisions": num_collisions, "composition": composition}
    console.say(
        f"{num_queries:,} queries retrieved {len(retrieved):,} of {len(pool):,} pool images; {num_candidates:,}"
        f" candidates, {num_collisions:,} of them candidates of another query already"
    )
    number = "k" if settings.per_cluster is None else "per cluster"
    header = ["query set", "queries", number, "candidates", "distinct", "retrieved", "share"]
    console.table("what every query set retrieved", header, [list(part.values()) for part in composition])
    return write_table(path, rows, provenance, figures)


def _rows(
    sets: list[QuerySet], pool: EmbeddedImages, retrieved: Pairs, firsts: Int64, include_queries: bool
) -> Selection:
    """Return the rows to write, by query, then rank.

    Queries that are included have rank 0 and no `row`, for that counts in the pool's embeddings. Each image comes once:
    `firsts` (Q,) are the places of the first queries that are the same image.
    """
    parts, pairs = [(pool, retrieved.pool)], [retrieved]
    for part in sets if include_queries else ():
        places = part.places[firsts[part.places] == part.places]
        images = replace(part.images, rows=pa.nulls(len(part), ROW_FIELD.type))
        parts.append((images, places - part.start))
        pairs.append(Pairs(places, places, np.zeros(len(places), np.int64), np.ones(len(places))))
    every = concatenate(pairs)
    order = np.lexsort((every.rank, every.query))
    every = every.take(order)

    # Strings are kept once, and repeated only where they are written.
    ids = [pc.coalesce(part.images.image_column("image_id"), part.images.uris()) for part in sets]
    query_ids = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string()).combine_chunks()
    source = np.searchsorted([part.start for part in sets], every.query, side="right") - 1
    source[every.rank == 0] = len(sets)
    sources = pa.array([*(part.name for part in sets), QUERY_SOURCE])
    field = pa.schema([*OPTIONAL_IMAGE_FIELDS, *SELECTION_FIELDS]).field
    added = {
        field("source"): pa.DictionaryArray.from_arrays(pa.array(source), sources),
        field("query_id"): pa.DictionaryArray.from_arrays(pa.array(every.query), query_ids),
        field("rank"): pa.array(every.rank),
        field("similarity"): pa.array(every.similarity),
    }
    return Selection(tuple(parts), np.argsort(order), added)
