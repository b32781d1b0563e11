"""A sheet of queries and their nearest images: of a pool, or those that `retrieve` chose."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from .. import console
from ..errors import ToolkitError
from ..features.neighbors import Identity, nearest
from ..features.sheet import Tile, check_picture_name, draw_sheet, is_picture_up_to_date, write_picture
from ..store import catalog
from ..store.artifact import Options, Result
from ..store.image_columns import has_images, read_images
from ..store.images import UnreadableImage, decode_sized, read_bytes
from ..store.manifest import Manifest, Provenance, Source, open_manifest
from ..store.vectors import Int64, open_vectors

TILE_PX = 112  # four times 28


@dataclass(frozen=True)
class NeighborSettings:
    """What `dinov2 evaluate neighbors` can be told, beside the options that all commands share."""

    pool: Path | None = None  # None: the newest pool in the catalog
    queries: Path | None = None  # of what `retrieve` chose; None: those that it was given
    k: int = 8  # images beside a query


@dataclass(frozen=True)
class Found:
    """An image on its way to the sheet."""

    uri: str
    label: str | None
    similarity: float | None = None  # None: a query


Line = tuple[Found, list[Found]]  # a query, and its nearest first


def draw_neighbors(manifest: Path, output: str, settings: NeighborSettings, options: Options) -> Result | None:
    """Draw queries in a column and their k nearest images beside them; return None after a dry run.

    `manifest` holds embeddings of queries, which are looked up in the pool; or it is what `retrieve` chose and no pool
    is named: then the images beside a query are those that it brought.
    Raises ToolkitError when images or vectors are missing, or come from two models.
    """
    path = check_picture_name(output)
    opened = _open("manifest", manifest)
    is_retrieved = settings.pool is None and {"query_id", "rank", "similarity"} <= set(opened.names())
    other = _open("queries", _queries_of(opened, settings)) if is_retrieved else _open("pool", _pool(settings))
    provenance = Provenance(
        kind="picture",
        command="evaluate neighbors",
        parameters={"k": settings.k, "limit": options.limit},
        seed=options.seed,
        inputs=(opened.source("manifest"), other.source("queries" if is_retrieved else "pool")),
    )
    if is_picture_up_to_date(path, provenance, options):
        return None if options.dry_run else Result(output)
    if options.dry_run:
        found = f"what {manifest} retrieved" if is_retrieved else f"the nearest of {other.num_rows:,} in {other.path}"
        console.say(f"would draw queries and {found}, up to {settings.k} each, to {path}")
        return None
    lines = _retrieved(opened, other, settings, options) if is_retrieved else _nearest(opened, other, settings, options)
    brought = "what each query brought" if is_retrieved else "the nearest in the pool by cosine"
    note = f"left the query, then {brought}, with the similarity"
    rows = [[[_tile(query)], [_tile(each) for each in found]] for query, found in lines]
    write_picture(draw_sheet(rows, title=f"Neighbours: {manifest.name}", note=note, tile_px=TILE_PX), path, provenance)
    return Result(output, {"queries": len(lines), "images": sum(len(found) for _, found in lines)})


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


def _queries_of(retrieved: Manifest, settings: NeighborSettings) -> Path:
    """Return the manifest that holds the query images of a selection."""
    if settings.queries is not None:
        return settings.queries
    inputs: Sequence[Source] = retrieved.provenance.inputs if retrieved.provenance else ()
    recorded = next((Path(source.path) for source in inputs if source.role == "queries"), None)
    if recorded is None or not recorded.exists():
        raise ToolkitError(
            f"the queries of {retrieved.path} are {'not known' if recorded is None else f'gone: no {recorded}'};"
            " name them by --queries"
        )
    return recorded


def _retrieved(retrieved: Manifest, queries: Manifest, settings: NeighborSettings, options: Options) -> list[Line]:
    """Return the first queries of a selection and the images that each brought, by rank."""
    found = read_images(retrieved).select(["uri", "label"])
    for name in ("query_id", "rank", "similarity"):
        found = found.append_column(name, retrieved.read([name]).column(name))
    found = found.filter(pc.greater_equal(found.column("rank"), 1))  # rank 0: a query that came along
    wanted = found.column("query_id").unique()[: options.limit]
    if not len(wanted):
        raise ToolkitError(f"no row of {retrieved.path} was brought by a query; make it by `dinov2 curate retrieve`")
    images = read_images(queries).select(["image_id", "uri", "label"])
    places = pc.index_in(wanted, value_set=images.column("image_id").combine_chunks())
    if places.null_count:
        raise ToolkitError(
            f"{places.null_count} of {len(wanted)} queries of {retrieved.path} are not in {queries.path};"
            " name by --queries what `retrieve` was given"
        )
    lines: list[Line] = []
    for query_id, query in zip(wanted, images.take(places).to_pylist(), strict=True):
        brought = found.filter(pc.equal(found.column("query_id"), query_id)).sort_by("rank")[: settings.k]
        near = [Found(row["uri"], row["label"], row["similarity"]) for row in brought.to_pylist()]
        lines.append((Found(query["uri"], query["label"]), near))
    return lines


def _nearest(queries: Manifest, pool: Manifest, settings: NeighborSettings, options: Options) -> list[Line]:
    """Return the first queries and their nearest in the pool, the image itself left out."""
    query_vectors, pool_vectors = open_vectors(queries, limit=options.limit), open_vectors(pool)
    if query_vectors.dim != pool_vectors.dim:
        raise ToolkitError(
            f"{queries.path} has vectors of {query_vectors.dim} numbers and {pool.path} of {pool_vectors.dim};"
            " embed both by the same model"
        )
    models = [each.provenance.model() if each.provenance else None for each in (queries, pool)]
    known = {model.content_id: model.path for model in models if model is not None}
    if len(known) > 1:
        raise ToolkitError(
            f"the vectors of {queries.path} and {pool.path} come from two models ({', '.join(known.values())});"
            " embed both by the same"
        )
    query_images, pool_images = read_images(queries, options.limit), read_images(pool)
    keys = _keys(query_images)
    identity = Identity(_numbers(keys, keys), _numbers(_keys(pool_images), keys))
    order = np.arange(len(pool_vectors))
    neighbors = nearest(query_vectors, pool_vectors, settings.k, order=order, identity=identity)
    lines: list[Line] = []
    for row, query in enumerate(query_images.to_pylist()):
        there = neighbors.indices[row] >= 0
        found = pool_images.take(neighbors.indices[row][there]).to_pylist()
        similarities = neighbors.similarities[row][there].tolist()
        near = [Found(each["uri"], each["label"], cosine) for each, cosine in zip(found, similarities, strict=True)]
        lines.append((Found(query["uri"], query["label"]), near))
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
    try:
        picture, _ = decode_sized(read_bytes(found.uri), "RGB", 2 * TILE_PX)
    except UnreadableImage as problem:
        console.warn(f"{found.uri} cannot be shown: {problem.reason}")
        return Tile(Image.new("RGB", (TILE_PX, TILE_PX), "#e8d9d6"), f"{similarity} cannot be read".strip())
    return Tile(picture, f"{similarity}  {label}".strip())
