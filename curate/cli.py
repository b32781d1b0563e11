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
            help="Run folder, weights file, Hugging Face folder, random:ARCH or pixels."
            " [default: the newest finished run, else pixels]",
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

    settings = EmbedSettings(model, role, labels, dtype, max_failed, batch_size, num_workers, null)
    result = embed_images(sources, output or f"{role}.parquet", settings, Options(seed, force, dry_run, limit))
    options.emit(result, json)


@app.command()
def dedup(
    manifest: Pool = None,
    output: Annotated[str, options.output_option("unique.parquet")] = "unique.parquet",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Cosine similarity above which two images are near-duplicates. [default: learnt from the pool]",
            show_default=False,
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Neighbours looked at first; images that have more are seen to.")] = 64,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="EVAL.parquet", help="Remove every group with an image like one of these; repeatable."),
    ] = None,
    against_threshold: Annotated[
        float | None,
        typer.Option(help="Similarity above which --against removes. [default: --threshold]", show_default=False),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="largest|first|column:NAME", help="Which of a group stays: by pixels, row, or a column's value."
        ),
    ] = "largest",
    features: Features = None,
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
    from .dedup import DedupSettings, dedup_images

    settings = DedupSettings(threshold, k, tuple(against or ()), against_threshold, keep, features)
    options.emit(dedup_images(manifest, output, settings, Options(seed, force, dry_run, limit)), json)


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
        int | None, typer.Option(help="Keep a balanced subset of exactly N images.", show_default="all")
    ] = None,
    pick: Annotated[
        Literal["random", "closest"], typer.Option(help="Which images of a cluster --sample takes.")
    ] = "random",
    features: Features = None,
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

    settings = ClusterSettings(num_clusters, resample, sample, pick, features)
    options.emit(cluster_images(manifest, output, settings, Options(seed, force, dry_run, limit)), json)


@app.command()
def retrieve(
    queries: Annotated[
        Path | None, typer.Option(help="Embedded seed images.", show_default="the newest queries in the catalog")
    ] = None,
    pool: Annotated[
        Path | None, typer.Option(help="Embeddings to choose from.", show_default="the newest pool in the catalog")
    ] = None,
    output: Annotated[str, options.output_option("curated.parquet")] = "curated.parquet",
    k: Annotated[int | None, typer.Option("--k", help="Nearest pool images of every query.", show_default="4")] = None,
    per_cluster: Annotated[
        int | None,
        typer.Option(metavar="M", help="Instead of --k: M images of every cluster of the pool that queries fall into."),
    ] = None,
    num_clusters: Annotated[
        int | None,
        typer.Option(
            help="For --per-cluster: make so many clusters.", show_default="the pool's own, else the root of its size"
        ),
    ] = None,
    include_queries: Annotated[bool, typer.Option("--include-queries", help="The queries come along as rows.")] = False,
    features: Features = None,
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
    from .retrieve import RetrieveSettings, retrieve_images

    settings = RetrieveSettings(k, per_cluster, num_clusters, include_queries, features)
    options.emit(retrieve_images(queries, pool, output, settings, Options(seed, force, dry_run, limit)), json)
