"""Clusters that `curate cluster` made: how sizes changed from the pool to the sample, and what lies in some."""

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from ..curate.cluster.table import table_path
from ..store.manifest import Manifest
from ..store.vectors import Int64
from .manifest_rows import Row, ask, beside, stored

LISTED = 20  # clusters of a table
MOST = 40  # chosen: clusters of a level with bars of their own
PICTURED = 10  # chosen: of these, those whose images are shown
CENTRAL, RANDOM = 4, 4  # chosen: images shown of a cluster
CURVE_POINTS = 120
COLUMNS = ("cluster", "images", "sampled", "mean_distance", "isolation", "label", "purity")

MEMBERS = """
    with ranked as (
        select *, row_number() over (partition by cluster_0 order by distance, image_id, uri) as place from rows
        where list_contains($clusters, cluster_0)
    ),
    drawn as (
        select *, row_number() over (
            partition by cluster_0 order by place <= $central desc, md5(concat(uri, $seed::varchar)), place
        ) as draw from ranked
    )
    select cluster_0 as cluster, uri, label, distance, place <= $central as is_central from drawn
    where draw <= $central + $random order by cluster, not is_central, if(is_central, place, draw)
"""


@dataclass(frozen=True)
class Level:
    """A level of clusters, 0 the finest."""

    level: int
    num_clusters: int
    largest: list[Row]  # of COLUMNS, `MOST` at most, by size
    curve: list[Row]  # set (pool or sample), rank, images: sizes from the largest to the smallest


@dataclass(frozen=True)
class Clusters:
    """What a step made."""

    figures: dict[str, object]
    is_sample: bool  # it drew some images, not all
    levels: list[Level]
    suspected: list[Row]  # of COLUMNS
    members: dict[int, list[Row]]  # uri, label, distance, is_central: some images of a cluster


def read_clusters(selection: Manifest, seed: int) -> Clusters | None:
    """Return the clusters of a selection; None where their table is gone, or of other work."""
    made, provenance = beside(selection, table_path(selection.path)), selection.provenance
    if made is None or provenance is None:
        return None
    table = made.read(["level", *COLUMNS, "suspected"])  # without the centroids
    levels = []
    for level in sorted(pc.unique(table.column("level")).to_pylist()):
        of_level = table.filter(pc.equal(table.column("level"), level))
        of_level = of_level.sort_by([("images", "descending"), ("cluster", "ascending")])
        curve = [
            point
            for name, column in (("pool", "images"), ("sample", "sampled"))
            for point in size_curve(of_level.column(column).to_numpy(), name)
        ]
        levels.append(Level(level, len(of_level), of_level.select(COLUMNS)[:MOST].to_pylist(), curve))
    finest = table.filter(pc.and_(pc.equal(table.column("level"), 0), pc.greater(table.column("images"), 0)))
    by_isolation = [("isolation", "descending"), ("cluster", "ascending")]
    suspected = finest.filter(finest.column("suspected")).sort_by(by_isolation)[:LISTED].select(COLUMNS).to_pylist()
    shown = [row["cluster"] for row in (*suspected[:PICTURED], *levels[0].largest[:PICTURED])]
    rows = ask(
        MEMBERS,
        {"clusters": shown, "central": CENTRAL, "random": RANDOM, "seed": seed},
        rows=stored(selection, ("cluster_0", "distance", "image_id", "uri", "label")),
    )
    members = {cluster: [row for row in rows if row["cluster"] == cluster] for cluster in shown}
    is_sample = pc.sum(table.column("images")) != pc.sum(table.column("sampled"))
    return Clusters(provenance.figures, is_sample, levels, suspected, members)


def size_curve(sizes: Int64, name: str) -> list[Row]:
    """Return some of the sizes over their ranks, evenly on a logarithmic axis; empty clusters are left out."""
    falling = np.sort(sizes[sizes > 0])[::-1]
    ranks = np.unique(np.geomspace(1, max(len(falling), 1), CURVE_POINTS).round().astype(int))[: len(falling)]
    return [
        {"set": name, "rank": rank, "images": size}
        for rank, size in zip(ranks.tolist(), falling[ranks - 1].tolist(), strict=True)
    ]
