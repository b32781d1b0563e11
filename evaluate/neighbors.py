"""A sheet of queries and their nearest images in a pool, or of the images that `retrieve` chose for each query."""

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any  # of a row's values

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, extract, open_model
from ..features.knn import in_memory
from ..features.search.neighbors import Identity, nearest
from ..features.sheet import Tile, draw_sheet, read_tile
from ..store import catalog
from ..store.artifact import Options, Result
from ..store.image_columns import has_images, read_as, read_images
from ..store.manifest import SELECTION_FIELDS, Manifest, Provenance, is_manifest_name, open_manifest
from ..store.vectors import Int64, Vectors, has_vectors, open_vectors
from .pictures import Drawn, Named, make_picture, open_images

TILE_PX = 112  # four times 28
BATCH_SIZE = 64  # query images the model sees at a time
QUERY_COLUMNS = ["image_id", "uri", "label"]
RETRIEVED = ("query_id", "rank", "similarity")  # columns of what `retrieve` chose


@dataclass(frozen=True)
class NeighborSettings:
    """Options of `dinov2 evaluate neighbors`, besides those that all commands share."""

    pool: Path | None = None  # None: the newest pool in the catalog
    queries: Path | None = None  # of what `retrieve` chose; None: those that it was given
    k: int = 8  # images beside a query
    model: str | None = None  # that embeds query images; None: the one that embedded the pool


Shown = dict[str, Any]  # an image on the sheet: uri, label and, beside a query, the similarity to it
Line = tuple[Shown, list[Shown]]  # a query, and its nearest first
Queries = tuple[pa.Table, Vectors]  # query images (image_id, uri, label) and their vectors (Q, D)


def draw_neighbors(query: str, output: str, settings: NeighborSettings, options: Options) -> Result | None:
    """Draw queries in a column and their k nearest images beside them; return None after a dry run.

    `query` names images, which are embedded by the pool's model; or it is a manifest of embeddings; or it is what
    `retrieve` chose and no pool is named: then the images beside a query are those that `retrieve` chose for it.
    Raises ToolkitError when images or vectors are missing, or come from two models.
    """
    manifest = _open("manifest", Path(query)) if is_manifest_name(query) else None
    if manifest is not None and not has_vectors(manifest):
        manifest = None  # a list of images
    seed = 0
    read: Callable[[], list[Line]]
    if manifest is not None and settings.pool is None and set(RETRIEVED) <= set(manifest.names()):
        sets = [_open("queries", each) for each in _queries_of(manifest, settings)]
        inputs = [manifest.source("manifest"), *(each.source("queries") for each in sets)]
        read, what = partial(_retrieved, manifest, sets, settings, options), f"what {query} retrieved"
        note = "left the query, then what `retrieve` chose for it, with the similarity"
    else:
        chosen = settings.pool or catalog.choose("pool")
        if settings.pool is None:
            console.say(f"no --pool given: using {chosen}, the newest in the catalog")
        pool = _open("pool", chosen)
        if manifest is not None:
            inputs = [manifest.source("manifest"), pool.source("pool")]
            read_queries = partial(_stored_queries, manifest, pool, options.limit)
        else:
            sources, images = open_images([query], output, limit=options.limit)
            model = _model_of(pool, settings, options.seed)
            inputs, seed = [*sources, pool.source("pool"), model.source], options.seed
            read_queries = partial(_embedded_queries, images, model)
        read = partial(_nearest, read_queries, pool, settings.k)
        what = f"the nearest of {pool.num_rows:,} in {pool.path}"
        note = "left the query, then the nearest in the pool by cosine, with the similarity"
    parameters: dict[str, object] = {"k": settings.k, "limit": options.limit}
    provenance = Provenance("picture", "evaluate neighbors", parameters, seed, tuple(inputs))

    def drawn() -> Drawn:
        lines = read()
        rows = [[[_tile(image)], [_tile(each) for each in near]] for image, near in lines]
        title = f"Neighbours: {os.path.basename(query.rstrip(os.sep))}"
        sheet = draw_sheet(rows, title=title, note=note, tile_px=TILE_PX)
        return sheet, {"queries": len(lines), "images": sum(len(near) for _, near in lines)}

    described = f"queries and {what}, up to {settings.k} each,"
    return make_picture(output, provenance, options, described=described, draw=drawn)


def _tile(image: Shown) -> Tile:
    """Return an image with its caption: the similarity and the label; of a query without a label the file's name."""
    if "similarity" in image:
        return read_tile(image["uri"], f"{image['similarity']:.3f}  {image['label'] or ''}".strip(), TILE_PX)
    return read_tile(image["uri"], image["label"] or os.path.basename(image["uri"] or ""), TILE_PX)


def _open(role: str, path: Path) -> Manifest:
    manifest = open_manifest(path)
    if not has_images(manifest):
        raise ToolkitError(f"{path} ({role}) names no images (columns: {', '.join(manifest.names())}); embed images")
    return manifest


def _queries_of(retrieved: Manifest, settings: NeighborSettings) -> list[Path]:
    """Return the manifests that hold the query images of a selection."""
    if settings.queries is not None:
        return [settings.queries]
    inputs = retrieved.provenance.inputs if retrieved.provenance else ()
    recorded = [Path(source.path) for source in inputs if source.role == "queries"]
    missing = [path for path in recorded if not path.exists()]
    if missing or not recorded:
        state = f"gone: no {missing[0]}" if missing else "not known"
        raise ToolkitError(f"the queries of {retrieved.path} are {state}; name them by --queries")
    return recorded


def _retrieved(retrieved: Manifest, sets: list[Manifest], settings: NeighborSettings, options: Options) -> list[Line]:
    """Return the first queries of a selection and the images that were chosen for each, by rank."""
    chosen = read_images(retrieved).select(["uri", "label"])
    fields = [field for field in SELECTION_FIELDS if field.name in RETRIEVED]
    for field, column in zip(fields, read_as(retrieved, fields).columns, strict=True):
        chosen = chosen.append_column(field, column.fill_null(0) if field.name == "similarity" else column)
    chosen = chosen.filter(pc.greater_equal(chosen.column("rank"), 1))  # rank 0: a query that was included
    wanted = chosen.column("query_id").unique()[: options.limit]
    if not len(wanted):
        raise ToolkitError(f"no row of {retrieved.path} was chosen for a query; make it by `dinov2 curate retrieve`")
    images = pa.concat_tables(read_images(queries).select(QUERY_COLUMNS) for queries in sets)
    places = pc.index_in(wanted, value_set=images.column("image_id").combine_chunks())
    if places.null_count:
        missing = f"{places.null_count} of {len(wanted)} queries of {retrieved.path}"
        searched = ", ".join(str(queries.path) for queries in sets)
        raise ToolkitError(f"{missing} are not in {searched}; name by --queries what `retrieve` was given")
    lines: list[Line] = []
    for query_id, query in zip(wanted, images.take(places).to_pylist(), strict=True):
        of_query = chosen.filter(pc.equal(chosen.column("query_id"), query_id)).sort_by("rank")[: settings.k]
        lines.append((query, of_query.to_pylist()))
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
        other = f"{pool.path} was not embedded by {name} as it is now (seed {seed})"
        raise ToolkitError(f"{other}; embed the query images as it was and give that manifest, or the pool again")
    return model


def _embedded_queries(images: list[Named], model: FeatureModel) -> Queries:
    """Return the images that can be read, with the vectors that a model gives them."""
    rows, vectors = [], []
    uris = [uri for uri, _ in images]
    with closing(extract(model, uris, batch_size=BATCH_SIZE, num_workers=1)) as batches:
        for batch in batches:
            facts = zip(batch.indices, batch.facts, strict=True)
            rows += [(each.image_id, *images[index]) for index, each in facts]
            vectors.append(batch.features.numpy())
            for index, reason in batch.failures:
                console.warn(f"{uris[index]} left out: {reason}")
    if not rows:
        raise ToolkitError(f"none of the {len(uris)} query images can be read; name others")
    columns = dict(zip(QUERY_COLUMNS, zip(*rows, strict=True), strict=True))
    return pa.table(columns), in_memory(np.concatenate(vectors))


def _stored_queries(manifest: Manifest, pool: Manifest, limit: int | None) -> Queries:
    """Return the first images of a manifest with their vectors.

    Raises ToolkitError when they are known to come from another model than those of the pool.
    """
    models = [each.provenance.model() for each in (manifest, pool) if each.provenance]
    known = {model.content_id: model.path for model in models if model is not None}
    if len(known) > 1:
        found = f"the vectors of the queries and of {pool.path} come from two models ({', '.join(known.values())})"
        raise ToolkitError(f"{found}; embed both by the same")
    return read_images(manifest, limit).select(QUERY_COLUMNS), open_vectors(manifest, limit=limit)


def _nearest(read_queries: Callable[[], Queries], pool: Manifest, k: int) -> list[Line]:
    """Return queries and their k nearest in the pool, the image itself left out."""
    queries, vectors = read_queries()
    pool_vectors = open_vectors(pool)
    if vectors.dim != pool_vectors.dim:
        dims = f"the queries have vectors of {vectors.dim} numbers and {pool.path} of {pool_vectors.dim}"
        raise ToolkitError(f"{dims}; embed both by the same model")
    pool_images = read_images(pool)
    keys = _keys(queries)
    identity = Identity(_numbers(keys, keys), _numbers(_keys(pool_images), keys))
    found = nearest(vectors, pool_vectors, k, order=np.arange(len(pool_vectors)), identity=identity)
    lines: list[Line] = []
    for query, indices, similarities in zip(queries.to_pylist(), found.indices, found.similarities, strict=True):
        near = pool_images.take(indices[indices >= 0]).append_column("similarity", [similarities[indices >= 0]])
        lines.append((query, near.to_pylist()))
    return lines


def _keys(images: pa.Table) -> pa.ChunkedArray:
    """Return what names an image: image_id and uri."""
    names = [pc.fill_null(images.column(name), "") for name in ("image_id", "uri")]
    return pc.binary_join_element_wise(*names, "\n")


def _numbers(keys: pa.ChunkedArray, among: pa.ChunkedArray) -> Int64:
    """Return the place of each key among others, -1 where it is not."""
    return np.asarray(pc.fill_null(pc.index_in(keys, value_set=among.combine_chunks()), -1), dtype=np.int64)
