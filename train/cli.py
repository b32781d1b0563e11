"""dinov2 train: manifests in, run folders out."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import console, options

app = typer.Typer(no_args_is_help=True, help="Manifests in, run folders with trained models out.")

Manifest = Annotated[
    Path | None,
    typer.Argument(metavar="[MANIFEST]", help="Images, one a row. [default: the newest pool]", show_default=False),
]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe; repeatable.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint, if any.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes to start on this machine.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of every random choice. [default: the recipe's]", show_default=False)
]
EvalTrain = Annotated[
    str | None,
    typer.Option(metavar="MANIFEST", help="Labelled images; their features vote (k-NN) for those of --eval-test."),
]
EvalTest = Annotated[
    str | None,
    typer.Option(metavar="MANIFEST", help="Labelled images, guessed every eval_every steps; `knn` in the metrics."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Send the metrics to tensorboard, wandb, mlflow, ... as well; repeatable."),
]
Preview = Annotated[
    str | None,
    typer.Option(metavar="FILE.png", help="First draw crops and masks of a dozen images; with --dry-run only that."),
]
RECIPE_HELP = "tiny (small images, CPU), vitl16-short (the paper's), or a TOML file."


@app.callback()
def train() -> None:
    """Manifests in, run folders with trained models out."""


@app.command()
def pretrain(
    manifest: Manifest = None,
    output: Annotated[str, options.output_option("runs/pretrain")] = "runs/pretrain",
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help=f"{RECIPE_HELP} [default: tiny; with --resume the run's own]",
            show_default=False,
        ),
    ] = None,
    assignments: Assignments = None,
    resume: Resume = False,
    init_from: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Start from a run, a weights file or a Hugging Face folder.")
    ] = None,
    eval_train: EvalTrain = None,
    eval_test: EvalTest = None,
    track: Track = None,
    preview: Preview = None,
    num_processes: Processes = 1,
    seed: Seed = None,
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
    from .run import Watching

    config = command_config(TrainConfig, output, recipe, assignments or [], resume=resume, seed=seed)
    shared = Options(config.seed, force, dry_run, limit)
    result = run(
        manifest,
        output,
        config,
        shared,
        resume=resume,
        init_from=init_from,
        num_processes=num_processes,
        watching=Watching(eval_train, eval_test, tuple(track or ()), preview),
    )
    options.emit(result if speaks_for_all() else None, json)


@app.command()
def distill(
    teacher: Annotated[
        str,
        typer.Option(metavar="RUN|WEIGHTS", help="The frozen model that teaches: whatever --model takes."),
    ],
    manifest: Manifest = None,
    output: Annotated[str, options.output_option("runs/distill")] = "runs/distill",
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="The student's architecture; repeated, each student has its run folder in the output. "
            "[default: the recipe's]",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        Literal["heads", "features"] | None,
        typer.Option(
            help="What is learnt: what the teacher's heads say, or, where it has none, its tokens. "
            "[default: the recipe's, or heads]",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help=f"{RECIPE_HELP} [default: the teacher's own; with --resume the run's own]",
            show_default=False,
        ),
    ] = None,
    assignments: Assignments = None,
    resume: Resume = False,
    eval_train: EvalTrain = None,
    eval_test: EvalTest = None,
    track: Track = None,
    preview: Preview = None,
    num_processes: Processes = 1,
    seed: Seed = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    limit: options.Limit = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Train smaller vision transformers to tell apart what a larger, frozen one does, or to have its features."""
    console.set_verbosity(quiet, verbose)
    from ..store.artifact import Options
    from .distill import distill as run
    from .distill import distill_config
    from .launch import speaks_for_all
    from .run import Watching

    config = distill_config(
        output, teacher, arch or [], recipe, assignments or [], objective=objective, resume=resume, seed=seed
    )
    shared = Options(config.seed, force, dry_run, limit)
    result = run(
        manifest,
        output,
        config,
        shared,
        teacher=teacher,
        resume=resume,
        num_processes=num_processes,
        watching=Watching(eval_train, eval_test, tuple(track or ()), preview),
    )
    options.emit(result if speaks_for_all() else None, json)
