"""A sheet of clusters to look at: the largest, some of the middle, the smallest and the suspected ones."""

from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from ... import console
from ...features.sheet import Tile, draw_sheet, is_picture_up_to_date, read_tile, write_picture
from ...store import tables
from ...store.artifact import Options
from ...store.manifest import Provenance, open_manifest
from .table import checked_table_path

CLUSTERS = 6  # chosen: of each kind, so that a sheet fits on two screens
MEMBERS = 10
TILE_PX = 88

CENTRAL = """
    select cluster_0, uri from {selection} where list_contains($clusters, cluster_0)
    qualify row_number() over (partition by cluster_0 order by distance, image_id, uri, row) <= $members
    order by cluster_0, distance, image_id, uri, row
"""


def draw_clusters(path: Path, sheet: Path, options: Options) -> None:
    """Draw clusters of the selection at `path`, the images nearest to each centroid, from it and its cluster table.

    Raises ToolkitError when that table is missing.
    """
    selection = open_manifest(path)
    provenance = Provenance("picture", "curate cluster", {}, options.seed, (selection.source("manifest"),))
    if is_picture_up_to_date(sheet, provenance, options):
        return
    headings = _headings(checked_table_path(path))
    tiles: dict[int, list[Tile]] = {cluster: [] for cluster in headings}
    with tables.connect() as connection:
        query = CENTRAL.format(selection=tables.scan(path))
        central = connection.execute(query, {"clusters": list(headings), "members": MEMBERS}).fetchall()
    for cluster, uri in central:
        tiles[cluster].append(read_tile(uri, "", TILE_PX))
    rows, title = [[row] for row in tiles.values()], f"Clusters: {path.name}"
    note = "of each cluster the selected images that are nearest to its centroid"
    picture = draw_sheet(rows, title=title, note=note, headings=list(headings.values()), tile_px=TILE_PX)
    write_picture(picture, sheet, provenance)
    console.say(f"{sheet}: {len(headings)} clusters")


def _headings(clusters: Path) -> dict[int, str]:
    """Return the clusters to draw, in that order, and what to write above each."""
    columns = ["cluster", "images", "sampled", "label", "purity", "suspected"]
    drawable = (pc.field("level") == 0) & (pc.field("sampled") > 0)
    table = open_manifest(clusters).read(["level", *columns]).filter(drawable)
    table = table.sort_by([("images", "descending"), ("cluster", "ascending")])
    place, num = np.arange(len(table)), len(table)
    is_kind = {
        "large": place < CLUSTERS,
        "suspected junk": table.column("suspected").to_numpy(),
        "small": place >= num - CLUSTERS,
        "middle": (place - (num - CLUSTERS) // 2) // CLUSTERS == 0,
    }
    kinds = np.select(list(is_kind.values()), list(is_kind), "")
    headings = {}
    for kind in ("large", "middle", "small", "suspected junk"):
        for row in table.take(np.flatnonzero(kinds == kind)[:CLUSTERS]).to_pylist():
            size = "1 image" if row["images"] == 1 else f"{row['images']:,} images"
            taken = "" if row["sampled"] == row["images"] else f", {row['sampled']:,} of them sampled"
            label = "" if row["label"] is None else f"; {row['purity']:.0%} {row['label']}"
            headings[row["cluster"]] = f"{kind}: cluster {row['cluster']}, {size}{taken}{label}"
    return headings
