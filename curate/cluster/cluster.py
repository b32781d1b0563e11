"""(Hierarchical) k-means of a pool, and balanced subsets of it.

N images, K_l clusters at level l, D numbers a vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from ...errors import ToolkitError
from ...features.launched import caught_signals
from ...features.sheet import check_sheet
from ...store.artifact import Options, Result, check_manifest_name, check_side_file, is_up_to_date, recorded
from ...store.manifest import SELECTION_FIELDS, Provenance, cluster_field, open_manifest
from ...store.memory import memory_budget
from ...store.progress import Progress
from ...store.vectors import Float32, Int64, Vectors
from ..inputs import EmbeddedImages, describe, open_input, read_embedded, warn_of_plain_features
from ..selection import selected, selection_provenance, write_table
from .allocation import Int32, parse_allocation
from .centroid_search import Metric
from .kmeans import KMeansSettings, cluster_vectors
from .lloyd import NUM_ITERATIONS, NUM_NEIGHBOURS, POINTS_A_CENTROID, Init
from .report import check_report, write_report
from .sampling import balanced_sample, seeded_keys
from .sheet import draw_clusters
from .table import Level, describe_levels, table_path, write_cluster_table

LEVEL_SEEDS = 1_000_003  # a prime: levels draw from seeds that resamplings and small --seed values do not reach


@dataclass(frozen=True)
class ClusterSettings:
    """What `dinov2 curate cluster` can be told, beside the options that all commands share."""

    num_clusters: str  # a number a level, from fine to coarse, with commas
    resample: int = 10  # resampled fits a level
    sample: int | None = None  # size of the balanced subset; None: all images
    pick: Literal["random", "closest"] = "random"  # which images of a cluster the subset takes
    features: Path | None = None
    allocation: str = "water"  # how the subset is shared out: water, flat, proportional or power:A
    metric: Metric = "cosine"
    init: Init = "k-means++"
    polish: int = 0  # iterations over all images at the end of a level
    where: str | None = None
    recall: float = 0.99  # share of the images that must find their nearest centroid
    memory: str | None = None  # such as 3GB; None: a third of the machine
    report: Path | None = None  # where to write how balance changed
    sheet: Path | None = None  # where to draw clusters


def cluster_images(manifest: Path | None, output: str, settings: ClusterSettings, options: Options) -> Result | None:
    """Write the images with their clusters, all of them or a balanced subset; return None after a dry run.

    What a killed run has reached is kept, and the same command goes on from there.
    Raises Stopped when a signal came.
    """
    path = check_manifest_name(output)
    pool = open_input("manifest", manifest, path, settings.features, settings.where)
    num_rows = pool.num_rows(options.limit)
    num_clusters = parse_num_clusters(settings.num_clusters, num_rows)
    _check(settings, num_rows)
    parameters: dict[str, object] = {
        "num_clusters": num_clusters,
        "resample": settings.resample,
        "sample": settings.sample,
        "pick": settings.pick,
        "allocation": settings.allocation,
        "metric": settings.metric,
        "init": settings.init,
        "polish": settings.polish,
        "recall": settings.recall,
    }
    provenance = selection_provenance("curate cluster", parameters, path, options, pool)
    is_made = is_up_to_date(path, provenance, options)
    if settings.report is not None:
        check_report(settings.report, options, is_made)
    if not is_made:
        check_side_file(table_path(path), "clusters", path, provenance, options)
        if settings.sheet is not None:
            check_sheet(settings.sheet, options)
        warn_of_plain_features(pool)
    if options.dry_run:
        if not is_made:
            fit_rows = min(num_rows, POINTS_A_CENTROID * num_clusters[0]) * (1 + settings.resample / 2)
            products = num_rows * num_clusters[0] + fit_rows * NUM_ITERATIONS * min(NUM_NEIGHBOURS, num_clusters[0])
            what = f"make {' and '.join(f'{count:,}' for count in num_clusters)} clusters"
            describe(path, [pool], round(products), what, options)
        return None
    if not is_made:
        with recorded(path) as finished:
            finished.append(_cluster(read_embedded(pool, options.limit), path, num_clusters, settings, provenance))
    if settings.report is not None:
        write_report(path, settings.report)
    if settings.sheet is not None:
        draw_clusters(path, settings.sheet, options)
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


def _check(settings: ClusterSettings, num_rows: int) -> None:
    for name, value in (("--resample", settings.resample), ("--polish", settings.polish)):
        if value < 0:
            raise ToolkitError(f"{name} {value} is less than none; give 0 or more")
    if settings.sample is not None and not 1 <= settings.sample <= num_rows:
        raise ToolkitError(
            f"--sample {settings.sample} of {num_rows} images cannot be; give a number from 1 to {num_rows}"
        )
    if not 0 < settings.recall <= 1:
        raise ToolkitError(f"--recall {settings.recall} is no share of the images; give a number above 0, up to 1")
    parse_allocation(settings.allocation)
    memory_budget(settings.memory)
    if settings.allocation != "water" and settings.sample is None:
        raise ToolkitError(f"--allocation {settings.allocation} shares out a sample; give --sample too")


def _cluster(
    images: EmbeddedImages, path: Path, num_clusters: list[int], settings: ClusterSettings, provenance: Provenance
) -> Provenance:
    saved = Progress(provenance)
    memory = memory_budget(settings.memory)
    how = KMeansSettings(settings.resample, settings.metric, settings.init, settings.polish, settings.recall, memory)
    with caught_signals("pass") as saved.signals:
        made = cluster_levels(images.vectors, num_clusters, how, provenance.seed, saved)
    positions = np.arange(len(images))
    if settings.sample is not None:
        keys = seeded_keys(len(images), provenance.seed, 0)
        preference = keys if settings.pick == "random" else _ranks(made.distances, images.order)
        levels = made.levels[:1] if settings.allocation == "flat" else made.levels
        power = parse_allocation(settings.allocation)
        positions = balanced_sample(levels, settings.sample, preference, provenance.seed, power)

    found = [
        Level(centroids, parents, settings.metric)
        for centroids, parents in zip(made.centroids, [*made.levels[1:], None], strict=True)
    ]
    clusters, figures = describe_levels(images, found, made.levels[0], made.distances, positions)
    write_cluster_table(path, clusters, provenance)
    table = selected(images, positions)
    of_images = made.levels[0][positions]
    for level, parents in enumerate([*made.levels[1:], None]):
        table = table.append_column(cluster_field(level), pa.array(of_images, pa.int32()))
        if parents is not None:
            of_images = parents[of_images]
    field = next(field for field in SELECTION_FIELDS if field.name == "distance")
    table = table.append_column(field, pa.array(made.distances[positions], pa.float32()))
    figures = {"images": len(positions), "agreement": made.agreement, **figures}
    written = write_table(path, table, provenance, figures)
    saved.remove()
    return written


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of several levels."""

    levels: Sequence[Int64 | Int32]  # of level 0 the cluster of every image (N,), of l that of every cluster of l - 1
    distances: Float32  # (N,) to the finest centroid: 1 - cosine, or the Euclidean distance
    centroids: Sequence[Float32]  # (K_l, D) of each level
    agreement: float  # measured share of images that found their nearest centroid


def cluster_levels(
    vectors: Vectors, num_clusters: Sequence[int], settings: KMeansSettings, seed: int, saved: Progress | None = None
) -> Hierarchy:
    """Cluster vectors (N, D), then the centroids, then theirs.

    By cosine, centroids have length 1 at every level: by Euclidean distance short mean vectors gather everything
    around them in a hub.
    """
    levels, centroids, clustered = [], [], vectors
    distances, agreement = np.empty(0, np.float32), 1.0
    for level, count in enumerate(num_clusters):
        found = cluster_vectors(
            clustered,
            count,
            num_resamplings=settings.resample,
            seed=seed + level * LEVEL_SEEDS,
            settings=settings,
            saved=saved,
            level=level,
        )
        if level == 0:
            distances, agreement = found.distances, found.agreement
        levels.append(found.assignments)
        centroids.append(found.centroids)
        clustered = Vectors(found.centroids, np.arange(count), vectors.base)
    return Hierarchy(levels, distances, centroids, agreement)


def _ranks(distances: Float32, order: Int64) -> Int64:
    ranks = np.empty(len(order), np.int64)
    ranks[np.lexsort((order, distances))] = np.arange(len(order))
    return ranks
