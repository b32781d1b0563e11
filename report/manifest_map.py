"""The map of the images that a report is about, where one was made."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from ..curate.map.page import has_map, map_part, map_script, map_style
from ..features.page import parts
from ..features.page.document import Section
from ..store import catalog, tables
from ..store.manifest import Manifest, open_manifest
from .manifest_flow import Stage
from .manifest_rows import asking, images, opened, quoted, stored

POINTS, THUMBNAILS = 20_000, 800  # chosen: less than a megabyte of a page
LEFT_OUT = ("thumbnail", "neighbors")  # of the map's columns
SELECTED = "selected by"  # the column that says which selections have an image


def find_map(stages: Sequence[Stage]) -> Manifest | None:
    """Return the map among the stages, else the newest in the catalog that was made of one of them."""
    for stage in stages:
        if stage.manifest is not None and has_map(stage.manifest):
            return stage.manifest
    keys = {stage.key for stage in stages}
    for made in catalog.artifacts("command = 'curate map'"):
        inputs = {source.content_id for source in catalog.inputs_of(made)}
        manifest = opened(Path(made.path))
        if inputs & keys and manifest is not None and manifest.content_id == made.digest and has_map(manifest):
            return manifest
    return None


def map_section(manifest: Manifest, selections: Mapping[str, Manifest], seed: int) -> Section:
    """Return the map, whose points may be coloured by the selections, by name, that have them."""
    selections = {name: each for name, each in selections.items() if each.num_rows < manifest.num_rows}
    with tempfile.TemporaryDirectory() as folder:
        marked = _with_selections(manifest, selections, Path(folder, manifest.path.name))
        drawn = map_part(marked, seed=seed, num_points=POINTS, num_thumbnails=THUMBNAILS)
    words = f"Colour by “{SELECTED}” to see what was chosen." if selections else ""
    return Section("Map", [parts.text(words), drawn] if words else [drawn])


def _with_selections(manifest: Manifest, selections: Mapping[str, Manifest], path: Path) -> Manifest:
    """Write the map with one more column, and open it."""
    names = [name for name in manifest.names() if name not in LEFT_OUT]
    with asking(map=stored(manifest, names)) as ask:
        ask.connection.execute("create temp table members (key uhugeint, name varchar)")
        for name, selection in selections.items():
            ask.connection.register("given", images(selection, ("image_id", "uri")))
            members = "insert into members select distinct image_key(image_id, uri), $name from given"
            ask.connection.execute(members, {"name": name})
        ask.keep("selected", "select key, string_agg(name, ' and ' order by name) as names from members group by key")
        columns = ", ".join(f"map.{quoted(name)}" for name in names)
        marked = ask.connection.sql(f"""
            select {columns}, coalesce(names, 'none') as {quoted(SELECTED)}
            from map left join selected on selected.key = image_key(image_id, uri) order by image_id, uri
        """).to_arrow_reader(tables.BATCH_ROWS)  # noqa: S608  # names are quoted
        with pq.ParquetWriter(path, marked.schema) as writer:
            for batch in marked:
                writer.write_batch(batch)
    return open_manifest(path)


def map_assets(sections: Sequence[Section]) -> tuple[list[str], list[str]]:
    """Return the scripts and styles that the maps among sections need."""
    has = any('<div class="map"' in part for section in sections for part in section.parts)
    return ([map_script()], [map_style()]) if has else ([], [])
