"""dinov2 train: manifests in, run folders out."""

from pathlib import Path
from typing import Annotated

import typer

from .. import console, options

app = typer.Typer(no_args_is_help=True, help="Manifests in, run folders with trained models out.")


@app.callback()
def train() -> None:
    """Manifests in, run folders with trained models out."""


@app.command()
def pretrain(
    manifest: Annotated[
        Path | None,
        typer.Argument(metavar="[MANIFEST]", help="Images, one a row. [default: the newest pool]", show_default=False),
    ] = None,
    output: Annotated[str, options.output_option("runs/pretrain")] = "runs/pretrain",
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="tiny (small images, CPU), vitl16-short (the paper's), or a TOML file."
            " [default: tiny; with --resume the run's own]",
            show_default=False,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint, if any.")] = False,
    init_from: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Start from a run, a weights file or a Hugging Face folder.")
    ] = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes to start on this machine.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Seed of every random choice. [default: the recipe's]", show_default=False)
    ] = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Train a vision transformer by DINOv2's objective, from nothing or from other weights."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .config import TrainConfig, command_config
    from .launch import speaks_for_all
    from .pretrain import pretrain as run

    config = command_config(TrainConfig, output, recipe, assignments or [], resume=resume, seed=seed)
    shared = Options(config.seed, force, dry_run, limit)
    result = run(manifest, output, config, shared, resume=resume, init_from=init_from, num_processes=num_processes)
    options.emit(result if speaks_for_all() else None, json)
