"""A sheet of clusters to look at: the largest, some of the middle, the smallest and the suspected ones."""

from dataclasses import dataclass
from pathlib import Path

import duckdb

from ... import console
from ...errors import ToolkitError
from ...features.sheet import Tile, draw_sheet, is_picture_up_to_date, read_tile, write_picture
from ...store import tables
from ...store.artifact import Options
from ...store.manifest import Provenance, open_manifest
from .table import table_path

CLUSTERS = 6  # chosen: of each kind, so that a sheet fits on two screens
MEMBERS = 10
TILE_PX = 88

SHOWN = """
    with filled as (
        select cluster, images, sampled, label, purity, suspected,
               row_number() over (order by images desc, cluster) as place, count(*) over () as number
        from read_parquet($clusters) where level = 0 and sampled > 0
    ), kinds as (
        select *, case when place <= $count then 0
                       when suspected then 3
                       when place > number - $count then 2
                       when place > (number - $count) // 2 and place <= (number - $count) // 2 + $count then 1 end
                  as kind
        from filled
    )
    select kind, cluster, images, sampled, label, purity from kinds where kind is not null
    qualify row_number() over (partition by kind order by place) <= $count order by kind, place
"""
CENTRAL = """
    select cluster_0, uri from read_parquet($selection) where cluster_0 in (select unnest($wanted))
    qualify row_number() over (partition by cluster_0 order by distance, image_id, uri, row) <= $members
    order by cluster_0, distance, image_id, uri, row
"""
KINDS = ("large", "middle", "small", "suspected junk")


@dataclass(frozen=True)
class Shown:
    """A cluster on its way to the sheet."""

    cluster: int
    heading: str


def draw_clusters(path: Path, sheet: Path, options: Options) -> None:
    """Draw clusters of the selection at `path`, the images nearest to each centroid, from it and its cluster table.

    Raises ToolkitError when that table is missing.
    """
    selection = open_manifest(path)
    provenance = Provenance("picture", "curate cluster", {}, options.seed, (selection.source("manifest"),))
    if is_picture_up_to_date(sheet, provenance, options):
        return
    clusters = checked_table_path(path)
    with tables.connect() as connection:
        shown = _shown(connection, clusters)
        wanted = {"selection": str(path), "wanted": [each.cluster for each in shown], "members": MEMBERS}
        central = connection.execute(CENTRAL, wanted).fetchall()
    tiles: dict[int, list[Tile]] = {each.cluster: [] for each in shown}
    for cluster, uri in central:
        tiles[cluster].append(read_tile(uri, "", TILE_PX))
    picture = draw_sheet(
        [[tiles[each.cluster]] for each in shown],
        title=f"Clusters: {path.name}",
        note="of each cluster the images nearest to its centroid, among those taken",
        headings=[each.heading for each in shown],
        tile_px=TILE_PX,
    )
    write_picture(picture, sheet, provenance)
    console.say(f"{sheet}: {len(shown)} clusters")


def checked_table_path(path: Path) -> Path:
    """Return where the cluster table of the selection at `path` is.

    Raises ToolkitError when it is gone.
    """
    clusters = table_path(path)
    if not clusters.exists():
        raise ToolkitError(f"no {clusters}, which `curate cluster` wrote beside {path}; make it again by --force")
    return clusters


def _shown(connection: duckdb.DuckDBPyConnection, clusters: Path) -> list[Shown]:
    found = connection.execute(SHOWN, {"clusters": str(clusters), "count": CLUSTERS}).fetchall()
    shown = []
    for kind, cluster, images, sampled, label, purity in found:
        taken = "" if sampled == images else f", {sampled:,} of them taken"
        named = "" if label is None else f"; {purity:.0%} {label}"
        size = "1 image" if images == 1 else f"{images:,} images"
        shown.append(Shown(cluster, f"{KINDS[kind]}: cluster {cluster}, {size}{taken}{named}"))
    return shown
