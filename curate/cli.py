"""dinov2 curate: images in, smaller and better manifests out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import console, options

app = typer.Typer(no_args_is_help=True, help="Images in, smaller and better manifests out.")

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
    typer.Option(
        metavar="OTHER.parquet", help="Take the pool's vectors from this embedding manifest, matched by id and uri."
    ),
]


@app.command()
def embed(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Folders, images, Parquet files, lists of names (.txt), - for stdin."),
    ],
    output: Annotated[str | None, options.output_option("ROLE.parquet")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Run folder, weights file, Hugging Face folder, random:ARCH, pixels or copy."
            " [default: the newest finished run, else copy]",
            show_default=False,
        ),
    ] = None,
    role: Annotated[
        Literal["pool", "queries", "eval"], typer.Option(help="What later commands take the images for.")
    ] = "pool",
    labels: Annotated[
        str, typer.Option(metavar="folder|none|column:NAME", help="Where labels come from; folder: first below SOURCE.")
    ] = "folder",
    dtype: Annotated[
        Literal["float16", "float32"], typer.Option(help="How the embeddings are kept: two or four bytes a number.")
    ] = "float16",
    max_failed: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fail when a larger share of the files cannot be read.")
    ] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images the model sees at a time.")] = 64,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode. [default: one a core]", show_default=False)
    ] = None,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, one a GPU; each embeds its share.")
    ] = 1,
    tokens: Annotated[
        Literal["cls", "mean", "cls+mean", "patches"],
        typer.Option(help="What describes an image: class token, mean of the patches, both, or every patch as well."),
    ] = "cls",
    layers: Annotated[int, typer.Option(min=1, help="Join the tokens of the last N blocks.")] = 1,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="PX", help="Side of what the model sees. [default: its own]", show_default=False),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="PX", help="See all of an image, in overlapping tiles; larger ones at a short side of PX."
        ),
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(min=1, metavar="PX", help="Remove images whose shorter side is less.")
    ] = None,
    max_aspect: Annotated[
        float | None, typer.Option(min=1.0, help="Remove images whose longer side is more times the shorter.")
    ] = None,
    min_contrast: Annotated[
        float | None,
        typer.Option(min=0.0, help="Remove near-constant images: standard deviation of the grey levels (0-255), as 2."),
    ] = None,
    min_sharpness: Annotated[
        float | None,
        typer.Option(min=0.0, help="Remove blurred images: variance of the Laplacian at a short side of 256, as 50."),
    ] = None,
    null: options.Null = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Turn images into embeddings: one manifest row an image; what cannot be read is listed with its reason."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .embed import EmbedSettings, embed_images
    from .embed_filters import Filters

    settings = EmbedSettings(
        model, role, labels, dtype, max_failed, batch_size, num_workers, null, tokens, layers, image_size, windows,
        Filters(min_side, max_aspect, min_contrast, min_sharpness), num_processes,
    )  # fmt: skip
    result = embed_images(sources, output or f"{role}.parquet", settings, Options(seed, force, dry_run, limit))
    options.emit(result, json)


@app.command()
def dedup(
    manifest: Pool = None,
    output: Annotated[str, options.output_option("unique.parquet")] = "unique.parquet",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Cosine similarity above which two images are near-duplicates."
            " [default: that of --known, else learnt from the pool]",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Look at the pixels of every image and of those most like it, and let only copies count."
            " [default: with features of `copy` and no --threshold]",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int,
        typer.Option(
            "--k", help="Neighbours looked at first, by their pixels 24 at most; images that have more are seen to."
        ),
    ] = 64,
    linkage: Annotated[
        Literal["components", "star"],
        typer.Option(help="Groups: chains of pairs above the threshold, or what is above it to the one that stays."),
    ] = "components",
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="EVAL.parquet", help="Remove every group with an image like one of these; repeatable."),
    ] = None,
    against_threshold: Annotated[
        float | None,
        typer.Option(
            help="Similarity above which --against removes. [default: as within the pool]", show_default=False
        ),
    ] = None,
    known: Annotated[
        list[Path] | None,
        typer.Option(metavar="CLEAN.parquet", help="Remove what duplicates an image kept earlier; repeatable."),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="largest|first|column:NAME[=A,B]",
            help="Which of a group stays: by pixels, row, a column's largest value, or its values in this order.",
        ),
    ] = "largest",
    exact: Annotated[
        Literal["bytes", "pixels"] | None,
        typer.Option(help="Only exact copies, without vectors: also of images that were never embedded."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="GROUPS.png", help="Also draw the largest and the loosest groups.")
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="PICTURE.png", help="Remove nothing: draw what thresholds would do, and print the one suggested."
        ),
    ] = None,
    precision: Annotated[
        float, typer.Option(help="For --calibrate: share of the pairs above the threshold that are no chance.")
    ] = 0.98,
    where: options.Where = None,
    features: Features = None,
    memory: options.Memory = None,
    recall: options.Recall = 0.99,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Keep one image of every group of near-duplicates; the others are listed with what they duplicate."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .calibrate import CalibrateSettings, calibrate_threshold
    from .dedup import DedupSettings, dedup_images

    common = Options(seed, force, dry_run, limit)
    if calibrate is not None:
        calibration = CalibrateSettings(precision, features, where, memory, recall)
        options.emit(calibrate_threshold(manifest, calibrate, calibration, common), json)
        return
    settings = DedupSettings(
        threshold=threshold,
        k=k,
        against=tuple(against or ()),
        against_threshold=against_threshold,
        keep=keep,
        features=features,
        linkage=linkage,
        known=tuple(known or ()),
        exact=exact,
        sheet=sheet,
        where=where,
        memory=memory,
        recall=recall,
        verify=verify,
    )
    options.emit(dedup_images(manifest, output, settings, common), json)


@app.command()
def cluster(
    num_clusters: Annotated[
        str, typer.Option(metavar="K[,K...]", help="Clusters a level, from fine to coarse, such as 1000,100.")
    ],
    manifest: Pool = None,
    output: Annotated[str, options.output_option("clusters.parquet")] = "clusters.parquet",
    resample: Annotated[
        int, typer.Option(help="Times that k-means is run again on the same number of images of every cluster.")
    ] = 10,
    sample: Annotated[
        int | None, typer.Option(help="Keep a balanced subset of exactly N images. [default: all]", show_default=False)
    ] = None,
    pick: Annotated[
        Literal["random", "closest"], typer.Option(help="Which images of a cluster --sample takes.")
    ] = "random",
    allocation: Annotated[
        str,
        typer.Option(
            metavar="water|flat|power:A|proportional",
            help="How --sample is shared out: as evenly as can be through all levels, or the finest alone (flat), or by"
            " sizes to the power A, or by sizes.",
        ),
    ] = "water",
    metric: Annotated[Literal["cosine", "euclidean"], typer.Option(help="What centroids are near by.")] = "cosine",
    init: Annotated[
        Literal["k-means++", "sampled"], typer.Option(help="Where centroids start: apart from each other, or anywhere.")
    ] = "k-means++",
    polish: Annotated[int, typer.Option(help="Iterations over all images, beyond those over 256 a cluster.")] = 0,
    report: Annotated[
        Path | None, typer.Option(metavar="REPORT.html", help="Write how the balance changed, as a page.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="SHEET.png", help="Draw large, middling, small and suspected clusters.")
    ] = None,
    where: options.Where = None,
    features: Features = None,
    memory: options.Memory = None,
    recall: options.Recall = 0.99,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Group images by (hierarchical) k-means, and draw balanced subsets through the hierarchy."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .cluster import ClusterSettings, cluster_images

    settings = ClusterSettings(
        num_clusters=num_clusters,
        resample=resample,
        sample=sample,
        pick=pick,
        features=features,
        allocation=allocation,
        metric=metric,
        init=init,
        polish=polish,
        where=where,
        recall=recall,
        memory=memory,
        report=report,
        sheet=sheet,
    )
    options.emit(cluster_images(manifest, output, settings, Options(seed, force, dry_run, limit)), json)


@app.command()
def retrieve(
    queries: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Q.parquet[=N]",
            help="Embedded seed images, perhaps with a --k or --per-cluster of their own; repeatable. [default: the"
            " newest queries in the catalog]",
            show_default=False,
        ),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(help="Embeddings to choose from. [default: the newest pool in the catalog]", show_default=False),
    ] = None,
    output: Annotated[str, options.output_option("curated.parquet")] = "curated.parquet",
    k: Annotated[
        int | None, typer.Option("--k", help="Nearest pool images of every query. [default: 4]", show_default=False)
    ] = None,
    fill: Annotated[
        bool,
        typer.Option(
            "--fill",
            help="An image that several queries want goes to one; fill the others' places by their next nearest.",
        ),
    ] = False,
    per_cluster: Annotated[
        int | None,
        typer.Option(metavar="M", help="Instead of --k: M images of every cluster of the pool that queries fall into."),
    ] = None,
    min_queries: Annotated[
        int,
        typer.Option(metavar="N", help="For --per-cluster: only of clusters with N queries of a set; the paper: 4."),
    ] = 1,
    num_clusters: Annotated[
        int | None,
        typer.Option(
            help="For --per-cluster: make so many clusters. [default: the pool's own, else the root of its size]",
            show_default=False,
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images a query set brings at most; the paper: 1000000. [default: no limit]",
            show_default=False,
        ),
    ] = None,
    min_similarity: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Only images at least so similar to a query, by cosine. [default: any]",
            show_default=False,
        ),
    ] = None,
    include_queries: Annotated[bool, typer.Option("--include-queries", help="The queries come along as rows.")] = False,
    where: options.Where = None,
    features: Features = None,
    memory: options.Memory = None,
    recall: options.Recall = 0.99,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Choose the pool images that resemble the query images, every one at most once."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .retrieve import RetrieveSettings, parse_queries, retrieve_images

    settings = RetrieveSettings(
        k=k,
        per_cluster=per_cluster,
        num_clusters=num_clusters,
        include_queries=include_queries,
        features=features,
        fill=fill,
        min_queries=min_queries,
        max_images=max_images,
        min_similarity=min_similarity,
        where=where,
        memory=memory,
        recall=recall,
    )
    sets = parse_queries(queries or ())
    options.emit(retrieve_images(sets, pool, output, settings, Options(seed, force, dry_run, limit)), json)


@app.command()
def union(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="PART.parquet[=WEIGHT]...", help="Manifests, all or none with a share of the draws."),
    ],
    output: Annotated[str, options.output_option("mix.parquet")] = "mix.parquet",
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Take the vectors along, also of parts with different embeddings.")
    ] = False,
    where: options.Where = None,
    memory: options.Memory = None,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Put manifests together, each image once; with weights, training draws every part as often as its share says."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .union import UnionSettings, parse_parts, union_manifests

    settings = UnionSettings(where, embeddings, memory)
    result = union_manifests(parse_parts(parts), output, settings, Options(seed, force, dry_run, limit))
    options.emit(result, json)
