"""One image of every group of near-duplicates.

k nearest neighbours by cosine -> edges above the threshold -> connected components -> one image kept of each.
Source: section 3 and appendix A.4 of Oquab et al. 2023 (DINOv2).

N images.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..features.neighbors import first_identical, nearest, similarities
from ..store import catalog
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ..store.manifest import REMOVED_FIELDS, SELECTION_FIELDS, Provenance, open_manifest, removed_path
from ..store.vectors import Float64, Int64
from .groups import duplicate_groups
from .selection import (
    EmbeddedImages,
    Input,
    check_same_model,
    describe,
    open_input,
    read_embedded,
    selected,
    selection_provenance,
    write_table,
)
from .threshold import threshold_from_pool

DUPLICATE = "near-duplicate"
RESEMBLES = "resembles an evaluation image"
GROUPED = "near-duplicate of an image that resembles an evaluation image"

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DedupSettings:
    """What `dinov2 curate dedup` can be told, beside the options that all commands share."""

    threshold: float | None = None  # None: learnt from the pool
    k: int = 64
    against: tuple[Path, ...] = ()
    against_threshold: float | None = None  # None: the same as `threshold`
    keep: str = "largest"  # largest, first or column:NAME
    features: Path | None = None


def dedup_images(manifest: Path | None, output: str, settings: DedupSettings, options: Options) -> Result | None:
    """Write one image of every group of near-duplicates, and the others with what they duplicate.

    Returns None after a dry run.
    """
    path = check_manifest_name(output)
    _check(settings)
    pool = open_input("manifest", manifest, path, settings.features)
    evaluation = [open_input("against", against, path) for against in settings.against]
    _priority_column(pool, settings.keep)
    for part in evaluation:
        check_same_model(pool, part)
    parameters: dict[str, object] = {
        "threshold": settings.threshold,
        "k": settings.k,
        "against_threshold": settings.against_threshold,
        "keep": settings.keep,
    }
    provenance = selection_provenance("curate dedup", parameters, path, options, pool, *evaluation)
    is_made = is_up_to_date(path, provenance, options)
    if options.dry_run:
        if not is_made:
            num_rows = [part.manifest.num_rows for part in (pool, *evaluation)]
            what = "compare all with all" + (f" and {sum(num_rows[1:]):,} evaluation images" if evaluation else "")
            describe(path, [pool, *evaluation], num_rows[0] * sum(num_rows), what, options)
        return None
    if not is_made:
        with recorded(path) as finished:
            images = read_embedded(pool, options.limit)
            finished.append(_dedup(images, [read_embedded(part) for part in evaluation], path, settings, provenance))
    made = open_manifest(path)
    return Result(output, {} if made.provenance is None else made.provenance.figures)


def _check(settings: DedupSettings) -> None:
    for name, value in (("--threshold", settings.threshold), ("--against-threshold", settings.against_threshold)):
        if value is not None and not -1 <= value <= 1:
            raise ToolkitError(f"{name} {value} is no cosine similarity; give a number from -1 to 1")
    if settings.k < 1:
        raise ToolkitError(f"--k {settings.k} leaves no neighbours to look at; give 1 or more")
    if settings.against_threshold is not None and not settings.against:
        raise ToolkitError(
            f"--against-threshold {settings.against_threshold} without --against; name the evaluation set"
        )


def _priority_column(pool: Input, keep: str) -> str | None:
    """Return NAME of `--keep column:NAME`, None for the other ways to choose."""
    if keep in ("largest", "first"):
        return None
    name = keep.removeprefix("column:")
    if name == keep or not name:
        raise ToolkitError(f"--keep {keep} is none of largest, first and column:NAME; give one of these")
    if name not in pool.manifest.names():
        raise ToolkitError(
            f"--keep {keep}: {pool.manifest.path} has no such column (it has {', '.join(pool.manifest.names())})"
        )
    return name


def _dedup(
    images: EmbeddedImages,
    evaluation: list[EmbeddedImages],
    path: Path,
    settings: DedupSettings,
    provenance: Provenance,
) -> Provenance:
    first = first_identical(images.vectors)
    threshold, origin = settings.threshold, "given"
    if threshold is None:
        threshold, origin = threshold_from_pool(images.vectors.take(np.flatnonzero(first == np.arange(len(first)))))
        console.say(f"threshold {threshold:.7g}, set {origin}")
    labels, num_saturated = duplicate_groups(images.vectors, first, threshold, settings.k)
    if num_saturated:
        console.say(
            f"{num_saturated:,} images have all their {settings.k} neighbours above the threshold;"
            " these were searched again without a limit"
        )
    against_threshold = threshold if settings.against_threshold is None else settings.against_threshold
    resembled = evaluation_images_resembled(images, evaluation, labels, against_threshold)

    # (N,) the image that stays for each one's group
    kept_of = kept_images(labels, _priority(images, settings.keep))[labels]
    is_kept = (kept_of == np.arange(len(images))) & (resembled.index < 0)
    kept = np.flatnonzero(is_kept)
    group_sizes = np.bincount(labels, minlength=len(images))
    duplicates = pa.array(group_sizes[labels[kept]] - 1, pa.int32())
    field = next(field for field in SELECTION_FIELDS if field.name == "duplicates")
    figures: dict[str, object] = {
        "images": len(kept),
        "removed": len(images) - len(kept),
        "near_duplicates": int(((resembled.index < 0) & ~is_kept).sum()),
        "against": int((resembled.index >= 0).sum()),
        "groups": int((group_sizes > 1).sum()),
        "largest_group": int(group_sizes.max()),
        "saturated": num_saturated,
        "threshold": threshold,
        "threshold_origin": origin,
        **({"against_threshold": against_threshold} if evaluation else {}),
    }
    # The list of what went is put in its place first: whoever sees the selection finds it beside.
    removed = _removed_rows(images, evaluation, resembled, kept_of, is_kept)
    of_removed = write_table(removed_path(path), removed, replace(provenance, kind="removed", base=None), {})
    made = write_table(path, selected(images, kept).append_column(field, duplicates), provenance, figures)
    catalog.record(removed_path(path), of_removed, None)
    _say_result(len(images), figures)
    return made


def _say_result(num_images: int, figures: dict[str, object]) -> None:
    against = f", {figures['against']:,} like evaluation images" if figures["against"] else ""
    console.say(
        f"{num_images:,} images: {figures['images']:,} kept, {figures['near_duplicates']:,} near-duplicates{against};"
        f" {figures['groups']:,} groups, the largest of {figures['largest_group']:,}"
    )
    if not figures["images"]:
        console.warn("no image is left; raise --threshold or --against-threshold")


def _priority(images: EmbeddedImages, keep: str) -> Int64:
    """Return the rank of every image in the order of preference, (N,); what `--keep` ties goes by (id, uri, row)."""
    name = _priority_column(images.source, keep)
    if keep == "first":
        return np.arange(len(images))
    if name is None:
        width, height = (
            pc.fill_null(pc.cast(images.images.column(side), pa.int64()), 0) for side in ("width", "height")
        )
        value = pc.multiply(width, height)
    else:
        value = images.source.manifest.read([name], len(images)).column(name)
    try:
        ranked = pc.sort_indices(
            pa.table({"value": value, "order": images.order}),
            sort_keys=[("value", "descending"), ("order", "ascending")],
        ).to_numpy()
    except (pa.ArrowTypeError, pa.ArrowNotImplementedError):
        raise ToolkitError(f"--keep {keep}: a column of {value.type} has no largest value; name another") from None
    rank = np.empty(len(ranked), np.int64)
    rank[ranked] = np.arange(len(ranked))
    return rank


def kept_images(labels: Int64, priority: Int64) -> Int64:
    """Return, at the place of every group's name, its member of the lowest priority number, (N,); -1 elsewhere."""
    ranked = np.lexsort((priority, labels))
    groups, first = np.unique(labels[ranked], return_index=True)
    kept = np.full(len(labels), -1)
    kept[groups] = ranked[first]
    return kept


@dataclass(frozen=True)
class Resembled:
    """The evaluation image for which every image is removed."""

    index: Int64  # (N,) place among all evaluation images, one set after the other; -1: none, the image may stay
    similarity: Float64  # (N,) of the image to it
    itself: Bools  # (N,) the image itself is above the threshold, not only another of its group


def evaluation_images_resembled(
    images: EmbeddedImages, evaluation: list[EmbeddedImages], labels: Int64, threshold: float
) -> Resembled:
    """Find the groups in which any image has a similarity above `threshold` to any evaluation image.

    An image above the threshold itself is removed for the evaluation image it is most similar to; the others of its
    group for that of the group's most similar member.
    """
    best = np.full(len(images), -np.inf)
    index = np.full(len(images), -1)
    offset = 0
    for part in evaluation:
        found = nearest(
            images.vectors,
            part.vectors,
            1,
            order=part.order,
            above=threshold,
            progress=f"comparing with {part.source.manifest.path.name}",
        )
        better = found.similarities[:, 0] > best
        best[better], index[better] = found.similarities[better, 0], found.indices[better, 0] + offset
        offset += len(part)
    itself = index >= 0

    members = np.flatnonzero(itself)
    ranked = members[np.lexsort((images.order[members], -best[members], labels[members]))]
    groups, first = np.unique(labels[ranked], return_index=True)
    others = np.flatnonzero(~itself & np.isin(labels, groups))
    index[others] = index[ranked[first[np.searchsorted(groups, labels[others])]]]
    offset = 0
    for part in evaluation:
        mine = others[(index[others] >= offset) & (index[others] < offset + len(part))]
        best[mine] = similarities(images.vectors, mine, part.vectors, index[mine] - offset)
        offset += len(part)
    return Resembled(index, best, itself)


def _removed_rows(
    images: EmbeddedImages, evaluation: list[EmbeddedImages], resembled: Resembled, kept_of: Int64, is_kept: Bools
) -> pa.Table:
    """Return uri, reason, duplicate_of and similarity of every image that goes, in row order."""
    rows = np.flatnonzero(~is_kept)
    by_evaluation = resembled.index[rows] >= 0
    similarity = resembled.similarity[rows]
    duplicates = rows[~by_evaluation]
    similarity[~by_evaluation] = similarities(images.vectors, duplicates, images.vectors, kept_of[duplicates])
    reasons = np.where(by_evaluation, np.where(resembled.itself[rows], 1, 2), 0)
    uris = pa.chunked_array([chunk for part in (images, *evaluation) for chunk in part.uris().chunks], pa.string())
    places = np.where(by_evaluation, len(images) + resembled.index[rows], kept_of[rows])
    columns = [
        images.uris().take(pa.array(rows)),
        pa.array([DUPLICATE, RESEMBLES, GROUPED]).take(pa.array(reasons)),
        uris.take(pa.array(places)),
        pa.array(similarity, pa.float32()),
    ]
    return pa.table(columns, schema=pa.schema(REMOVED_FIELDS))
