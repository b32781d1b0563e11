"""The table of clusters, NAME.clusters.parquet beside NAME.parquet, and what a person should know of them.

A row is a cluster, with its centroid in the column `embedding`: so it is an embedding manifest too.

N images, K_l clusters at level l.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ... import console
from ...errors import ToolkitError
from ...store.manifest import embedding_field
from ...store.vectors import Bools, Float32, Float64, Int32, Int64
from ..inputs import EmbeddedImages
from . import metrics
from .kmeans import Clustering

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
LEVEL_FIGURES = ("clusters", "empty", "smallest", "median", "largest", "entropy", "sample_entropy", "purity", "nmi")
CLASS_FIGURES = ("classes", "", *(f"class_{name}" for name in LEVEL_FIGURES[2:6]), "sample_class_entropy", "", "")
FIGURES_HEADER = ["", "number", "empty", "smallest", "median", "largest", "entropy", "of the sample", "purity", "NMI"]
LISTED_JUNK = 10  # clusters named on stderr


def table_path(path: Path) -> Path:
    """Return where the clusters of a selection are listed: NAME.clusters.parquet beside NAME.parquet."""
    return path.with_name(path.name.removesuffix(".parquet") + ".clusters.parquet")


def checked_table_path(path: Path) -> Path:
    """Return the same; raises ToolkitError when the table is gone."""
    clusters = table_path(path)
    if not clusters.exists():
        raise ToolkitError(f"no {clusters}, which `curate cluster` wrote beside {path}; make it again by --force")
    return clusters


def describe_levels(
    images: EmbeddedImages, levels: Sequence[Clustering], positions: Int64
) -> tuple[pa.Table, dict[str, object]]:
    """Return the table of clusters and the figures of all levels, and say on stderr what a person should know.

    `positions` (R,) are those of the images in the selection.
    """
    figures: dict[str, object] = {}
    tables: list[pa.Table] = []
    classes, names = _read_classes(images)
    has_label = classes >= 0
    clusters: Int64 | Int32 = np.arange(len(images))
    for level, made in enumerate(levels):
        num, centroids = len(made.centroids), made.centroids
        parents = levels[level + 1].assignments if level + 1 < len(levels) else None
        clusters = made.assignments[clusters]  # of every image
        sizes, sampled = (np.bincount(part, minlength=num) for part in (clusters, clusters[positions]))
        counts = metrics.contingency(clusters[has_label], classes[has_label])
        isolated = metrics.isolation(centroids)
        is_junk = metrics.suspected_junk(sizes, isolated) if level == 0 else np.zeros(num, bool)
        labels, purities = metrics.majority(counts, num)
        columns: dict[str, object] = {
            "level": np.full(num, level),
            "cluster": np.arange(num),
            "parent": [None] * num if parents is None else parents,
            "images": sizes,
            "sampled": sampled,
            "mean_distance": [None] * num,
            "isolation": isolated,
            "label": pa.array(names, pa.string()).take(pa.array(labels, mask=labels < 0)),
            "purity": pa.array(purities, pa.float32(), mask=labels < 0),
            "suspected": is_junk,
            "embedding": pa.FixedSizeListArray.from_arrays(centroids.reshape(-1), centroids.shape[1]),
        }
        measured = metrics.size_figures(sizes, sampled)
        if names:
            measured |= {"purity": metrics.purity(counts), "nmi": metrics.normalized_mutual_information(counts)}
        figures |= {f"{name}_{level}": value for name, value in measured.items()}
        if level == 0:
            columns["mean_distance"] = np.bincount(clusters, made.distances, num) / np.maximum(sizes, 1)
            figures |= {"junk_clusters": int(is_junk.sum()), "junk_images": int(sizes[is_junk].sum())}
            _say_junk(images, made, sizes, isolated, is_junk)
        if parents is not None:
            figures |= _say_grouping(centroids, parents, len(levels[level + 1].centroids), level + 1)
        schema = pa.schema([*TABLE_FIELDS, embedding_field(centroids.shape[1], pa.float32())])
        tables.append(pa.table(columns, schema=schema))
    if names:
        of_pool, of_sample = (part[part >= 0] for part in (classes, classes[positions]))
        measured = metrics.size_figures(np.bincount(of_pool), np.bincount(of_sample, minlength=len(names)))
        figures |= {f"class_{name}": measured[name] for name in ("smallest", "median", "largest", "entropy")}
        figures |= {"sample_class_entropy": measured["sample_entropy"], "classes": len(names)}
    title = f"{len(positions):,} of {len(images):,} images; entropy 1 is perfectly balanced"
    shown = len(FIGURES_HEADER) if names else -2
    console.table(title, FIGURES_HEADER[:shown], [row[:shown] for row in figure_rows(figures, len(tables))])
    return pa.concat_tables(tables), figures


def figure_rows(figures: Mapping[str, object], num_levels: int) -> list[list[object]]:
    """Return the rows below FIGURES_HEADER: one a level, then that of the labels where there are any."""
    rows: list[list[object]] = []
    for level in range(num_levels):
        rows.append([f"cluster_{level}", *(figures.get(f"{name}_{level}", "") for name in LEVEL_FIGURES)])
    if "classes" in figures:
        rows.append(["label", *(figures.get(name, "") for name in CLASS_FIGURES)])
    return rows


def _read_classes(images: EmbeddedImages) -> tuple[Int32, list[str]]:
    """Return the labels of all images as numbers (N,), -1 where there is none, and what they stand for."""
    encoded = [table.column("label").combine_chunks().dictionary_encode() for table in images.batches(["label"])]
    labels = pa.chunked_array(encoded).unify_dictionaries()
    classes = [chunk.indices.fill_null(-1).to_numpy() for chunk in labels.chunks]
    return np.concatenate(classes), labels.chunk(0).dictionary.to_pylist()


def _say_junk(images: EmbeddedImages, made: Clustering, sizes: Int64, isolated: Float64, is_junk: Bools) -> None:
    """List tiny clusters far from all others, each with the image nearest to its centroid."""
    suspected = np.flatnonzero(is_junk)
    if not len(suspected):
        return
    shown = suspected[np.argsort(-isolated[suspected], kind="stable")][:LISTED_JUNK].tolist()
    members = [np.flatnonzero(made.assignments == cluster) for cluster in shown]
    uris = images.uris(np.array([rows[made.distances[rows].argmin()] for rows in members])).to_pylist()
    console.warn(
        f"{len(suspected):,} tiny clusters far from all others, {sizes[suspected].sum():,} images: perhaps junk, which"
        " balancing favours; look at them (--sheet)"
    )
    columns = shown, sizes[shown].tolist(), isolated[shown].tolist(), [uri or "" for uri in uris]
    console.table("", ["cluster_0", "images", "isolation", "its central image"], [*zip(*columns, strict=True)])


def _say_grouping(children: Float32, parents: Int32, num_nodes: int, level: int) -> dict[str, object]:
    """Return how well a level groups the clusters below it, and warn where it finds no hierarchy."""
    made = metrics.grouping(children, parents, num_nodes)
    if not made.is_hierarchy:
        what = (
            f"its cluster {made.hub} is a hub: {made.share:.0%} of the {len(children):,} clusters below, with little in"
            f" common (their mean has length {made.norm:.2f}, the median node's {made.median_norm:.2f})"
            if made.is_hub
            else f"clusters that it puts together are hardly more alike (cosine {made.cosine:+.2f}) than any two"
        )
        console.warn(f"level {level} finds no hierarchy: {what}; leave it out of --num-clusters, or --allocation flat")
    return {
        f"hub_share_{level}": made.share,
        f"hub_norm_{level}": made.norm,
        f"grouping_{level}": made.cosine,
        f"hub_{level}": not made.is_hierarchy,
    }
