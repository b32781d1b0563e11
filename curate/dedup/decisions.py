"""What is decided about every image of a pool, and how it is written: which are kept, which removed and why.

N images, R of them at a time.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from ... import console
from ...store import catalog
from ...store.manifest import (
    GROUP_FIELDS,
    PIXEL_DIFFERENCE_FIELD,
    REMOVED_FIELDS,
    ROW_GROUP_ROWS,
    SELECTION_FIELDS,
    ManifestWriter,
    Provenance,
    removed_path,
)
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages, Input
from ..selection import selected, write_table
from .reference_sets import ImageSets
from .representative import preferred

REASONS = (
    "near-duplicate",
    "same bytes",
    "same pixels",
    "resembles an evaluation image",
    "near-duplicate of an image that resembles an evaluation image",
)
REMOVED_COLUMNS = (*REMOVED_FIELDS, *GROUP_FIELDS, PIXEL_DIFFERENCE_FIELD)
NEAR_DUPLICATE, SAME_BYTES, SAME_PIXELS, RESEMBLES_EVALUATION, GROUPED_WITH_EVALUATION = range(len(REASONS))
KEPT = -1

REMOVED_ROWS = 64 * ROW_GROUP_ROWS  # chosen: rows written at a time, whose names take some 200 MB
SHOWN_GROUPS = 5


@dataclass(frozen=True)
class Decisions:
    """What is decided about every image of a pool, (N,) each."""

    sets: ImageSets  # the pool, then the sets that it was compared with
    reason: Int64  # index into REASONS, or KEPT
    duplicate_of: Int64  # position in `sets` of the image that it duplicates; its own where it is kept
    similarity: Float64  # cosine to that image
    labels: Int64  # its group, named by any member
    min_similarity_to_kept: Float64  # lowest in its group
    figures: dict[str, object]  # what was measured on the way
    differences: Float64 | None = None  # by pixels, to `duplicate_of`; NaN where they were not compared

    @property
    def images(self) -> EmbeddedImages:
        """The pool's images."""
        return self.sets.sets[0]

    @cached_property
    def group_sizes(self) -> Int64:
        """The number of images in the group of every image, (N,)."""
        sizes: Int64 = np.bincount(self.labels, minlength=len(self.labels))[self.labels]
        return sizes

    def removed_for_sets(self) -> list[tuple[Input, int]]:
        """Return how many images each of the other sets removed."""
        numbers = np.bincount(self.sets.set_of(self.duplicate_of), minlength=len(self.sets.sets))
        return [(images.source, int(num)) for images, num in zip(self.sets.sets, numbers, strict=True)][1:]

    def counts(self) -> dict[str, object]:
        """Return how many images are kept, and how many are removed for what."""
        kept, *removed = np.bincount(self.reason + 1, minlength=len(REASONS) + 1).tolist()
        by_set, by_role = Counter[str](), Counter[str]()
        for source, num in self.removed_for_sets():
            by_set[str(source.manifest.path)] += num
            by_role[source.role] += num
        return {
            "images": kept,
            "removed": sum(removed),
            "near_duplicates": removed[NEAR_DUPLICATE],
            "same_bytes": removed[SAME_BYTES],
            "same_pixels": removed[SAME_PIXELS],
            "against": by_role["against"],
            "known": by_role["known"],
            **({"removed_for": dict(by_set)} if by_set else {}),
            "groups": int((np.bincount(self.labels) > 1).sum()),
            "largest_group": int(self.group_sizes.max()),
        }


def write_decisions(path: Path, decisions: Decisions, provenance: Provenance) -> Provenance:
    """Write the selection at `path` and beside it what was removed, in row order; return the selection's provenance."""
    # The removed rows come first: whoever sees the selection finds them beside it.
    with ManifestWriter(
        removed_path(path), list(REMOVED_COLUMNS), replace(provenance, kind="removed", base=None)
    ) as removed:
        rows = np.flatnonzero(decisions.reason != KEPT)
        for start in range(0, max(len(rows), 1), REMOVED_ROWS):
            removed.write(_removed(decisions, rows[start : start + REMOVED_ROWS]))
    rows = np.flatnonzero(decisions.reason == KEPT)
    duplicates = pa.schema(SELECTION_FIELDS).field("duplicates")
    columns = [pa.array(decisions.group_sizes[rows] - 1, pa.int32()), *_group_columns(decisions, rows)]
    kept = replace(selected(decisions.images, rows), added=dict(zip((duplicates, *GROUP_FIELDS), columns, strict=True)))
    made = write_table(path, kept, provenance, {**decisions.counts(), **decisions.figures})
    catalog.record(removed_path(path), removed.provenance, None)
    return made


def _removed(decisions: Decisions, rows: Int64) -> pa.Table:
    """Return the removed images at `rows` (R,) with REMOVED_COLUMNS."""
    split = [*decisions.sets.split(decisions.duplicate_of[rows])]
    names = pa.chunked_array([chunk for images, _, which in split for chunk in images.uris(which).chunks], pa.string())
    places, differences = np.concatenate([places for _, places, _ in split]), decisions.differences
    columns = [
        decisions.images.uris(rows),
        pa.array(REASONS).take(pa.array(decisions.reason[rows])),
        names.take(pa.array(np.argsort(places))),
        pa.array(decisions.similarity[rows], pa.float32()),
        *_group_columns(decisions, rows),
        pa.nulls(len(rows), pa.float32()) if differences is None else pa.array(differences[rows], from_pandas=True),
    ]
    return pa.table(columns, names=[field.name for field in REMOVED_COLUMNS]).cast(pa.schema(REMOVED_COLUMNS))


def _group_columns(decisions: Decisions, rows: Int64) -> list[pa.Array]:
    """Return `group_id` and `min_similarity_to_kept` of the images at `rows` (R,)."""
    first = preferred(decisions.labels, np.arange(len(decisions.labels)))
    group_id = decisions.images.rows.take(pa.array(first[rows]))
    is_alone = decisions.group_sizes[rows] == 1
    return [group_id, pa.array(decisions.min_similarity_to_kept[rows], pa.float32(), mask=is_alone)]


def say_decisions(decisions: Decisions) -> None:
    """Say how many images are kept and why the others are removed, and show the largest and the loosest groups."""
    counts = decisions.counts()
    parts = [f"{counts['images']:,} kept", f"{counts['near_duplicates']:,} near-duplicates"]
    some = {
        "same_bytes": "with the same bytes",
        "same_pixels": "with the same pixels",
        "against": "like evaluation images",
    }
    parts += [f"{counts[name]:,} {words}" for name, words in some.items() if counts[name]]
    console.say(
        f"{len(decisions.reason):,} images: {', '.join(parts)}; {counts['groups']:,} groups, the largest of"
        f" {counts['largest_group']:,}"
    )
    if not counts["images"]:
        console.warn("no image is left; raise --threshold or --against-threshold")
    if for_sets := [(str(each.manifest.path), each.role, num) for each, num in decisions.removed_for_sets()]:
        console.table("removed for images of other sets", ("set", "given as", "removed"), for_sets)

    sizes, similarity = decisions.group_sizes, decisions.min_similarity_to_kept
    kept = np.flatnonzero((sizes > 1) & (decisions.reason == KEPT))
    loose = kept[similarity[kept] < 1]
    for title, rows in (
        ("the largest groups", kept[np.argsort(-sizes[kept], kind="stable")]),
        ("the loosest groups", loose[np.argsort(similarity[loose], kind="stable")]),
    ):
        if len(shown := rows[:SHOWN_GROUPS]):
            names = decisions.images.uris(shown).to_pylist()
            columns = zip(names, sizes[shown].tolist(), similarity[shown].tolist(), strict=True)
            console.table(title, ("kept image", "images", "lowest similarity to it"), [*columns])
