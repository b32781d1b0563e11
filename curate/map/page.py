"""A map as a page, or as a part of one: points, their columns, and some thousand thumbnails, all in one file.

`map_part` makes the part from a manifest with coordinates; a page that shows it is rendered with `map_script()` among
its scripts and `map_style()` among its styles. N rows of the manifest, P points that are drawn.
"""

import base64
import gzip
import json
import os
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any  # of what becomes JSON

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from ... import console
from ...errors import ToolkitError
from ...features.grouping import group_by
from ...features.image_workers import read_in_order
from ...features.page.document import Section, check_page_name, environment, page_provenance, render, write_page
from ...features.page.parts import note
from ...features.small import small_webp
from ...store.artifact import Options
from ...store.image_columns import image_batches
from ...store.images import UnreadableImage
from ...store.manifest import PROJECTION_FIELDS, Manifest, Provenance, open_manifest
from ...store.vectors import Float32, Int64

POINTS = 100_000  # drawn at most: at 30 frames a second
THUMBNAILS, THUMBNAIL_BYTES = 6_000, 5_000_000  # stored at most
WEBP = partial(small_webp, side_px=64)
GRID = 64  # cells across and down by which thumbnails are spread
CATEGORIES = 20_000  # a column of more different words is not shown
FEW = 30  # a column of no more different whole numbers is one of categories
LEFT_OUT = ("image_id", "uri", "row", "weight", *(field.name for field in PROJECTION_FIELDS))
FIRST = ("label", "source")  # columns that colour comes by first


def has_map(manifest: Manifest) -> bool:
    """Tell whether a manifest has the coordinates that a map needs."""
    return {field.name for field in PROJECTION_FIELDS} <= set(manifest.names())


def check_map_page(html: Path, options: Options) -> None:
    """Raise ToolkitError when the page must not be written: only a map of ours is replaced without --force."""
    path = check_page_name(str(html))
    there = page_provenance(path) if path.exists() else None
    if path.exists() and not options.force and (there is None or there.command != "curate map"):
        raise ToolkitError(f"{path} exists and is no map of ours; choose another --html, or --force to overwrite it")


def write_map_page(path: Path, html: Path, options: Options) -> None:
    """Write the page of the map at `path`, unless it stands there already."""
    manifest = open_manifest(path)
    provenance = Provenance("page", "curate map", {}, options.seed, (manifest.source("manifest"),))
    there = page_provenance(html)
    if there is not None and there.same_work(provenance) and not options.force:
        console.say(f"{html} is up to date")
        os.utime(html)
        return
    part = map_part(manifest, seed=options.seed)
    section = Section("Images by likeness", [part])
    base = None if manifest.provenance is None else manifest.provenance.base
    what = f"{manifest.num_rows:,} images" + ("" if base is None else f" of {Path(base.path).name}")
    page = render("Map", [section], note=what, provenance=provenance, scripts=[map_script()], styles=[map_style()])
    write_page(page, html)
    console.say(f"{html}: {len(page) / 1e6:,.1f} MB")


def map_script() -> str:
    """Return the script that draws every `map_part` of a page; for `render(scripts=[...])`."""
    return _asset("map.js")


def map_style() -> str:
    """Return the styles of maps; for `render(styles=[...])`."""
    return _asset("map.css")


@cache
def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text("utf-8")


def map_part(
    manifest: Manifest, *, seed: int = 0, num_points: int = POINTS, num_thumbnails: int = THUMBNAILS
) -> Markup:
    """Return the map of a manifest that `has_map`, as a part of a section.

    Args:
        seed: draws the points where there are more rows than `num_points`.
        num_thumbnails: pictures that are stored at most, evenly over the map; 5 MB of them at most.
    """
    rows = np.arange(manifest.num_rows)
    if len(rows) > num_points:
        rows = np.sort(np.random.default_rng([seed % 2**63, 4]).choice(len(rows), num_points, replace=False))
    shown = _columns_shown(manifest)
    more = [name for name in manifest.names() if name in ("row", *(each.name for each in PROJECTION_FIELDS))]
    more += [name for name in shown if name != "label" and name not in more]
    tables = list(image_batches(manifest, ["uri", "label"], more=more, rows=rows))
    table = pa.concat_tables(tables) if tables else manifest.read([*more, "uri", "label"], 0)
    coordinates = np.stack([table.column(field.name).to_numpy() for field in PROJECTION_FIELDS], axis=1)
    has_place = np.isfinite(coordinates).all(axis=1)
    if not has_place.any():
        return note("No image has coordinates.")
    rows, coordinates, table = rows[has_place], coordinates[has_place], table.filter(pa.array(has_place))
    uris = table.column("uri").fill_null("").to_pylist()
    prefix = os.path.commonprefix(uris)
    pictured, sources = _pictures(uris, coordinates, num_thumbnails)
    base_rows = table.column("row").fill_null(-1).to_numpy() if "row" in more else rows
    data = {
        "total": manifest.num_rows,
        "x": _packed(coordinates[:, 0].astype("<f4")),
        "y": _packed(coordinates[:, 1].astype("<f4")),
        "rows": _packed(base_rows.astype("<f8")),
        "prefix": prefix,
        "uris": [uri[len(prefix) :] for uri in uris],
        "columns": [made for name in shown if (made := _column(name, table.column(name))) is not None],
        "pictures": {"points": _packed(pictured.astype("<i4")), "sources": sources},
    }
    packed = base64.b64encode(gzip.compress(json.dumps(data).encode(), mtime=0)).decode()
    module: Any = environment().from_string(_asset("map.html")).module
    drawn: Markup = module.map(packed, _about(manifest.num_rows, len(rows), len(pictured)), manifest.path.name)
    return drawn


def _about(num_rows: int, num_points: int, num_pictures: int) -> str:
    """Return what the map shows, and what it leaves out."""
    words = "Images lie near each other where the model finds them alike; distances between groups mean little."
    if num_points < num_rows:
        words += f" It shows {num_points:,} of {num_rows:,} images, drawn at random. A list holds only these;"
        words += " the condition of a lasso is true of all images within it."
    if num_pictures < num_points:
        words += f" Pictures of {num_pictures:,} are stored, evenly over the map."
    return words


def is_plain(field: pa.Field) -> bool:
    """Tell whether a column holds numbers, words or dates."""
    kinds = pa.types
    plain = (kinds.is_boolean, kinds.is_integer, kinds.is_floating, kinds.is_temporal)
    return any(is_kind(field.type) for is_kind in (*plain, kinds.is_string, kinds.is_large_string))


def _columns_shown(manifest: Manifest) -> list[str]:
    """Return the columns by which points may be coloured, clusters and labels first."""
    names = [field.name for field in manifest.schema if field.name not in LEFT_OUT and is_plain(field)]
    return sorted(names, key=lambda name: (name not in FIRST, not name.startswith("cluster_")))


def _column(name: str, values: pa.ChunkedArray) -> dict[str, Any] | None:
    """Return a column for the script: numbers, or ranks of categories by frequency; None where it says nothing."""
    if values.null_count == len(values):
        return None
    is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    is_count = pa.types.is_integer(values.type) and not name.startswith("cluster_")
    if pa.types.is_floating(values.type) or (is_count and pc.count_distinct(values).as_py() > FEW):
        stored = pc.cast(values, pa.float64()).fill_null(float("nan")).to_numpy()
        numbers = np.where(np.isfinite(stored), stored, np.nan)
        if np.isnan(numbers).all():
            return None
        return {"name": name, "values": _packed(numbers.astype("<f8"))}
    counted = values.value_counts().to_pylist()
    counted = sorted((each for each in counted if each["values"] is not None), key=lambda each: -each["counts"])
    if len(counted) > CATEGORIES and not is_number:
        return None
    kinds = pa.array([each["values"] for each in counted], values.type)
    codes = pc.index_in(values, kinds).fill_null(-1).to_numpy()
    return {"name": name, "names": [str(each["values"]) for each in counted], "values": _packed(codes.astype("<i4"))}


def _packed(values: npt.NDArray[Any]) -> dict[str, str]:
    return {"type": values.dtype.str[1:], "bytes": base64.b64encode(np.ascontiguousarray(values).data).decode()}


def _pictures(uris: list[str], coordinates: Float32, most: int) -> tuple[Int64, list[str]]:
    """Return points whose pictures are stored, evenly over the map, and their pictures as base64 of WebP."""
    points = evenly_over(coordinates)[:most]
    kept: list[int] = []
    sources: list[str] = []
    num_bytes = 0
    named = (uris[point] for point in points.tolist())
    with console.progress("thumbnails", len(points), "images") as advance:
        for point, small in zip(points.tolist(), read_in_order(WEBP, named), strict=True):
            advance()
            if isinstance(small, UnreadableImage):
                continue
            kept.append(point)
            sources.append(base64.b64encode(small[0]).decode())
            num_bytes += len(sources[-1])
            if num_bytes > THUMBNAIL_BYTES:
                break
    return np.array(kept, np.int64), sources


def evenly_over(coordinates: Float32) -> Int64:
    """Return all points (P,) such that the first so many of them are spread evenly over the map: one a cell, again."""
    low, high = coordinates.min(axis=0), coordinates.max(axis=0)
    cells = ((coordinates - low) / np.maximum(high - low, 1e-9) * (GRID - 1e-3)).astype(np.int64)
    mixed = np.random.default_rng(0).permutation(len(cells))
    rank = np.empty(len(cells), np.int64)
    rank[mixed] = group_by(cells[mixed] @ np.array([1, GRID]), GRID**2).ranks()
    return np.lexsort((np.argsort(mixed), rank))
