"""Where every image lies on a map on which near neighbours stay near, as columns; and the map itself as a page.

N images, k neighbours.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ... import console
from ...errors import ToolkitError
from ...features.image_workers import read_in_order
from ...features.search.neighbors import Identity, Neighbors, SearchSettings, nearest
from ...features.small import small_picture
from ...store.artifact import Options, Result, check_manifest_name, make
from ...store.image_columns import image_batches, image_schema
from ...store.images import UnreadableImage
from ...store.lock import writing
from ...store.manifest import (
    NEIGHBORS_FIELD,
    PROJECTION_FIELDS,
    ROW_FIELD,
    THUMBNAIL_FIELD,
    ManifestWriter,
    Provenance,
)
from ...store.memory import memory_budget
from ...store.progress import Progress
from ..inputs import EmbeddedImages, Input, describe, open_input, read_embedded
from ..selection import selection_provenance
from .page import check_map_page, is_plain, write_map_page
from .projection import NUM_COMPONENTS, check_installed, project

WHOLE = 500_000  # chosen: larger pools are projected by a sample
SAMPLED = 200_000  # chosen: images of that sample, three minutes on two cores
NOT_PARAMETERS = ("features", "where", "memory", "html")  # recorded otherwise, or do not change the rows
MADE_HERE = (*PROJECTION_FIELDS, NEIGHBORS_FIELD, THUMBNAIL_FIELD)

Picture = dict[str, object]  # of the column `thumbnail`


@dataclass(frozen=True)
class MapSettings:
    """Settings of `dinov2 curate map`, without the options that all commands share."""

    neighbors: int | None = None  # k of the column `neighbors`; None: no such column
    thumbnails: int | None = None  # longer side of the column `thumbnail` in pixels; None: no such column
    sample: int | None = None  # images that are projected; None: all of at most WHOLE, else SAMPLED
    recall: float = 0.99  # share of the true neighbours that a large search must find
    features: Path | None = None
    where: str | None = None
    memory: str | None = None  # such as 3GB; None: a third of the machine
    html: Path | None = None  # where to write the page


def map_images(manifest: Path | None, output: str, settings: MapSettings, options: Options) -> Result | None:
    """Write the images with their coordinates, in the order of the manifest; return None after a dry run.

    An interrupted run goes on from the projected sample. Raises ToolkitError when openTSNE is not installed.
    """
    path = check_manifest_name(output)
    check_installed()
    _check(settings)
    if settings.html is not None:
        check_map_page(settings.html, options)
    pool = open_input("manifest", manifest, path, settings.features, settings.where)
    num_rows = pool.num_rows(options.limit)
    num_sampled = settings.sample or (num_rows if num_rows <= WHOLE else SAMPLED)
    parameters = {name: value for name, value in asdict(settings).items() if name not in NOT_PARAMETERS}
    provenance = selection_provenance("curate map", parameters, path, options, pool)

    def describe_work() -> None:
        what = f"project {min(num_sampled, num_rows):,} of {num_rows:,} images"
        describe(path, [pool], min(num_sampled, num_rows) * num_rows, what, options)

    def work() -> Provenance:
        return _map(read_embedded(pool, options.limit), path, num_sampled, settings, provenance)

    result = make(output, provenance, options, describe=describe_work, work=work)
    if result is not None and settings.html is not None:
        with writing(settings.html):
            write_map_page(path, settings.html, options)
    return result


def _check(settings: MapSettings) -> None:
    for name in ("neighbors", "thumbnails", "sample"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ToolkitError(f"--{name} {value} is less than one; give 1 or more")
    if not 0 < settings.recall <= 1:
        raise ToolkitError(f"--recall {settings.recall} is no share of the neighbours; give a number above 0, up to 1")
    memory_budget(settings.memory)


def _map(
    images: EmbeddedImages, path: Path, num_sampled: int, settings: MapSettings, provenance: Provenance
) -> Provenance:
    search = SearchSettings(memory_budget(settings.memory), settings.recall, provenance.seed)
    progress = Progress(provenance, num_sampled)
    coordinates = project(images.vectors, num_sampled, search, progress)
    columns = {field: pa.array(coordinates[:, axis], field.type) for axis, field in enumerate(PROJECTION_FIELDS)}
    figures: dict[str, object] = {
        "images": len(images),
        "projected": min(num_sampled, len(images)),
        "components": min(NUM_COMPONENTS, images.vectors.dim),
    }
    if settings.neighbors is not None:
        itself = np.arange(len(images))
        identity = Identity(itself, itself)
        found = nearest(
            images.vectors, images.vectors, settings.neighbors, order=images.order, identity=identity, search=search
        )
        columns[NEIGHBORS_FIELD] = _neighbor_column(found)
        figures["recall"] = found.recall
    return _write(images, path, columns, settings.thumbnails, provenance, figures)


def _neighbor_column(found: Neighbors) -> pa.Array:
    """Return the neighbours of every row, nearest first: rows of this manifest from 0, and 1 less the cosine."""
    there = found.indices >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(there.sum(axis=1))]), pa.int32())
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(found.indices[there], pa.int64())),
        pa.ListArray.from_arrays(offsets, pa.array(1 - found.similarities[there], pa.float32())),
    ]
    return pa.StructArray.from_arrays(lists, fields=list(NEIGHBORS_FIELD.type))


def carried(source: Input) -> list[pa.Field]:
    """Return the columns that the manifest has besides those of images: numbers, words and dates, such as clusters."""
    made = {field.name for field in (*image_schema(source.manifest), ROW_FIELD, *MADE_HERE)}
    return [field for field in source.manifest.schema if field.name not in made and is_plain(field)]


def _write(
    images: EmbeddedImages,
    path: Path,
    columns: dict[pa.Field, pa.Array],
    thumbnail_px: int | None,
    provenance: Provenance,
    figures: dict[str, object],
) -> Provenance:
    """Write the image columns, `row`, what the manifest has besides, and `columns` (N,); return the provenance."""
    more = carried(images.source)
    thumbnail = [] if thumbnail_px is None else [THUMBNAIL_FIELD]
    fields = [*image_schema(images.source.manifest), ROW_FIELD, *more, *columns, *thumbnail]
    start, num_missing = 0, 0
    what = None if thumbnail_px is None else "thumbnails"
    with ManifestWriter(path, fields, provenance) as writer, console.progress(what, len(images), "images") as advance:
        read = image_batches(images.source.manifest, more=[field.name for field in more], rows=images.positions)
        for table in read:
            rows = slice(start, start := start + len(table))
            table = table.append_column(ROW_FIELD, images.rows[rows])
            for field, values in columns.items():
                table = table.append_column(field, values[rows])
            if thumbnail_px is not None:
                small = list(_thumbnails(table.column("uri").to_pylist(), thumbnail_px, advance))
                num_missing += small.count(None)
                table = table.append_column(THUMBNAIL_FIELD, pa.array(small, THUMBNAIL_FIELD.type))
            writer.write(table)
        if thumbnail_px is not None:
            figures = {**figures, "thumbnails_missing": num_missing}
            if num_missing:
                console.warn(f"{num_missing:,} of {len(images):,} images cannot be read; their `thumbnail` is null")
        writer.set_figures(**figures)
    return writer.provenance


def _thumbnails(
    uris: list[str | None], side_px: int, advance: Callable[..., None]
) -> Iterator[dict[str, object] | None]:
    """Yield encoded pictures of at most `side_px`; None for what cannot be read."""
    for uri, small in zip(uris, read_in_order(partial(small_picture, side_px=side_px), uris), strict=True):
        advance()
        yield None if isinstance(small, UnreadableImage) else {"bytes": small, "path": uri}
