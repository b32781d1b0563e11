"""(Hierarchical) k-means of a pool, and balanced subsets of it.

N images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..features.neighbors import similarities
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ..store.manifest import SELECTION_FIELDS, Provenance, cluster_field, open_manifest
from ..store.vectors import Float64, Int64, Vectors
from .balance import balanced_sample, normalised_entropy, seeded_keys
from .kmeans import NUM_ITERATIONS, POINTS_A_CENTROID, cluster_vectors
from .selection import (
    EmbeddedImages,
    describe,
    open_input,
    read_embedded,
    selected,
    selection_provenance,
    warn_of_plain_features,
    write_table,
)

LEVEL_SEEDS = 1_000_003  # a prime: levels draw from seeds that resamplings and small --seed values do not reach


@dataclass(frozen=True)
class ClusterSettings:
    """What `dinov2 curate cluster` can be told, beside the options that all commands share."""

    num_clusters: str  # a number a level, from fine to coarse, with commas
    resample: int = 10  # resampled fits a level
    sample: int | None = None  # size of the balanced subset; None: all images
    pick: Literal["random", "closest"] = "random"  # which images of a cluster the subset takes
    features: Path | None = None


def cluster_images(manifest: Path | None, output: str, settings: ClusterSettings, options: Options) -> Result | None:
    """Write the images with their clusters, all of them or a balanced subset; return None after a dry run."""
    path = check_manifest_name(output)
    pool = open_input("manifest", manifest, path, settings.features)
    num_rows = pool.manifest.num_rows if options.limit is None else min(options.limit, pool.manifest.num_rows)
    num_clusters = parse_num_clusters(settings.num_clusters, num_rows)
    if settings.resample < 0:
        raise ToolkitError(f"--resample {settings.resample} is less than none; give 0 or more")
    if settings.sample is not None and not 1 <= settings.sample <= num_rows:
        raise ToolkitError(
            f"--sample {settings.sample} of {num_rows} images cannot be; give a number from 1 to {num_rows}"
        )
    parameters: dict[str, object] = {
        "num_clusters": num_clusters,
        "resample": settings.resample,
        "sample": settings.sample,
        "pick": settings.pick,
    }
    provenance = selection_provenance("curate cluster", parameters, path, options, pool)
    is_made = is_up_to_date(path, provenance, options)
    if not is_made:
        warn_of_plain_features(pool)
    if options.dry_run:
        if not is_made:
            fit_rows = min(num_rows, POINTS_A_CENTROID * num_clusters[0]) * NUM_ITERATIONS * (1 + settings.resample / 2)
            what = f"make {' and '.join(f'{count:,}' for count in num_clusters)} clusters"
            describe(path, [pool], round(num_rows + fit_rows) * num_clusters[0], what, options)
        return None
    if not is_made:
        with recorded(path) as finished:
            finished.append(_cluster(read_embedded(pool, options.limit), path, num_clusters, settings, provenance))
    made = open_manifest(path)
    return Result(output, {} if made.provenance is None else made.provenance.figures)


def parse_num_clusters(text: str, num_rows: int) -> list[int]:
    """Return the number of clusters a level, from fine to coarse.

    Raises ToolkitError when these are no falling whole numbers from `num_rows` down.
    """
    try:
        num_clusters = [int(part) for part in text.split(",")]
    except ValueError:
        raise ToolkitError(f"--num-clusters {text} is no list of whole numbers; give such as 1000,100") from None
    if any(coarse >= fine for fine, coarse in zip(num_clusters, num_clusters[1:], strict=False)):
        raise ToolkitError(
            f"--num-clusters {text} does not fall; give the levels from fine to coarse, such as 1000,100"
        )
    if num_clusters[-1] < 1:
        raise ToolkitError(f"--num-clusters {text}: {num_clusters[-1]} clusters cannot be; give 1 or more")
    if num_clusters[0] > num_rows:
        raise ToolkitError(f"--num-clusters {text}: more clusters than the {num_rows} images; give fewer")
    return num_clusters


def _cluster(
    images: EmbeddedImages, path: Path, num_clusters: list[int], settings: ClusterSettings, provenance: Provenance
) -> Provenance:
    levels, distances = cluster_levels(images.vectors, num_clusters, settings.resample, provenance.seed)
    positions = np.arange(len(images))
    if settings.sample is not None:
        keys = seeded_keys(len(images), provenance.seed, 0)
        preference = keys if settings.pick == "random" else _ranks(distances, images.order)
        positions = balanced_sample(levels, settings.sample, preference, provenance.seed)

    table = selected(images, positions)
    of_images = levels[0]
    columns = [of_images]
    for parents in levels[1:]:
        of_images = parents[of_images]
        columns.append(of_images)
    for level, clusters in enumerate(columns):
        table = table.append_column(cluster_field(level), pa.array(clusters[positions], pa.int32()))
    field = next(field for field in SELECTION_FIELDS if field.name == "distance")
    table = table.append_column(field, pa.array(distances[positions], pa.float32()))
    figures: dict[str, object] = {"images": len(positions), **_balance(images, columns, num_clusters, positions)}
    return write_table(path, table, provenance, figures)


def cluster_levels(
    vectors: Vectors, num_clusters: list[int], num_resamplings: int, seed: int
) -> tuple[list[Int64], Float64]:
    """Return the clusters of every level and the distance (N,), 1 - cosine, of every image to its finest centroid.

    Level 0 holds the cluster of every image (N,), level l that of every cluster of level l - 1. Upper levels cluster
    the centroids of the level below, at length 1 and by cosine: by Euclidean distance short mean vectors would gather
    everything around them in a hub.
    """
    levels, clustered = [], vectors
    distances = np.empty(0)
    for level, count in enumerate(num_clusters):
        found = cluster_vectors(clustered, count, num_resamplings=num_resamplings, seed=seed + level * LEVEL_SEEDS)
        if level == 0:
            own = Vectors(found.centroids, np.arange(count), vectors.base)
            distances = 1 - similarities(vectors, np.arange(len(vectors)), own, found.assignments)
        levels.append(found.assignments)
        clustered = Vectors(found.centroids, np.arange(count), vectors.base)
    return levels, distances


def _ranks(distances: Float64, order: Int64) -> Int64:
    ranks = np.empty(len(order), np.int64)
    ranks[np.lexsort((order, distances))] = np.arange(len(order))
    return ranks


def _balance(
    images: EmbeddedImages, columns: list[Int64], num_clusters: list[int], positions: Int64
) -> dict[str, object]:
    """Return sizes and normalised entropies of clusters and classes, before and after sampling, and tabulate them."""
    figures: dict[str, object] = {}
    rows: list[list[object]] = []
    for level, (clusters, count) in enumerate(zip(columns, num_clusters, strict=True)):
        sizes = np.bincount(clusters, minlength=count)
        measured: dict[str, object] = {
            "clusters": count,
            "empty": int((sizes == 0).sum()),
            "smallest": int(sizes.min()),
            "median": float(np.median(sizes)),
            "largest": int(sizes.max()),
            "entropy": normalised_entropy(sizes),
            "sample_entropy": normalised_entropy(np.bincount(clusters[positions], minlength=count)),
        }
        figures.update({f"{name}_{level}": value for name, value in measured.items()})
        rows.append([f"cluster_{level}", *measured.values()])
    labels = pc.drop_null(images.images.column("label"))
    if len(labels):
        codes = images.images.column("label").combine_chunks().dictionary_encode()
        count = len(codes.dictionary)
        sampled = codes.indices.take(pa.array(positions))
        entropies = [
            normalised_entropy(np.bincount(pc.drop_null(part).to_numpy(), minlength=count))
            for part in (codes.indices, sampled)
        ]
        figures.update(class_entropy=entropies[0], sample_class_entropy=entropies[1])
        rows.append(["label", count, "", "", "", "", *entropies])
    title = f"{len(positions):,} of {len(images):,} images; entropy 1 is all alike"
    console.table(title, ["", "number", "empty", "smallest", "median", "largest", "entropy", "of the sample"], rows)
    return figures
