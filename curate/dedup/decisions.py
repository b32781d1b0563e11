"""What becomes of every image of a pool, written: those that stay, and those that go with their reasons.

N images, R of them at a time.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from ... import console
from ...store import catalog
from ...store.manifest import (
    GROUP_FIELDS,
    REMOVED_FIELDS,
    ROW_GROUP_ROWS,
    SELECTION_FIELDS,
    ManifestWriter,
    Provenance,
    removed_path,
)
from ...store.vectors import Float64, Int64
from ..inputs import EmbeddedImages
from ..selection import selected, write_table

DUPLICATE = "near-duplicate"
SAME_BYTES = "same bytes"
SAME_PIXELS = "same pixels"
RESEMBLES = "resembles an evaluation image"
GROUPED = "near-duplicate of an image that resembles an evaluation image"
REASONS = (DUPLICATE, SAME_BYTES, SAME_PIXELS, RESEMBLES, GROUPED)
STAYS = -1

REMOVED_ROWS = 64 * ROW_GROUP_ROWS  # chosen: rows put together at a time, whose names take some 200 MB
SHOWN_GROUPS = 5


@dataclass(frozen=True)
class Verdict:
    """What becomes of every image."""

    images: EmbeddedImages  # N
    others: list[EmbeddedImages]  # the sets that they were compared with
    reason: Int64  # (N,) place in REASONS, or STAYS
    part: Int64  # (N,) where the image is that it goes for: -1 among the images themselves, else which other set
    target: Int64  # (N,) position of that image there
    similarity: Float64  # (N,) cosine to it
    labels: Int64  # (N,) the group of every image, named by any of its members
    weakest: Float64  # (N,) lowest similarity in its group to the image that stays
    figures: dict[str, object]  # what was measured on the way

    def group_sizes(self) -> Int64:
        """Return how many images are in every one's group, (N,)."""
        sizes: Int64 = np.bincount(self.labels, minlength=len(self.labels))[self.labels]
        return sizes

    def counts(self) -> dict[str, object]:
        """Return how many images stay and how many go for what."""
        reasons = np.bincount(self.reason + 1, minlength=len(REASONS) + 1).tolist()
        stays, of = reasons[0], dict(zip(REASONS, reasons[1:], strict=True))
        gone = self.reason != STAYS
        sets: Counter[str] = Counter()
        roles: Counter[str] = Counter()
        for number, other in enumerate(self.others):
            num = int((gone & (self.part == number)).sum())
            sets[str(other.source.manifest.path)] += num
            roles[other.source.role] += num
        sizes = np.bincount(self.labels)
        return {
            "images": stays,
            "removed": len(self.reason) - stays,
            "near_duplicates": of[DUPLICATE],
            "same_bytes": of[SAME_BYTES],
            "same_pixels": of[SAME_PIXELS],
            "against": roles["against"],
            "known": roles["known"],
            **({"removed_for": dict(sets)} if sets else {}),
            "groups": int((sizes > 1).sum()),
            "largest_group": int(sizes.max()),
        }


def write_verdict(path: Path, verdict: Verdict, provenance: Provenance) -> Provenance:
    """Write the selection at `path` and beside it what was removed, in row order; return the selection's provenance."""
    # The list of what went is put in its place first: whoever sees the selection finds it beside.
    sizes = verdict.group_sizes()
    fields = [*REMOVED_FIELDS, *GROUP_FIELDS]
    with ManifestWriter(removed_path(path), fields, replace(provenance, kind="removed", base=None)) as removed:
        gone = np.flatnonzero(verdict.reason != STAYS)
        for start in range(0, max(len(gone), 1), REMOVED_ROWS):
            removed.write(_removed(verdict, sizes, gone[start : start + REMOVED_ROWS]))
    stays = np.flatnonzero(verdict.reason == STAYS)
    duplicates = next(field for field in SELECTION_FIELDS if field.name == "duplicates")
    kept = selected(verdict.images, stays).append_column(duplicates, pa.array(sizes[stays] - 1, pa.int32()))
    for field, column in zip(GROUP_FIELDS, _group_columns(verdict, sizes, stays), strict=True):
        kept = kept.append_column(field, column)
    made = write_table(path, kept, provenance, {**verdict.counts(), **verdict.figures})
    catalog.record(removed_path(path), removed.provenance, None)
    return made


def _removed(verdict: Verdict, sizes: Int64, rows: Int64) -> pa.Table:
    """Return uri, reason, duplicate_of, similarity and the group of the images at `rows` (R,)."""
    part, target = verdict.part[rows], verdict.target[rows]
    taken = [images.uris(target[part == number]) for number, images in enumerate([verdict.images, *verdict.others], -1)]
    place = np.empty(len(rows), np.int64)
    place[np.argsort(part, kind="stable")] = np.arange(len(rows))
    columns = [
        verdict.images.uris(rows),
        pa.array(REASONS).take(pa.array(verdict.reason[rows])),
        pa.chunked_array([chunk for column in taken for chunk in column.chunks], pa.string()).take(pa.array(place)),
        pa.array(verdict.similarity[rows], pa.float32()),
        *_group_columns(verdict, sizes, rows),
    ]
    return pa.table(columns, schema=pa.schema([*REMOVED_FIELDS, *GROUP_FIELDS]))


def _group_columns(verdict: Verdict, sizes: Int64, rows: Int64) -> list[pa.Array]:
    """Return `group_id` and `weakest` of the images at `rows` (R,)."""
    first = np.empty(len(verdict.labels), np.int64)
    first[verdict.labels[::-1]] = np.arange(len(verdict.labels))[::-1]  # of equal labels the last one counts
    group = verdict.images.rows.take(pa.array(first[verdict.labels[rows]]))
    return [group, pa.array(verdict.weakest[rows], pa.float32(), mask=sizes[rows] == 1)]


def say_verdict(verdict: Verdict) -> None:
    """Say how many images stay and why the others go, for which set, and what the largest and loosest groups are."""
    counts = verdict.counts()
    parts = [f"{counts['images']:,} kept", f"{counts['near_duplicates']:,} near-duplicates"]
    for name, words in (
        ("same_bytes", "of the same bytes"),
        ("same_pixels", "of the same pixels"),
        ("against", "like evaluation images"),
    ):
        if counts[name]:
            parts.append(f"{counts[name]:,} {words}")
    console.say(
        f"{len(verdict.reason):,} images: {', '.join(parts)}; {counts['groups']:,} groups, the largest of"
        f" {counts['largest_group']:,}"
    )
    if not counts["images"]:
        console.warn("no image is left; raise --threshold or --against-threshold")
    for_sets = [
        (str(other.source.manifest.path), other.source.role, int((verdict.part == number).sum()))
        for number, other in enumerate(verdict.others)
    ]
    if for_sets:
        console.table("removed for images of other sets", ("set", "given as", "removed"), for_sets)
    _say_groups(verdict)


def _say_groups(verdict: Verdict) -> None:
    sizes = verdict.group_sizes()
    heads = np.flatnonzero((sizes > 1) & (verdict.target == np.arange(len(sizes))) & (verdict.reason == STAYS))
    if not len(heads):
        return
    largest = heads[np.lexsort((heads, -sizes[heads]))[:SHOWN_GROUPS]]
    loose = heads[verdict.weakest[heads] < 1]
    loosest = loose[np.lexsort((loose, verdict.weakest[loose]))[:SHOWN_GROUPS]]
    for title, rows in (("the largest groups", largest), ("the loosest groups", loosest)):
        if not len(rows):
            continue
        names = verdict.images.uris(rows).to_pylist()
        shown = zip(names, sizes[rows].tolist(), verdict.weakest[rows].tolist(), strict=True)
        console.table(title, ("kept image", "images", "lowest similarity to it"), [*shown])


def chained(verdict: Verdict, threshold: float) -> int:
    """Return how many groups hold an image that is not above the threshold to the one that stays."""
    return len(np.unique(verdict.labels[verdict.weakest <= threshold]))
