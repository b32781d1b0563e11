"""A sheet of groups to look at before trusting a threshold: the largest and the loosest that dedup found."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ... import console
from ...features.sheet import Tile, draw_sheet, is_picture_up_to_date, read_tile, write_picture
from ...store import tables
from ...store.artifact import Options
from ...store.manifest import Provenance, open_manifest, removed_path

GROUPS = 10  # chosen: of the largest and of the loosest, as many fit on a screen or two
MEMBERS = 8  # beside the one that stays
TILE_PX = 96


@dataclass(frozen=True)
class Group:
    """A group on its way to the sheet."""

    heading: str
    uri: str | None  # of the image that stays
    group_id: int


def draw_groups(path: Path, sheet: Path, options: Options) -> None:
    """Draw the largest and the loosest groups of the selection at `path`, from it and its removed rows."""
    selection = open_manifest(path)
    provenance = Provenance("picture", "curate dedup", {}, options.seed, (selection.source("manifest"),))
    if is_picture_up_to_date(sheet, provenance, options):
        return
    groups = _groups(path)
    members = _members(removed_path(path), [group.group_id for group in groups])
    rows = [[[read_tile(group.uri, "stays", TILE_PX)], members[group.group_id]] for group in groups]
    if not rows:
        console.warn(f"{path} has no group of several images; {sheet} is not drawn")
        return
    picture = draw_sheet(
        rows,
        title=f"Groups of duplicates: {path.name}",
        note="left the image that stays, then others of its group from the most to the least similar to it",
        headings=[group.heading for group in groups],
        tile_px=TILE_PX,
    )
    write_picture(picture, sheet, provenance)
    console.say(f"{sheet}: {len(rows)} groups")


def _groups(path: Path) -> list[Group]:
    """Return the largest groups, and then the loosest of the others."""
    with tables.connect() as connection:
        found = connection.execute(
            """
            with several as (
                select uri, group_id, weakest, duplicates + 1 as images,
                    row_number() over (order by duplicates desc, group_id) as by_size
                from read_parquet($path) where duplicates > 0
            ), ranked as (
                select *, row_number() over (order by by_size <= $num, weakest, group_id) as by_weakest from several
            )
            select if(by_size <= $num, 'large', 'loose'), uri, group_id, weakest, images from ranked
            where by_size <= $num or by_weakest <= $num
            order by by_size > $num, if(by_size <= $num, by_size, by_weakest)
            """,
            {"path": str(path), "num": GROUPS},
        ).fetchall()
    return [
        Group(f"{kind}: {images:,} images, lowest similarity {weakest:.4f}, {os.path.basename(uri or '')}", uri, number)
        for kind, uri, number, weakest, images in found
    ]


def _members(path: Path, group_ids: list[int]) -> dict[int, list[Tile]]:
    """Return some of each group's removed images, evenly from the most to the least similar."""
    with tables.connect() as connection:
        found = connection.execute(
            """
            with member as (
                select group_id, uri, similarity, reason,
                    row_number() over (partition by group_id order by similarity desc, uri) as place,
                    greatest(count(*) over (partition by group_id) - 1, 1) as last
                from read_parquet($path) where list_contains($groups, group_id)
            )
            select group_id, uri, similarity, reason from member
            where place = 1 or (place - 1) * $steps // last > (place - 2) * $steps // last
            order by group_id, place
            """,
            {"path": str(path), "groups": group_ids, "steps": MEMBERS - 1},
        ).fetchall()
    members: dict[int, list[Tile]] = defaultdict(list)
    for group_id, uri, similarity, reason in found:
        caption = f"{similarity:.4f}" if reason.startswith("near") else reason
        members[group_id].append(read_tile(uri, caption, TILE_PX))
    return members
