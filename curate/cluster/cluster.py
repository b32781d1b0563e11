"""(Hierarchical) k-means of a pool, and balanced subsets of it.

N images, K_l clusters at level l.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from ...errors import ToolkitError
from ...features.launch import caught_signals
from ...features.sheet import check_sheet
from ...store.artifact import Options, Result, check_manifest_name, make
from ...store.lock import writing
from ...store.manifest import SELECTION_FIELDS, Provenance, cluster_field
from ...store.memory import memory_budget
from ...store.progress import Progress
from ...store.vectors import Int32, Int64
from ..inputs import EmbeddedImages, describe, open_input, read_embedded, warn_of_plain_features
from ..selection import selected, selection_provenance, write_table
from .kmeans import cluster_levels
from .lloyd import NUM_ITERATIONS, NUM_NEIGHBORS, POINTS_A_CENTROID
from .sampling import balanced_sample, seeded_keys
from .sheet import draw_clusters
from .table import describe_levels, table_path

NOT_PARAMETERS = ("features", "where", "memory", "sheet")  # recorded otherwise, or do not change the rows
FORMER_OPTIONS = {"metric": "cosine", "init": "k-means++", "polish": 0}  # recorded, so that old outputs are up to date


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of `dinov2 curate cluster`, without the options that all commands share."""

    num_clusters: str  # a number a level, from fine to coarse, with commas
    resample: int = 10  # times that each level is fitted again, to equally many images of every cluster
    sample: int | None = None  # size of the balanced subset; None: all images
    pick: Literal["random", "closest"] = "random"  # which images of a cluster the subset takes
    allocation: Literal["water", "flat", "proportional"] = "water"  # how it is allocated to clusters
    recall: float = 0.99  # share of the images that must find their nearest centroid
    features: Path | None = None
    where: str | None = None
    memory: str | None = None  # such as 3GB; None: a third of the machine
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
    parameters = {name: value for name, value in asdict(settings).items() if name not in NOT_PARAMETERS}
    parameters |= {"num_clusters": num_clusters, **FORMER_OPTIONS}
    provenance = selection_provenance("curate cluster", parameters, path, options, pool)
    if settings.sheet is not None and not (path.exists() and not options.force):  # else the step below ends, or rests
        check_sheet(settings.sheet, provenance, options)

    def describe_work() -> None:
        warn_of_plain_features(pool)
        fit_rows = min(num_rows, POINTS_A_CENTROID * num_clusters[0]) * (1 + settings.resample / 2)
        products = num_rows * num_clusters[0] + fit_rows * NUM_ITERATIONS * min(NUM_NEIGHBORS, num_clusters[0])
        what = f"make {' and '.join(f'{count:,}' for count in num_clusters)} clusters"
        describe(path, [pool], round(products), what, options)

    def work() -> Provenance:
        warn_of_plain_features(pool)
        return _cluster(read_embedded(pool, options.limit), path, num_clusters, settings, provenance)

    side_files = {table_path(path): "clusters"}
    result = make(output, provenance, options, describe=describe_work, work=work, side_files=side_files)
    if result is not None and settings.sheet is not None:
        with writing(settings.sheet):
            draw_clusters(path, settings.sheet, options)
    return result


def parse_num_clusters(text: str, num_rows: int) -> list[int]:
    """Return the number of clusters a level, from fine to coarse.

    Raises ToolkitError when these are no falling whole numbers from `num_rows` down.
    """
    try:
        num_clusters = [int(part) for part in text.split(",")]
    except ValueError:
        raise ToolkitError(f"--num-clusters {text} is no list of whole numbers; give such as 1000,100") from None
    if any(coarse >= fine for fine, coarse in zip(num_clusters, num_clusters[1:], strict=False)):
        raise ToolkitError(f"--num-clusters {text} does not fall; give levels from fine to coarse, such as 1000,100")
    if num_clusters[-1] < 1:
        raise ToolkitError(f"--num-clusters {text}: {num_clusters[-1]} clusters cannot be; give 1 or more")
    if num_clusters[0] > num_rows:
        raise ToolkitError(f"--num-clusters {text}: more clusters than the {num_rows} images; give fewer")
    return num_clusters


def _check(settings: ClusterSettings, num_rows: int) -> None:
    if settings.resample < 0:
        raise ToolkitError(f"--resample {settings.resample} is less than none; give 0 or more")
    if settings.sample is not None and not 1 <= settings.sample <= num_rows:
        raise ToolkitError(f"--sample {settings.sample} of {num_rows} images cannot be; give 1 to {num_rows}")
    if settings.sample is None and settings.allocation != "water":
        raise ToolkitError(f"--allocation {settings.allocation} is for a sample; give --sample too")
    if not 0 < settings.recall <= 1:
        raise ToolkitError(f"--recall {settings.recall} is no share of the images; give a number above 0, up to 1")
    memory_budget(settings.memory)


def _cluster(
    images: EmbeddedImages, path: Path, num_clusters: list[int], settings: ClusterSettings, provenance: Provenance
) -> Provenance:
    progress = [Progress(provenance, level) for level in range(len(num_clusters))]
    with caught_signals("pass") as signals:
        for part in progress:
            part.signals = signals
        levels = cluster_levels(
            images.vectors,
            num_clusters,
            num_resamplings=settings.resample,
            seed=provenance.seed,
            recall=settings.recall,
            memory=memory_budget(settings.memory),
            progress=progress,
        )
    positions = np.arange(len(images))
    if settings.sample is not None:
        keys = seeded_keys(len(images), provenance.seed, 0)
        positions = balanced_sample(
            [made.assignments for made in (levels[:1] if settings.allocation == "flat" else levels)],
            settings.sample,
            [keys] if settings.pick == "random" else [levels[0].distances, images.order],
            provenance.seed,
            is_proportional=settings.allocation == "proportional",
        )

    clusters, figures = describe_levels(images, levels, positions)
    write_table(table_path(path), clusters, replace(provenance, kind="clusters", base=None), {})
    table = selected(images, positions)
    of_images: Int64 | Int32 = positions
    for level, made in enumerate(levels):
        of_images = made.assignments[of_images]
        table = table.append_column(cluster_field(level), pa.array(of_images))
    distance = pa.schema(SELECTION_FIELDS).field("distance")
    table = table.append_column(distance, pa.array(levels[0].distances[positions]))
    figures = {"images": len(positions), "agreement": levels[0].agreement, **figures}
    return write_table(path, table, provenance, figures)
