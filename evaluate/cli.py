"""dinov2 evaluate: runs and manifests in, scores and pictures out."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .. import console, options

app = typer.Typer(no_args_is_help=True, help="Runs and manifests in, scores and pictures out.")

MODEL_HELP = "Run folder, weights file, Hugging Face folder, random:ARCH, pixels or copy."


class Method(StrEnum):
    """How features are scored; an Enum because typer knows no list of Literal."""

    KNN = "knn"
    LINEAR = "linear"
    LOGREG = "logreg"
    SEGMENT = "segment"
    RETRIEVAL = "retrieval"


@app.command()
def probe(
    train: Annotated[str, typer.Option(help="Labelled images to learn from: an embedding manifest, or images.")],
    test: Annotated[str, typer.Option(help="Labelled images to be tested on, likewise.")],
    output: Annotated[str, options.output_option("scores.parquet")] = "scores.parquet",
    model: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{MODEL_HELP} May be given several times. [default: the manifests' embeddings, else the newest"
            " finished run, else copy]",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[Method] | None,
        typer.Option(
            help="knn: the nearest vote; linear: a grid of linear classifiers; logreg: logistic regression over a path"
            " of penalties; segment: a class a pixel, from masks; retrieval: images of the same class. May be given"
            " several times. [default: knn]",
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        str | None,
        typer.Option(
            metavar="K,K...",
            help="knn: neighbours that vote; retrieval: ranks that are looked at. [default: 10,20,100,200; retrieval"
            " 1,5,10]",
            show_default=False,
        ),
    ] = None,
    per_class: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="knn: only N images of each class vote, drawn ten times. [default: all]",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        str, typer.Option(metavar="folder|column:NAME", help="Where labels come from; folder: first below the source.")
    ] = "folder",
    masks: Annotated[
        str,
        typer.Option(
            metavar="COLUMN",
            help="segment: column of the manifests with masks, names or encoded pictures; 255 is ignored.",
        ),
    ] = "mask",
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="segment: side in pixels of the windows that slide over larger images. [default: the model's own]",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images the model sees at a time.")] = 64,
    num_workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode. [default: one a core]", show_default=False)
    ] = None,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Measure frozen features by one protocol or several; prints the best figure, writes all scores."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .probe import ProbeSettings, parse_ks, probe

    ks = None if k is None else parse_ks(k)
    methods = tuple(each.value for each in method or [Method.KNN])
    settings = ProbeSettings(
        tuple(model or ()), methods, ks, per_class, labels, masks, image_size, batch_size, num_workers
    )
    options.emit(probe(train, test, output, settings, Options(seed, force, dry_run, limit)), json)


@app.command()
def pca(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Images, folders, manifests, lists of names (.txt), - for stdin."),
    ],
    output: Annotated[str, options.output_option("pca.png")] = "pca.png",
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} [default: the newest finished run]", show_default=False)
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Short side in pixels, a multiple of the patch. [default: the model's own, or 8 patches]"
        ),
    ] = None,
    null: options.Null = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = 12,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Draw what the patch features of several images have in common: principal components as colours."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .pca import PcaSettings, draw_pca

    settings = PcaSettings(model, image_size, null)
    options.emit(draw_pca(images, output, settings, Options(seed, force, dry_run, limit)), json)


@app.command()
def attention(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES...", help="Images, folders, manifests, lists of names (.txt), - for stdin."),
    ],
    output: Annotated[str, options.output_option("attention.png")] = "attention.png",
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} [default: the newest finished run]", show_default=False)
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Short side in pixels, a multiple of the patch. [default: the model's own, or 8 patches]"
        ),
    ] = None,
    null: options.Null = False,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = 8,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Draw where the class token looks, head by head, and the registers: attention maps of the last block."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .attention import AttentionSettings, draw_attention

    settings = AttentionSettings(model, image_size, null)
    options.emit(draw_attention(images, output, settings, Options(seed, force, dry_run, limit)), json)


@app.command()
def match(
    left: Annotated[str, typer.Argument(metavar="A", help="An image.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    output: Annotated[str, options.output_option("match.png")] = "match.png",
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} [default: the newest finished run]", show_default=False)
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Short side in pixels, a multiple of the patch. [default: the model's own, or 8 patches]"
        ),
    ] = None,
    matches: Annotated[int, typer.Option(min=1, metavar="M", help="The best M are drawn.")] = 20,
    seed: options.Seed = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Draw lines between the patches of two images that are each other's nearest, the foreground first."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .match import MatchSettings, draw_match

    settings = MatchSettings(model, image_size, matches)
    options.emit(draw_match(left, right, output, settings, Options(seed, force, dry_run)), json)


@app.command()
def neighbors(
    query: Annotated[
        str,
        typer.Argument(
            metavar="QUERY",
            help="An image, a folder or a list of them; or embeddings, or what `dinov2 curate retrieve` chose.",
        ),
    ],
    output: Annotated[str, options.output_option("neighbors.png")] = "neighbors.png",
    pool: Annotated[
        Path | None,
        typer.Option(help="Embeddings to look in. [default: the newest pool in the catalog]", show_default=False),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="Query images of what `retrieve` chose. [default: those it was given]", show_default=False),
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="Images beside each query.")] = 8,
    model: Annotated[
        str | None,
        typer.Option(help="Embeds query images. [default: the model that embedded the pool]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a random:ARCH model that embeds query images.")] = 0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = 12,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Draw queries and, beside each, its nearest images."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .neighbors import NeighborSettings, draw_neighbors

    settings = NeighborSettings(pool, queries, k, model)
    options.emit(draw_neighbors(query, output, settings, Options(seed, force, dry_run, limit)), json)
