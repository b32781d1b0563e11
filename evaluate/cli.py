"""dinov2 evaluate: runs and manifests in, scores and pictures out."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options
from ..options import INPUT, METHOD, MODEL, MODEL_HELP, OUTPUT, option

if TYPE_CHECKING:
    from ..store.artifact import Options, Result

app = typer.Typer(
    invoke_without_command=True, callback=options.help_when_bare, help="Runs and manifests in, scores and pictures out."
)

# How features are scored; an Enum because typer knows no list of Literal.
Method = StrEnum("Method", ["KNN", "LINEAR", "LOGREG", "SEGMENT", "RETRIEVAL"])
METHOD_HELP = (
    "knn: the nearest images vote; linear: a grid of linear classifiers; logreg: logistic regression over a grid of"
    " penalties; segment: a class for every pixel, from masks; retrieval: images of the same class."
    " May be given several times."
)
K_HELP = "knn: neighbours that vote; retrieval: ranks of the recall."
MODELS_HELP = f"{MODEL_HELP} May be given several times."
MASKS_HELP = "segment: column of the manifests with masks, names or encoded pictures; 255 is ignored."
SIDE_HELP = "segment: side in pixels of the windows that slide over larger images."
Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGES...", help="Images, folders, manifests, lists of names (.txt), - for stdin."),
]
Model = Annotated[str | None, option(MODEL, MODEL_HELP, default="the newest finished run")]
ImageSize = Annotated[
    int | None,
    option(MODEL, "Short side in pixels, a multiple of the patch.", min=1, default="the model's own, or 8 patches"),
]


@app.command()
@options.with_shared()
def probe(
    train: Annotated[str, option(INPUT, "Labelled images to train on: an embedding manifest, or images.")],
    test: Annotated[str, option(INPUT, "Labelled images to test on: the same.")],
    output: Annotated[str, options.output_option("scores.parquet")] = "scores.parquet",
    labels: Annotated[
        str, option(INPUT, "Where labels come from; folder: first below the source.", metavar="folder|column:NAME")
    ] = "folder",
    masks: Annotated[str, option(INPUT, MASKS_HELP, metavar="COLUMN")] = "mask",
    model: Annotated[
        list[str] | None,
        option(MODEL, MODELS_HELP, default="the manifests' embeddings, else the newest finished run, else copy"),
    ] = None,
    image_size: Annotated[int | None, option(MODEL, SIDE_HELP, min=1, default="the model's own")] = None,
    method: Annotated[list[Method] | None, option(METHOD, METHOD_HELP, default="knn")] = None,
    k: Annotated[
        str | None, option(METHOD, K_HELP, metavar="K,K...", default="10,20,100,200; retrieval 1,5,10")
    ] = None,
    per_class: Annotated[
        int | None,
        option(METHOD, "knn: only N images of each class vote, drawn ten times.", min=1, metavar="N", default="all"),
    ] = None,
    batch_size: options.BatchSize = 64,
    num_workers: options.NumWorkers = None,
    *,
    shared: "Options",
) -> "Result | None":
    """Measure frozen features by one protocol or several; prints the best figure, writes all scores."""
    from .probe import ProbeSettings, parse_ks, probe

    models, ks = model, None if k is None else parse_ks(k)
    methods = [each.value for each in method or [Method.KNN]]
    return probe(train, test, output, options.settings_of(ProbeSettings, locals()), shared)


@app.command()
@options.with_shared(limit=12)
def pca(
    images: Images,
    output: Annotated[str, options.output_option("pca.png")] = "pca.png",
    model: Model = None,
    image_size: ImageSize = None,
    null: options.Null = False,
    *,
    shared: "Options",
) -> "Result | None":
    """Draw what the patch features of several images have in common: principal components as colours."""
    from .pca import draw_pca
    from .pictures import PictureSettings

    return draw_pca(images, output, PictureSettings(model, image_size, null), shared)


@app.command()
@options.with_shared(limit=8)
def attention(
    images: Images,
    output: Annotated[str, options.output_option("attention.png")] = "attention.png",
    model: Model = None,
    image_size: ImageSize = None,
    null: options.Null = False,
    *,
    shared: "Options",
) -> "Result | None":
    """Draw attention maps of the last block: class token, head by head, and registers."""
    from .attention import draw_attention
    from .pictures import PictureSettings

    return draw_attention(images, output, PictureSettings(model, image_size, null), shared)


@app.command()
@options.with_shared("limit")
def match(
    left: Annotated[str, typer.Argument(metavar="A", help="An image.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    output: Annotated[str, options.output_option("match.png")] = "match.png",
    model: Model = None,
    image_size: ImageSize = None,
    matches: Annotated[int, option(OUTPUT, "Number of matches drawn.", min=1, metavar="M")] = 20,
    *,
    shared: "Options",
) -> "Result | None":
    """Draw lines between the patches of two images that are each other's nearest, the foreground first."""
    from .match import MatchSettings, draw_match

    return draw_match(left, right, output, MatchSettings(model, image_size, matches), shared)


@app.command()
@options.with_shared(limit=12)
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
        Path | None, option(INPUT, "Embeddings to search.", default="the newest pool in the catalog")
    ] = None,
    queries: Annotated[
        Path | None, option(INPUT, "Query images of what `retrieve` chose.", default="those it was given")
    ] = None,
    model: Annotated[
        str | None, option(MODEL, "Embeds query images.", default="the model that embedded the pool")
    ] = None,
    k: Annotated[int, option(OUTPUT, "Images beside each query.", min=1)] = 8,
    *,
    shared: "Options",
) -> "Result | None":
    """Draw queries and, beside each, its nearest images."""
    from .neighbors import NeighborSettings, draw_neighbors

    return draw_neighbors(query, output, NeighborSettings(pool, queries, k, model), shared)
