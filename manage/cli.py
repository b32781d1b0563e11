"""`dinov2 catalog`: what was made, from what, with which settings."""

from pathlib import Path
from typing import Annotated

import typer

from .. import console
from ..options import Force, Json, Quiet, emit, output_option

app = typer.Typer(no_args_is_help=True, help="What was made, from what, with which settings.")

Name = Annotated[str, typer.Argument(help="A path, or the file name of an artifact, with or without .parquet.")]


@app.command("list")
def list_artifacts(
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only embeddings, selection, removed, scores or run.")
    ] = None,
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
    query: Annotated[str, typer.Argument(help="SQL over artifacts, newest, inputs, metrics, and any 'file.parquet'.")],
    output: Annotated[str | None, output_option("none: the rows go to the terminal")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask the catalog and manifests in SQL; with -o the answer becomes a manifest like any other."""
    from .query import sql as run

    console.set_verbosity(quiet, 0)
    emit(run(query, output, force, as_json), as_json)


@app.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Artifacts to read again; all by default.")] = None,
    as_json: Json = False,
) -> None:
    """Read every artifact whole and compare it with its content id; exit 1 if one differs or is gone."""
    from .catalog import verify as run

    run(names or [], as_json)


@app.command()
def rebuild(
    paths: Annotated[list[Path], typer.Argument(help="Manifests, run folders, or folders that hold them.")],
) -> None:
    """Enter manifests and runs again from the provenance that they carry."""
    from .catalog import rebuild as run

    run(paths)


@app.command()
def gc() -> None:
    """Remove scratch arrays and the rows of artifacts that are gone."""
    from .catalog import gc as run

    run()
