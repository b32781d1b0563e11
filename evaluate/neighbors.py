"""A sheet of queries and their nearest images: of a pool, or those that `retrieve` chose."""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, extract, open_model
from ..features.knn import in_memory
from ..features.search.neighbors import Identity, nearest
from ..features.sheet import Tile, check_picture_name, draw_sheet, is_picture_up_to_date, read_tile, write_picture
from ..store import catalog
from ..store.artifact import Options, Result
from ..store.image_columns import has_images, read_images
from ..store.manifest import Manifest, Provenance, Source, open_manifest
from ..store.vectors import Int64, Vectors, has_vectors, open_vectors
from .whole import NamedImages, open_images

TILE_PX = 112  # four times 28
BATCH_SIZE = 64  # query images the model sees at a time


@dataclass(frozen=True)
class NeighborSettings:
    """What `dinov2 evaluate neighbors` can be told, beside the options that all commands share."""

    pool: Path | None = None  # None: the newest pool in the catalog
    queries: Path | None = None  # of what `retrieve` chose; None: those that it was given
    k: int = 8  # images beside a query
    model: str | None = None  # that embeds query images; None: the one that made the pool


@dataclass(frozen=True)
class Found:
    """An image on its way to the sheet."""

    uri: str
    label: str | None
    similarity: float | None = None  # None: a query


Line = tuple[Found, list[Found]]  # a query, and its nearest first


@dataclass(frozen=True)
class Queries:
    """Images that look for their nearest, and their vectors."""

    images: list[Found]  # (Q,)
    keys: list[str]  # (Q,) image_id and uri: what an image is known by
    vectors: Vectors  # (Q, D)
    model: Source | None  # that made the vectors, where it is known


def draw_neighbors(query: str, output: str, settings: NeighborSettings, options: Options) -> Result | None:
    """Draw queries in a column and their k nearest images beside them; return None after a dry run.

    `query` names images, which are embedded by the pool's model; or it is a manifest of embeddings; or it is what
    `retrieve` chose and no pool is named: then the images beside a query are those that it brought.
    Raises ToolkitError when images or vectors are missing, or come from two models.
    """
    path = check_picture_name(output)
    manifest = _manifest(query)
    is_retrieved = (
        manifest is not None and settings.pool is None and {"query_id", "rank", "similarity"} <= set(manifest.names())
    )
    if manifest is not None and is_retrieved:
        sets = [_open("queries", each) for each in _queries_of(manifest, settings)]
        inputs, seed = [manifest.source("manifest"), *(each.source("queries") for each in sets)], 0
        read, wanted = partial(_retrieved, manifest, sets, settings, options), f"what {query} retrieved"
    elif manifest is not None:
        pool = _open("pool", _pool(settings))
        inputs, seed = [manifest.source("manifest"), pool.source("pool")], 0
        read = partial(_nearest, partial(_embedded, manifest, options.limit), pool, settings)
        wanted = f"the nearest of {pool.num_rows:,} in {pool.path}"
    else:
        pool = _open("pool", _pool(settings))
        images = open_images([query], str(path.absolute()), limit=options.limit)
        model = _model_of(pool, settings, options.seed)
        inputs, seed = [*images.inputs, pool.source("pool"), model.source], options.seed
        read = partial(_nearest, partial(_embed, images, model), pool, settings)
        wanted = f"the nearest of {pool.num_rows:,} in {pool.path}"
    provenance = Provenance(
        kind="picture",
        command="evaluate neighbors",
        parameters={"k": settings.k, "limit": options.limit},
        seed=seed,
        inputs=tuple(inputs),
    )
    if is_picture_up_to_date(path, provenance, options):
        return None if options.dry_run else Result(output)
    if options.dry_run:
        console.say(f"would draw queries and {wanted}, up to {settings.k} each, to {path}")
        return None
    lines = read()
    brought = "what each query brought" if is_retrieved else "the nearest in the pool by cosine"
    note = f"left the query, then {brought}, with the similarity"
    rows = [[[_tile(line[0])], [_tile(each) for each in line[1]]] for line in lines]
    title = f"Neighbours: {os.path.basename(query.rstrip(os.sep))}"
    write_picture(draw_sheet(rows, title=title, note=note, tile_px=TILE_PX), path, provenance)
    return Result(output, {"queries": len(lines), "images": sum(len(near) for _, near in lines)})


def _manifest(query: str) -> Manifest | None:
    """Return the manifest of that name, if it is one with vectors or a selection."""
    if not (query.endswith(".parquet") or Path(query, "_manifest.json").exists()):
        return None
    manifest = _open("manifest", Path(query))
    return manifest if has_vectors(manifest) else None


def _open(role: str, path: Path) -> Manifest:
    manifest = open_manifest(path)
    if not has_images(manifest):
        raise ToolkitError(f"{path} ({role}) names no images (columns: {', '.join(manifest.names())}); embed images")
    return manifest


def _pool(settings: NeighborSettings) -> Path:
    if settings.pool is not None:
        return settings.pool
    chosen = catalog.choose("pool")
    console.say(f"no --pool given: using {chosen}, the newest in the catalog")
    return chosen


def _queries_of(retrieved: Manifest, settings: NeighborSettings) -> list[Path]:
    """Return the manifests that hold the query images of a selection."""
    if settings.queries is not None:
        return [settings.queries]
    inputs: Sequence[Source] = retrieved.provenance.inputs if retrieved.provenance else ()
    recorded = [Path(source.path) for source in inputs if source.role == "queries"]
    missing = [path for path in recorded if not path.exists()]
    if missing or not recorded:
        raise ToolkitError(
            f"the queries of {retrieved.path} are {f'gone: no {missing[0]}' if missing else 'not known'};"
            " name them by --queries"
        )
    return recorded


def _retrieved(retrieved: Manifest, sets: list[Manifest], settings: NeighborSettings, options: Options) -> list[Line]:
    """Return the first queries of a selection and the images that each brought, by rank."""
    found = read_images(retrieved).select(["uri", "label"])
    for name in ("query_id", "rank", "similarity"):
        found = found.append_column(name, retrieved.read([name]).column(name))
    found = found.filter(pc.greater_equal(found.column("rank"), 1))  # rank 0: a query that came along
    wanted = found.column("query_id").unique()[: options.limit]
    if not len(wanted):
        raise ToolkitError(f"no row of {retrieved.path} was brought by a query; make it by `dinov2 curate retrieve`")
    images = pa.concat_tables(read_images(queries).select(["image_id", "uri", "label"]) for queries in sets)
    places = pc.index_in(wanted, value_set=images.column("image_id").combine_chunks())
    if places.null_count:
        raise ToolkitError(
            f"{places.null_count} of {len(wanted)} queries of {retrieved.path} are not in"
            f" {', '.join(str(queries.path) for queries in sets)};"
            " name by --queries what `retrieve` was given"
        )
    lines: list[Line] = []
    for query_id, query in zip(wanted, images.take(places).to_pylist(), strict=True):
        brought = found.filter(pc.equal(found.column("query_id"), query_id)).sort_by("rank")[: settings.k]
        near = [Found(row["uri"], row["label"], row["similarity"]) for row in brought.to_pylist()]
        lines.append((Found(query["uri"], query["label"]), near))
    return lines


def _model_of(pool: Manifest, settings: NeighborSettings, seed: int) -> FeatureModel:
    """Return the model that embeds query images as the pool was embedded.

    Raises ToolkitError when it is not known, or another.
    """
    made_by = pool.provenance.model() if pool.provenance else None
    name = settings.model or (made_by.path if made_by else None)
    if name is None:
        raise ToolkitError(f"nothing says which model embedded {pool.path}; name it by --model")
    model = open_model(name, seed)
    if made_by is not None and model.source.content_id != made_by.content_id:
        raise ToolkitError(
            f"{pool.path} was not embedded by {name} as it is now (seed {seed}); embed the query images as the pool was"
            " and give that manifest, or embed the pool again"
        )
    return model


def _embed(images: NamedImages, model: FeatureModel) -> Queries:
    """Return the images that can be read, with the vectors that a model gives them."""
    found, keys, vectors = [], [], []
    uris = [uri for uri, _ in images.named]
    with closing(extract(model, uris, batch_size=BATCH_SIZE, num_workers=1)) as batches:
        for batch in batches:
            for index, facts in zip(batch.indices, batch.facts, strict=True):
                found.append(Found(*images.named[index]))
                keys.append(f"{facts.image_id}\n{uris[index]}")
            vectors.append(batch.features.numpy())
            for index, reason in batch.failures:
                console.warn(f"{uris[index]} left out: {reason}")
    if not found:
        raise ToolkitError(f"none of the {len(uris)} query images can be read; name others")
    return Queries(found, keys, in_memory(np.concatenate(vectors)), model.source)


def _embedded(manifest: Manifest, limit: int | None) -> Queries:
    """Return the first images of a manifest with their vectors."""
    images = read_images(manifest, limit)
    found = [Found(row["uri"], row["label"]) for row in images.to_pylist()]
    model = manifest.provenance.model() if manifest.provenance else None
    return Queries(found, _keys(images).to_pylist(), open_vectors(manifest, limit=limit), model)


def _nearest(read_queries: Callable[[], Queries], pool: Manifest, settings: NeighborSettings) -> list[Line]:
    """Return queries and their nearest in the pool, the image itself left out."""
    queries = read_queries()
    pool_vectors = open_vectors(pool)
    if queries.vectors.dim != pool_vectors.dim:
        raise ToolkitError(
            f"the queries have vectors of {queries.vectors.dim} numbers and {pool.path} of {pool_vectors.dim};"
            " embed both by the same model"
        )
    models = [queries.model, pool.provenance.model() if pool.provenance else None]
    known = {model.content_id: model.path for model in models if model is not None}
    if len(known) > 1:
        raise ToolkitError(
            f"the vectors of the queries and of {pool.path} come from two models ({', '.join(known.values())});"
            " embed both by the same"
        )
    pool_images = read_images(pool)
    keys = pa.chunked_array([queries.keys], pa.string())
    identity = Identity(_numbers(keys, keys), _numbers(_keys(pool_images), keys))
    order = np.arange(len(pool_vectors))
    neighbors = nearest(queries.vectors, pool_vectors, settings.k, order=order, identity=identity)
    lines: list[Line] = []
    for row, query in enumerate(queries.images):
        there = neighbors.indices[row] >= 0
        found = pool_images.take(neighbors.indices[row][there]).to_pylist()
        similarities = neighbors.similarities[row][there].tolist()
        near = [Found(each["uri"], each["label"], cosine) for each, cosine in zip(found, similarities, strict=True)]
        lines.append((query, near))
    return lines


def _keys(images: pa.Table) -> pa.ChunkedArray:
    """Return what names an image: image_id and uri."""
    names = [pc.fill_null(images.column(name), "") for name in ("image_id", "uri")]
    return pc.binary_join_element_wise(*names, "\n")


def _numbers(keys: pa.ChunkedArray, among: pa.ChunkedArray) -> Int64:
    """Return the place of each key among others, -1 where it is not."""
    return np.asarray(pc.fill_null(pc.index_in(keys, value_set=among.combine_chunks()), -1), dtype=np.int64)


def _tile(found: Found) -> Tile:
    label = found.label or ("" if found.similarity is not None else os.path.basename(found.uri))
    similarity = "" if found.similarity is None else f"{found.similarity:.3f}"
    return read_tile(found.uri, f"{similarity}  {label}".strip(), TILE_PX)
