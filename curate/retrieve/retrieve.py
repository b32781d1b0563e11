"""Pool images that resemble the query images: the nearest of each, or some of every cluster that queries fall into.

Source: section 3 and appendix A.4 of Oquab et al. 2023 (DINOv2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ... import console
from ...errors import ToolkitError
from ...features.search.neighbors import SearchSettings
from ...store import catalog
from ...store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ...store.manifest import OPTIONAL_IMAGE_FIELDS, ROW_FIELD, SELECTION_FIELDS, Provenance, open_manifest
from ...store.memory import memory_budget
from ...store.vectors import Int64
from ..inputs import (
    EmbeddedImages,
    check_same_model,
    describe,
    open_input,
    read_embedded,
    say_choice,
    warn_of_plain_features,
)
from ..selection import Selection, selection_provenance, write_table
from ..weighted_parts import distinct_names, split_number
from .assignment import QuerySet, Retrieved, at_most, best_of_each, fill, neighbors_of, together, wanted
from .by_cluster import clusters_of, num_own_clusters, some_of_each_cluster
from .same_image import identity_of

DEFAULT_K = 4
QUERY_SOURCE = "queries"  # `source` of the queries that come along


@dataclass(frozen=True)
class Queries:
    """One query set as it was named."""

    path: Path
    number: int | None = None  # its own --k or --per-cluster


@dataclass(frozen=True)
class RetrieveSettings:
    """What `dinov2 curate retrieve` can be told, beside the options that all commands share."""

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
    names = distinct_names([part.path for part in sets])
    if not sets and pool is None:
        chosen, pool = catalog.choose_pair()
        say_choice("queries", chosen)
        say_choice("pool", pool)
        sets = [Queries(chosen)]
    query_inputs = [open_input("queries", part.path, path) for part in sets] or [open_input("queries", None, path)]
    names = names or distinct_names([part.manifest.path for part in query_inputs])
    pool_input = open_input("pool", pool, path, settings.features, settings.where)
    for part in query_inputs:
        check_same_model(part, pool_input)
    num_images = pool_input.num_rows(options.limit)
    if settings.num_clusters is not None and settings.num_clusters > num_images:
        raise ToolkitError(f"--num-clusters {settings.num_clusters} is more than {num_images} images; give fewer")

    usual = settings.per_cluster or settings.k or DEFAULT_K
    numbers = [part.number or usual for part in sets] or [usual]
    provenance = selection_provenance(
        "curate retrieve", _parameters(settings, numbers), path, options, pool_input, *query_inputs
    )
    is_made = is_up_to_date(path, provenance, options)
    if not is_made:
        warn_of_plain_features(pool_input)
    if options.dry_run:
        if not is_made:
            num_products = sum(part.manifest.num_rows for part in query_inputs) * num_images
            describe(path, [pool_input, *query_inputs], num_products, "compare them", options)
        return None
    if not is_made:
        with recorded(path) as finished:
            images = [read_embedded(part) for part in query_inputs]
            starts = np.cumsum([0, *(len(part) for part in images)]).tolist()
            parts = [QuerySet(*of) for of in zip(names, images, numbers, starts[:-1], strict=True)]
            finished.append(_retrieve(parts, read_embedded(pool_input, options.limit), path, settings, provenance))
    made = open_manifest(path)
    return Result(output, {} if made.provenance is None else made.provenance.figures)


def _check(settings: RetrieveSettings) -> None:
    if settings.k is not None and settings.per_cluster is not None:
        raise ToolkitError(f"--k {settings.k} and --per-cluster {settings.per_cluster} exclude each other; give one")
    for name, value in (
        ("--k", settings.k),
        ("--per-cluster", settings.per_cluster),
        ("--num-clusters", settings.num_clusters),
        ("--min-queries", settings.min_queries),
        ("--max-images", settings.max_images),
    ):
        if value is not None and value < 1:
            raise ToolkitError(f"{name} {value} would retrieve nothing; give 1 or more")
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


def _parameters(settings: RetrieveSettings, numbers: list[int]) -> dict[str, object]:
    """Return what the rows depend on."""
    alike = numbers[0] if len(set(numbers)) == 1 else numbers
    return {
        "k": alike if settings.per_cluster is None else None,
        "per_cluster": None if settings.per_cluster is None else alike,
        "num_clusters": settings.num_clusters,
        "include_queries": settings.include_queries,
        "fill": settings.fill,
        "min_queries": settings.min_queries,
        "max_images": settings.max_images,
        "min_similarity": settings.min_similarity,
        "recall": settings.recall,
    }


def _retrieve(
    sets: list[QuerySet], pool: EmbeddedImages, path: Path, settings: RetrieveSettings, provenance: Provenance
) -> Provenance:
    identity = identity_of([part.images for part in sets], pool)
    search = SearchSettings(memory_budget(settings.memory), settings.recall, provenance.seed)
    num_queries = sum(len(part) for part in sets)
    figures: dict[str, object] = {"queries": num_queries, "pool": len(pool)}
    note, filled = "", None
    if settings.per_cluster is None:
        _say_limits(sets, pool)
        lists = [neighbors_of(part, pool, identity, settings.min_similarity, search, part.number) for part in sets]
        asked = [wanted(part, neighbors) for part, neighbors in zip(sets, lists, strict=True)]
        figures["recall"] = min(neighbors.recall for neighbors in lists)
        if settings.fill:
            are_queries = np.flatnonzero(identity.pool >= 0) if settings.include_queries else np.empty(0, np.int64)
            filled = fill(
                sets,
                lists,
                pool,
                identity,
                taken=are_queries,
                min_similarity=settings.min_similarity,
                search=search,
            )
            figures |= {"recall": filled.recall, "fill_rounds": filled.rounds, "fill_depth": filled.depth}
            note = f"; places filled in {filled.rounds} rounds from up to {filled.depth:,} neighbours of a query"
    else:
        clusters, centroids = clusters_of(pool, settings.num_clusters, provenance.seed)
        asked, num_hit = [], 0
        for part in sets:
            some, num_of_set = some_of_each_cluster(
                part,
                pool,
                clusters,
                centroids,
                identity,
                min_queries=settings.min_queries,
                min_similarity=settings.min_similarity,
                search=search,
            )
            asked.append(some)
            num_hit += num_of_set
            if not num_of_set:
                console.warn(f"no cluster holds {settings.min_queries} queries of {part.name}; lower --min-queries")
        figures |= {"clusters": len(centroids), "clusters_hit": num_hit}
        note = f" from {num_hit:,} of {len(centroids):,} clusters"
    own = [best_of_each(each) for each in asked] if filled is None else [filled.found.of(part) for part in sets]
    found = best_of_each(together([at_most(each, settings.max_images) for each in own]))
    if settings.include_queries:  # a pool image that is a query comes once, as the query
        found = found.take(np.flatnonzero(identity.pool[found.pool] < 0))

    num_wanted = sum(len(each) for each in asked)
    num_distinct = len(np.unique(np.concatenate([each.pool for each in asked])))
    rows = _rows(sets, pool, found, identity.queries if settings.include_queries else None)
    figures |= {
        "images": rows.num_rows,
        "retrieved": len(found),
        "wanted": num_wanted,
        "distinct": num_distinct,
        "collisions": num_wanted - num_distinct,
        "composition": _composition(sets, asked, found),
    }
    again = f"; {num_wanted:,} were wanted, {num_wanted - num_distinct:,} of them by several queries"
    console.say(f"{num_queries:,} queries brought {len(found):,} of {len(pool):,} pool images{note}{again}")
    _say_composition(figures["composition"], "k" if settings.per_cluster is None else "per cluster")
    return write_table(path, rows, provenance, figures)


def _say_limits(sets: list[QuerySet], pool: EmbeddedImages) -> None:
    """Say how much --k can give at most where that is not the pool, and how --per-cluster would give more."""
    num_images, num_queries = len(pool), sum(len(part) for part in sets)
    most = sum(len(part) * part.number for part in sets)
    if min(part.number for part in sets) >= num_images:
        console.say(f"the pool has {num_images:,} images: every query ranks all of them")
    elif most < num_images:
        num_clusters = num_own_clusters(pool) or round(num_images**0.5)
        num_hit = min(num_queries, num_clusters)
        numbers = ", ".join(dict.fromkeys(str(part.number) for part in sets))
        console.say(
            f"{num_queries:,} queries with --k {numbers} give at most {most:,} of {num_images:,} images;"
            f" --per-cluster M would give up to M from each of the at most {num_hit:,} of {num_clusters:,} clusters"
            f" they fall into, of {num_images / num_clusters:,.0f} images on average"
        )


def _composition(sets: list[QuerySet], asked: list[Retrieved], found: Retrieved) -> list[dict[str, object]]:
    """Return what every query set wanted and brought."""
    return [
        {
            "source": part.name,
            "queries": len(part),
            "number": part.number,
            "wanted": len(of_set),
            "distinct": len(np.unique(of_set.pool)),
            "images": len(brought := found.of(part)),
            "share": len(brought) / max(len(found), 1),
        }
        for part, of_set in zip(sets, asked, strict=True)
    ]


def _say_composition(composition: object, number: str) -> None:
    assert isinstance(composition, list)
    header = ["query set", "queries", number, "wanted", "distinct", "brought", "share"]
    console.table("what every query set brought", header, [list(part.values()) for part in composition])


def _rows(sets: list[QuerySet], pool: EmbeddedImages, found: Retrieved, firsts: Int64 | None) -> Selection:
    """Return the rows to write, by query, then rank.

    With `firsts` (Q,), the place of the first query that is the same image, queries come along, each image once: with
    rank 0 and no row, for that counts in the pool's embeddings.
    """
    parts = [(pool, found.pool)]
    themselves = []
    for part in sets if firsts is not None else ():
        every = np.arange(part.start, part.start + len(part))
        mine = every[firsts[every] == every] if firsts is not None else every
        images = replace(part.images, rows=pa.nulls(len(part), ROW_FIELD.type))
        parts.append((images, mine - part.start))
        themselves.append(Retrieved(mine, mine, np.zeros(len(mine), np.int64), np.ones(len(mine))))
    every_row = together([found, *themselves])
    order = np.lexsort((every_row.rank, every_row.query))
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    every_row = every_row.take(order)

    # Strings are kept once, and repeated only where they are written.
    ids = [pc.coalesce(part.images.image_column("image_id"), part.images.uris()) for part in sets]
    query_ids = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string()).combine_chunks()
    came_by = np.searchsorted([part.start for part in sets], every_row.query, side="right") - 1
    came_by[every_row.rank == 0] = len(sets)
    names = pa.array([*(part.name for part in sets), QUERY_SOURCE])
    source = next(field for field in OPTIONAL_IMAGE_FIELDS if field.name == "source")
    query_id, rank, similarity = (
        next(field for field in SELECTION_FIELDS if field.name == name) for name in ("query_id", "rank", "similarity")
    )
    added = {
        source: pa.DictionaryArray.from_arrays(pa.array(came_by), names),
        query_id: pa.DictionaryArray.from_arrays(pa.array(every_row.query), query_ids),
        rank: pa.array(every_row.rank),
        similarity: pa.array(every_row.similarity),
    }
    return Selection(tuple(parts), places, added)
