"""dinov2 curate: images in, smaller and better manifests out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import options
from ..options import ADVANCED, FILTERS, INPUT, METHOD, MODEL, MODEL_HELP, OUTPUT, option
from ..store.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from ..store.artifact import Options, Result

app = typer.Typer(
    invoke_without_command=True, callback=options.help_when_bare, help="Images in, smaller and better manifests out."
)

Pool = Annotated[
    Path | None,
    typer.Argument(
        metavar="[MANIFEST]",
        help="Embeddings, or a selection of them. [default: the newest pool in the catalog]",
        show_default=False,
    ),
]
Features = Annotated[
    Path | None,
    option(INPUT, "Take the pool's vectors from these embeddings, matched by id and uri.", metavar="OTHER.parquet"),
]


@app.command()
@options.with_shared()
def embed(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Folders, images, Parquet files, lists of names (.txt), - for stdin."),
    ],
    labels: Annotated[
        str, option(INPUT, "Where labels come from; folder: first below SOURCE.", metavar="folder|none|column:NAME")
    ] = "folder",
    null: options.Null = False,
    output: Annotated[str | None, options.output_option("ROLE.parquet")] = None,
    model: Annotated[str | None, option(MODEL, MODEL_HELP, default="the newest finished run, else copy")] = None,
    tokens: Annotated[
        Literal["cls", "mean", "cls+mean", "patches"],
        option(MODEL, "Tokens used as the embedding: class token, mean of the patches, both, or every patch as well."),
    ] = "cls",
    layers: Annotated[int, option(MODEL, "Join the tokens of the last N blocks.", min=1)] = 1,
    image_size: Annotated[
        int | None, option(MODEL, "Input resolution.", min=1, metavar="PX", default="its own")
    ] = None,
    windows: Annotated[
        int | None,
        option(MODEL, "Sliding window over the whole image, its short side reduced to PX.", min=1, metavar="PX"),
    ] = None,
    role: Annotated[
        Literal["pool", "queries", "eval"], option(OUTPUT, "Role of these images in later commands.")
    ] = "pool",
    dtype: Annotated[
        Literal["float16", "float32"], option(OUTPUT, "How the embeddings are kept: two or four bytes a number.")
    ] = "float16",
    min_side: Annotated[
        int | None, option(FILTERS, "Remove images whose shorter side is less.", min=1, metavar="PX")
    ] = None,
    max_aspect: Annotated[
        float | None, option(FILTERS, "Remove images whose longer side is more times the shorter.", min=1.0)
    ] = None,
    min_contrast: Annotated[
        float | None,
        option(FILTERS, "Remove near-constant images: standard deviation of the grey levels (0-255), e.g. 2.", min=0.0),
    ] = None,
    min_sharpness: Annotated[
        float | None,
        option(FILTERS, "Remove blurred images: variance of the Laplacian at a short side of 256, e.g. 50.", min=0.0),
    ] = None,
    max_failed: Annotated[
        float, option(FILTERS, "Fail when a larger share of the files cannot be read.", min=0.0, max=1.0)
    ] = 1.0,
    max_pixels: options.MaxPixels = DEFAULT_LIMITS.max_pixels,
    max_image_bytes: options.MaxImageBytes = DEFAULT_LIMITS.max_image_bytes,
    image_timeout: options.ImageTimeout = DEFAULT_LIMITS.image_timeout,
    batch_size: options.BatchSize = 64,
    num_workers: options.NumWorkers = None,
    num_processes: Annotated[
        int, option(ADVANCED, "Processes on this machine, one a GPU; each embeds its share.", min=1)
    ] = 1,
    *,
    shared: "Options",
) -> "Result | None":
    """Turn images into embeddings: one manifest row an image; what cannot be read is listed with its reason."""
    from .embed.embed import EmbedSettings, embed_images
    from .embed.filters import Filters

    filters, limits = options.settings_of(Filters, locals()), options.settings_of(Limits, locals())
    settings = options.settings_of(EmbedSettings, locals())
    return embed_images(sources, output or f"{role}.parquet", settings, shared)


@app.command()
@options.with_shared()
def dedup(
    manifest: Pool = None,
    features: Features = None,
    against: Annotated[
        list[Path] | None,
        option(INPUT, "Remove every group with an image like one of these; repeatable.", metavar="EVAL.parquet"),
    ] = None,
    known: Annotated[
        list[Path] | None,
        option(INPUT, "Remove what duplicates an image kept earlier; repeatable.", metavar="CLEAN.parquet"),
    ] = None,
    output: Annotated[str, options.output_option("unique.parquet")] = "unique.parquet",
    threshold: Annotated[
        float | None,
        option(
            METHOD,
            "Cosine similarity above which two images are near-duplicates.",
            default="that of --known, else learnt from the pool",
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        option(
            METHOD,
            "Verify candidate pairs by their pixels; only copies count.",
            "--verify/--no-verify",
            default="with features of `copy` and no --threshold",
        ),
    ] = None,
    k: Annotated[
        int, option(METHOD, "Nearest neighbours of an image; pixel verification takes 24 of them at most.", "--k")
    ] = 64,
    linkage: Annotated[
        Literal["components", "star"],
        option(METHOD, "components: chains of pairs; star: every image is above the threshold to the kept one."),
    ] = "components",
    keep: Annotated[
        str,
        option(
            METHOD,
            "Which image of a group is kept: by pixels, row, a column's largest value, or its values in this order.",
            metavar="largest|first|column:NAME[=A,B]",
        ),
    ] = "largest",
    against_threshold: Annotated[
        float | None, option(METHOD, "Similarity above which --against removes.", default="as within the pool")
    ] = None,
    exact: Annotated[
        Literal["bytes", "pixels"] | None, option(METHOD, "Exact duplicates only; no embeddings needed.")
    ] = None,
    where: options.Where = None,
    sheet: Annotated[
        Path | None, option(OUTPUT, "Also draw the largest and the loosest groups.", metavar="GROUPS.png")
    ] = None,
    calibrate: Annotated[
        str | None,
        option(OUTPUT, "Only show what thresholds would remove, and print the one suggested.", metavar="PICTURE.png"),
    ] = None,
    precision: Annotated[
        float, option(ADVANCED, "For --calibrate: target precision of the suggested threshold.")
    ] = 0.98,
    memory: options.Memory = None,
    recall: options.Recall = 0.99,
    *,
    shared: "Options",
) -> "Result | None":
    """Keep one image of every group of near-duplicates; the others are listed with what they duplicate."""
    from .dedup.calibrate import CalibrateSettings, calibrate_threshold
    from .dedup.dedup import dedup_images
    from .dedup.settings import DedupSettings

    if calibrate is not None:
        return calibrate_threshold(manifest, calibrate, options.settings_of(CalibrateSettings, locals()), shared)
    return dedup_images(manifest, output, options.settings_of(DedupSettings, locals()), shared)


@app.command()
@options.with_shared()
def cluster(
    num_clusters: Annotated[
        str, option(METHOD, "Clusters per level, from fine to coarse, such as 1000,100.", metavar="K[,K...]")
    ],
    manifest: Pool = None,
    features: Features = None,
    where: options.Where = None,
    output: Annotated[str, options.output_option("clusters.parquet")] = "clusters.parquet",
    resample: Annotated[
        int, option(METHOD, "Rounds of resampling: k-means again, on equally many images of every cluster.")
    ] = 10,
    sample: Annotated[
        int | None, option(METHOD, "Select a balanced subset of exactly N images.", metavar="N", default="all")
    ] = None,
    pick: Annotated[
        Literal["random", "closest"], option(METHOD, "Which images of a cluster --sample takes.")
    ] = "random",
    allocation: Annotated[
        Literal["water", "flat", "proportional"],
        option(
            METHOD,
            "How --sample is allocated: equally through all levels (water) or to the finest clusters alone (flat), as"
            " far as they have images; or in proportion to their sizes.",
        ),
    ] = "water",
    sheet: Annotated[
        Path | None, option(OUTPUT, "Draw large, medium, small and suspected clusters.", metavar="SHEET.png")
    ] = None,
    memory: options.Memory = None,
    recall: options.Recall = 0.99,
    *,
    shared: "Options",
) -> "Result | None":
    """Group images by (hierarchical) k-means, and draw balanced subsets through the hierarchy."""
    from .cluster.cluster import ClusterSettings, cluster_images

    return cluster_images(manifest, output, options.settings_of(ClusterSettings, locals()), shared)


@app.command()
@options.with_shared()
def retrieve(
    queries: Annotated[
        list[str] | None,
        option(
            INPUT,
            "Embedded seed images, perhaps with a --k or --per-cluster of their own; repeatable.",
            metavar="Q.parquet[=N]",
            default="the newest queries in the catalog",
        ),
    ] = None,
    pool: Annotated[
        Path | None, option(INPUT, "Embeddings to choose from.", default="the newest pool in the catalog")
    ] = None,
    features: Features = None,
    where: options.Where = None,
    output: Annotated[str, options.output_option("curated.parquet")] = "curated.parquet",
    k: Annotated[int | None, option(METHOD, "Nearest pool images of every query.", "--k", default="4")] = None,
    fill: Annotated[
        bool, option(METHOD, "If several queries share a neighbour, give the others their next nearest.", "--fill")
    ] = False,
    per_cluster: Annotated[
        int | None,
        option(METHOD, "Instead of --k: M images of every cluster of the pool that queries fall into.", metavar="M"),
    ] = None,
    min_queries: Annotated[
        int, option(METHOD, "For --per-cluster: only of clusters with N queries of a set; the paper: 4.", metavar="N")
    ] = 1,
    num_clusters: Annotated[
        int | None,
        option(
            METHOD, "For --per-cluster: number of clusters of the pool.", default="its own, else the root of its size"
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        option(METHOD, "Most images that a query set retrieves; the paper: 1000000.", metavar="N", default="no limit"),
    ] = None,
    min_similarity: Annotated[
        float | None,
        option(METHOD, "Only images that are at least this similar to a query, by cosine.", metavar="S", default="any"),
    ] = None,
    include_queries: Annotated[bool, option(OUTPUT, "Write the queries as rows, too.", "--include-queries")] = False,
    memory: options.Memory = None,
    recall: options.Recall = 0.99,
    *,
    shared: "Options",
) -> "Result | None":
    """Choose the pool images that resemble the query images, every one at most once."""
    from .retrieve.retrieve import RetrieveSettings, parse_queries, retrieve_images

    settings = options.settings_of(RetrieveSettings, locals())
    return retrieve_images(parse_queries(queries or ()), pool, output, settings, shared)


@app.command()
@options.with_shared()
def union(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="PART.parquet[=WEIGHT]...", help="Manifests; weights for all parts or for none."),
    ],
    output: Annotated[str, options.output_option("mix.parquet")] = "mix.parquet",
    embeddings: Annotated[
        bool, option(OUTPUT, "Take the vectors along, also of parts with different embeddings.", "--embeddings")
    ] = False,
    where: options.Where = None,
    memory: options.Memory = None,
    *,
    shared: "Options",
) -> "Result | None":
    """Put manifests together, each image once; with weights, training draws every part as often as its share says."""
    from .union import UnionSettings, parse_parts, union_manifests

    return union_manifests(parse_parts(parts), output, options.settings_of(UnionSettings, locals()), shared)


@app.command("map")
@options.with_shared()
def map_(
    manifest: Pool = None,
    features: Features = None,
    where: options.Where = None,
    output: Annotated[str, options.output_option("map.parquet")] = "map.parquet",
    html: Annotated[Path | None, option(OUTPUT, "Also write the map as a page to explore.", metavar="MAP.html")] = None,
    neighbors: Annotated[
        int | None, option(OUTPUT, "Also write the K nearest neighbours of every image.", min=1, metavar="K")
    ] = None,
    thumbnails: Annotated[
        int | None, option(OUTPUT, "Also write a small picture of every image.", min=1, metavar="PX")
    ] = None,
    sample: Annotated[
        int | None,
        option(
            METHOD,
            "Images that are projected; the others are placed among their nearest of these.",
            min=1,
            metavar="N",
            default="all of up to 500,000, else 200,000",
        ),
    ] = None,
    memory: options.Memory = None,
    recall: options.Recall = 0.99,
    *,
    shared: "Options",
) -> "Result | None":
    """Lay the images out on a map, like beside like: two coordinates each, and a page to explore them."""
    from .map.map import MapSettings, map_images

    return map_images(manifest, output, options.settings_of(MapSettings, locals()), shared)
