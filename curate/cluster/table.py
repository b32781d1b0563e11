"""The clusters of a selection as a table of their own, NAME.clusters.parquet beside NAME.parquet, and what they tell.

A row is a cluster, with its centroid in the column `embedding`: so it is an embedding manifest too.

N images, K_l clusters at level l.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ... import console
from ...store.manifest import ManifestWriter, Provenance, embedding_field
from ...store.vectors import Float32, Int64
from ..inputs import EmbeddedImages
from .allocation import Int32
from .centroid_search import Metric
from .metrics import (
    class_sizes,
    grouping,
    isolation,
    joint_above,
    joint_counts,
    majority,
    normalised_information,
    purity,
    read_classes,
    size_figures,
    suspected_junk,
)

TABLE_FIELDS = (
    pa.field("level", pa.int32()),  # 0 is the finest
    pa.field("cluster", pa.int32()),
    pa.field("parent", pa.int32()),  # cluster of the next level; null at the coarsest
    pa.field("images", pa.int64()),
    pa.field("sampled", pa.int64()),  # of them, those in the selection
    pa.field("mean_distance", pa.float32()),  # level 0: of its images to the centroid
    pa.field("isolation", pa.float32()),  # distance of the centroid to the nearest other one of its level
    pa.field("label", pa.string()),  # the most frequent one
    pa.field("purity", pa.float32()),  # its share of the images with a label
    pa.field("suspected", pa.bool_()),  # tiny and far from all others: perhaps junk
)
LISTED_JUNK = 10  # clusters named on stderr


@dataclass(frozen=True)
class Level:
    """A level of clusters."""

    centroids: Float32  # (K, D)
    parents: Int64 | Int32 | None  # (K,) clusters of the next level; None at the coarsest
    metric: Metric


def table_path(path: Path) -> Path:
    """Return where the clusters of a selection are listed: NAME.clusters.parquet beside NAME.parquet."""
    return path.with_name(path.name.removesuffix(".parquet") + ".clusters.parquet")


def write_cluster_table(path: Path, table: pa.Table, provenance: Provenance) -> None:
    """Write the table of the clusters of the selection at `path`."""
    about = replace(provenance, kind="clusters", base=None)
    with ManifestWriter(table_path(path), list(table.schema), about) as writer:
        writer.write(table)


def describe_levels(
    images: EmbeddedImages,
    levels: Sequence[Level],
    clusters: Int64 | Int32,
    distances: Float32,
    positions: Int64,
) -> tuple[pa.Table, dict[str, object]]:
    """Return the table of clusters and the figures of all levels, and say on stderr what a person should know.

    Args:
        clusters: (N,) of every image the cluster of level 0; `distances` (N,) to its centroid.
        positions: (R,) of the images in the selection.
    """
    figures: dict[str, object] = {}
    classes = read_classes(images)
    joint = joint_counts(clusters, classes)
    sizes = np.bincount(clusters, minlength=len(levels[0].centroids))
    sampled = np.bincount(clusters[positions], minlength=len(sizes))
    tables: list[pa.Table] = []
    lines: list[list[object]] = []
    for number, level in enumerate(levels):
        count = len(level.centroids)
        isolated = isolation(level.centroids, level.metric)
        is_junk = suspected_junk(sizes, isolated) if number == 0 else np.zeros(count, bool)
        labels, purities = majority(joint, count)
        mean = np.bincount(clusters, distances, count) / np.maximum(sizes, 1) if number == 0 else None
        columns = {
            "level": pa.array(np.full(count, number)),
            "cluster": pa.array(np.arange(count)),
            "parent": pa.nulls(count) if level.parents is None else pa.array(level.parents),
            "images": pa.array(sizes),
            "sampled": pa.array(sampled),
            "mean_distance": pa.nulls(count) if mean is None else pa.array(mean),
            "isolation": pa.array(isolated),
            "label": pa.array(classes.names, pa.string()).take(pa.array(labels, mask=labels < 0)),
            "purity": pa.array(purities, mask=labels < 0),
            "suspected": pa.array(is_junk),
        }
        tables.append(_table(columns, level.centroids))
        measured = size_figures(sizes, sampled)
        known = [purity(joint, count), normalised_information(joint)] if len(joint.counts) else []
        lines.append([f"cluster_{number}", *measured.values(), *known])
        figures |= {f"{name}_{number}": value for name, value in measured.items()}
        figures |= {f"{name}_{number}": value for name, value in zip(("purity", "nmi"), known, strict=False)}
        if number == 0:
            figures |= {"junk_clusters": int(is_junk.sum()), "junk_images": int(sizes[is_junk].sum())}
            _say_junk(images, clusters, distances, sizes, isolated, is_junk)
        if level.parents is not None:
            figures |= _say_grouping(level, levels[number + 1], number + 1)
            above = len(levels[number + 1].centroids)
            joint = joint_above(joint, np.asarray(level.parents, np.int64))
            sizes, sampled = (np.bincount(level.parents, part, above).astype(np.int64) for part in (sizes, sampled))
    if classes.names:
        measured = size_figures(*class_sizes(classes, positions))
        figures |= {"class_entropy": measured["entropy"], "sample_class_entropy": measured["sample_entropy"]}
        figures |= {f"class_{name}": measured[name] for name in ("smallest", "median", "largest")}
        figures["classes"] = len(classes.names)
        lines.append(["label", *measured.values(), "", ""])
    title = f"{len(positions):,} of {len(images):,} images; entropy 1 is all alike"
    header = ["", "number", "empty", "smallest", "median", "largest", "entropy", "of the sample", "purity", "nmi"]
    console.table(title, header if classes.names else header[:-2], [line[: len(header)] for line in lines])
    return pa.concat_tables(tables), figures


def _table(columns: dict[str, pa.Array], centroids: Float32) -> pa.Table:
    field = embedding_field(centroids.shape[1], pa.float32())
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(centroids.reshape(-1)), type=field.type)
    schema = pa.schema([*TABLE_FIELDS, field])
    return pa.table([*(columns[each.name].cast(each.type) for each in TABLE_FIELDS), vectors], schema=schema)


def _say_junk(
    images: EmbeddedImages,
    clusters: Int64 | Int32,
    distances: Float32,
    sizes: Int64,
    isolated: npt.NDArray[np.float64],
    is_junk: npt.NDArray[np.bool_],
) -> None:
    """List tiny far-away clusters, each with the image nearest to its centroid."""
    suspected = np.flatnonzero(is_junk)
    if not len(suspected):
        return
    shown = suspected[np.argsort(-isolated[suspected], kind="stable")][:LISTED_JUNK]
    members = np.flatnonzero(np.isin(clusters, shown))
    by = members[np.lexsort((distances[members], clusters[members]))]
    _, first = np.unique(clusters[by], return_index=True)
    nearest = dict(zip(np.sort(shown).tolist(), by[first].tolist(), strict=True))
    uris = images.uris(np.array([nearest[cluster] for cluster in shown.tolist()])).to_pylist()
    rows = [
        [cluster, int(sizes[cluster]), float(isolated[cluster]), uri or ""]
        for cluster, uri in zip(shown.tolist(), uris, strict=True)
    ]
    console.warn(
        f"{len(suspected):,} tiny clusters far from all others, {sizes[suspected].sum():,} images: perhaps junk, which"
        " balancing favours; look at them (--sheet)"
    )
    console.table("", ["cluster_0", "images", "isolation", "its central image"], rows)


def _say_grouping(below: Level, above: Level, number: int) -> dict[str, object]:
    """Return how well a level groups the clusters below it, and warn of a hub, or where there is nothing to group."""
    assert below.parents is not None
    count = len(above.centroids)
    made = grouping(below.centroids, np.asarray(below.parents, np.int64), count)
    is_hub = made.is_hub(count)
    num_below = len(below.centroids)
    if count > 1 and (is_hub or made.is_loose()):
        what = (
            f"its cluster {made.hub} is a hub: {made.share:.0%} of the {num_below:,} clusters below, with little in"
            f" common (their mean has length {made.norm:.2f}, the median node's {made.median_norm:.2f})"
            if is_hub
            else f"clusters that it puts together are hardly more alike (cosine {made.cosine:+.2f}) than any two"
        )
        console.warn(
            f"level {number} finds no hierarchy: {what}; leave it out (--num-clusters of the levels below), or"
            " --allocation flat, or --metric cosine if it was not"
        )
    return {
        f"hub_share_{number}": made.share,
        f"hub_norm_{number}": made.norm,
        f"grouping_{number}": made.cosine,
        f"hub_{number}": bool(count > 1 and (is_hub or made.is_loose())),
    }
