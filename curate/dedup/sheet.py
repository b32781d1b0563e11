"""A sheet of groups to look at before trusting a threshold: the largest and the loosest that dedup found."""

import os
from collections import defaultdict
from pathlib import Path

import duckdb
import pyarrow as pa

from ... import console
from ...features.sheet import Tile, draw_sheet, is_picture_up_to_date, read_tile, write_picture
from ...store import tables
from ...store.artifact import Options
from ...store.manifest import Manifest, Provenance, open_manifest, removed_path

GROUPS = 10  # chosen: of the largest and of the loosest, as many fit on a screen or two
MEMBERS = 8  # removed images shown of a group
TILE_PX = 96


def draw_groups(path: Path, sheet: Path, options: Options) -> None:
    """Draw the largest and the loosest groups of the selection at `path`, from it and its removed rows."""
    selection = open_manifest(path)
    provenance = Provenance("picture", "curate dedup", {}, options.seed, (selection.source("manifest"),))
    if is_picture_up_to_date(sheet, provenance, options):
        return
    groups = shown_groups(selection)
    if not groups:
        console.warn(f"{path} has no group of several images; {sheet} is not drawn")
        return
    members = shown_members(open_manifest(removed_path(path)), list(groups))
    picture = draw_sheet(
        [[[read_tile(uri, "kept", TILE_PX)], members[group]] for group, (_, uri) in groups.items()],
        title=f"Groups of duplicates: {path.name}",
        note="left the kept image, then removed ones of its group from the most to the least similar to it",
        headings=[heading for heading, _ in groups.values()],
        tile_px=TILE_PX,
    )
    write_picture(picture, sheet, provenance)
    console.say(f"{sheet}: {len(groups)} groups")


def shown_groups(selection: Manifest) -> dict[int, tuple[str, str | None]]:
    """Return the heading of the largest groups, then of the loosest others, and the uri of the kept image, by group."""
    with tables.connect() as connection:
        _register(connection, selection, ["uri", "group_id", "min_similarity_to_kept", "duplicates"])
        found = connection.execute(
            """
            with groups as (
                select *, row_number() over (order by duplicates desc, group_id) as by_size, by_size <= $num as is_large
                from rows where duplicates > 0
            )
            select if(is_large, 'large', 'loose'), uri, group_id, min_similarity_to_kept, duplicates + 1 from groups
            qualify is_large or row_number() over (order by is_large, min_similarity_to_kept, group_id) <= $num
            order by not is_large, if(is_large, by_size, 0), min_similarity_to_kept, group_id
            """,
            {"num": GROUPS},
        ).fetchall()
    return {
        group: (f"{kind}: {num:,} images, lowest similarity {lowest:.4f}, {os.path.basename(uri or '')}", uri)
        for kind, uri, group, lowest, num in found
    }


def shown_members(removed: Manifest, groups: list[int]) -> dict[int, list[Tile]]:
    """Return tiles of some removed images of each group, evenly from the most to the least similar."""
    with tables.connect() as connection:
        _register(connection, removed, ["uri", "group_id", "similarity", "reason"])
        found = connection.execute(
            """
            with members as (
                select *, row_number() over (partition by group_id order by similarity desc, uri) as place,
                    greatest(count(*) over (partition by group_id) - 1, 1) as last
                from rows where list_contains($groups, group_id)
            )
            select group_id, uri, similarity, reason from members
            where place = 1 or (place - 1) * $steps // last > (place - 2) * $steps // last
            order by group_id, place
            """,
            {"groups": groups, "steps": MEMBERS - 1},
        ).fetchall()
    members: dict[int, list[Tile]] = defaultdict(list)
    for group, uri, similarity, reason in found:
        caption = f"{similarity:.4f}" if reason.startswith("near") else reason
        members[group].append(read_tile(uri, caption, TILE_PX))
    return members


def _register(connection: duckdb.DuckDBPyConnection, manifest: Manifest, columns: list[str]) -> None:
    schema = pa.schema([manifest.schema.field(name) for name in columns])
    connection.register("rows", pa.RecordBatchReader.from_batches(schema, manifest.batches(columns)))
