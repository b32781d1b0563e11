"""The command lines of `dinov2 export`, `models`, `catalog` and `doctor`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import console
from ..options import (
    INPUT,
    MODEL,
    OUTPUT,
    DryRun,
    Force,
    Json,
    Quiet,
    emit,
    help_when_bare,
    option,
    output_option,
    with_shared,
)

if TYPE_CHECKING:
    from ..store.artifact import Options, Result

models = typer.Typer(help="List architectures and released weights, and download weights.")
app = typer.Typer(
    invoke_without_command=True, callback=help_when_bare, help="Show what was made, from what, with which settings."
)

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Path or file name of an artifact, with or without .parquet.")
]


@app.command("list")
def list_artifacts(
    kind: Annotated[str | None, option(INPUT, "Only embeddings, selection, removed, scores or run.", "--kind")] = None,
    as_json: Json = False,
) -> None:
    """List the artifacts, newest first."""
    from .catalog import list_artifacts as run

    run(kind, as_json)


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show one artifact: settings, inputs, figures."""
    from .catalog import show as run

    run(name, as_json)


@app.command()
def lineage(name: Name, as_json: Json = False) -> None:
    """Show what an artifact was made from, back to the images."""
    from .catalog import lineage as run

    run(name, as_json)


@app.command()
def sql(
    query: Annotated[
        str,
        typer.Argument(metavar="QUERY", help="SQL over artifacts, newest, inputs, metrics, and any 'file.parquet'."),
    ],
    output: Annotated[str | None, output_option("the rows go to stdout")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Query the catalog and manifests in SQL; with -o the answer becomes a manifest like any other."""
    from .query import sql as run

    console.set_verbosity(quiet, 0)
    emit(run(query, output, force, as_json), as_json)


@app.command()
def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Artifacts to read again; all by default.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every artifact whole and compare it with its content id; exit 1 if one differs or is gone."""
    from .catalog import verify as run

    run(names or [], as_json)


@app.command()
def rebuild(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Manifests, run folders, or folders that hold them.")
    ],
) -> None:
    """Make the catalog again from the provenance in manifests and runs."""
    from .catalog import rebuild as run

    run(paths)


@app.command()
def gc(as_json: Json = False) -> None:
    """Empty the cache, and forget artifacts that are gone; prints how many bytes came free."""
    from .catalog import gc as run

    run(as_json)


@models.callback(invoke_without_command=True)
def list_models(context: typer.Context, as_json: Json = False) -> None:
    """List architectures with parameters, FLOP and memory, and the released weights by name."""
    if context.invoked_subcommand is None:
        from .models import list_models as run

        run(as_json)


@models.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Released weights, such as dinov2_vits14_reg.")],
    force: Force = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Download released weights to $DINOV2_CACHE, where --model NAME finds them."""
    from .models import pull_model as run

    console.set_verbosity(quiet, 0)
    emit(run(name, force, dry_run), as_json)


@with_shared()
def export(
    model: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, weights, or whatever --model takes.")],
    to: Annotated[
        Literal["hf", "official", "timm", "onnx", "safetensors"],
        option(OUTPUT, "hf (a folder), official, timm, onnx or safetensors (a file).", metavar="FORMAT"),
    ],
    output: Annotated[str, option(OUTPUT, "Where the result goes.", "-o", "--output")],
    image_size: Annotated[
        int | None,
        option(
            MODEL, "Side in pixels to store position embeddings for.", min=1, default="as they are; onnx: the model's"
        ),
    ] = None,
    limit: Annotated[int | None, option(INPUT, "Compare only N random images.", min=1, default="2")] = None,
    *,
    shared: "Options",
) -> "Result | None":
    """Write a model in another library's format, checked by reading it back and comparing all tokens."""
    from .export import export_model

    return export_model(model, output, to, image_size, replace(shared, limit=limit))


def doctor(as_json: Json = False) -> None:
    """Say what the toolkit finds on this machine and what to do about it; exit 1 if something stands in its way.

    Uses no network, and writes nothing but a probe file into each folder, removed at once.
    """
    from .doctor import doctor as run

    run(as_json)
