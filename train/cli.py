"""dinov2 train: manifests in, run folders out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import options
from ..options import ADVANCED, INPUT, METHOD, MODEL, MODEL_HELP, OUTPUT, option

if TYPE_CHECKING:
    from ..store.artifact import Options, Result

app = typer.Typer(
    invoke_without_command=True,
    callback=options.help_when_bare,
    help="Manifests in, run folders with trained models out.",
)

Manifest = Annotated[
    Path | None,
    typer.Argument(metavar="[MANIFEST]", help="Images, one a row. [default: the newest pool]", show_default=False),
]
Recipe = Annotated[
    str | None,
    option(
        METHOD,
        "tiny (small images, CPU), vitl16-short (the paper's), or a TOML file.",
        metavar="NAME|FILE",
        default="tiny, for distill the teacher's own; with --resume the run's own",
    ),
]
Assignments = Annotated[
    list[str] | None, option(METHOD, "Change a setting of the recipe; repeatable.", "--set", metavar="KEY=VALUE")
]
Resume = Annotated[bool, option(OUTPUT, "Go on from the latest checkpoint, if any.", "--resume")]
Processes = Annotated[int, option(ADVANCED, "Processes to start on this machine.", min=1)]
Seed = Annotated[int | None, option(ADVANCED, "Seed of every random choice.", default="the recipe's")]
EvalTrain = Annotated[
    str | None,
    option(INPUT, "Labelled images; their features vote (k-NN) for those of --eval-test.", metavar="MANIFEST"),
]
EvalTest = Annotated[
    str | None,
    option(INPUT, "Labelled images, classified every eval_every steps; `knn` in the metrics.", metavar="MANIFEST"),
]
EvalShare = Annotated[
    float | None,
    option(
        INPUT,
        "Instead, classify this share of MANIFEST's labelled images by the others.",
        metavar="SHARE",
        min=0.0,
        max=0.9,
    ),
]
Track = Annotated[
    list[str] | None,
    option(OUTPUT, "Send the metrics to tensorboard, wandb, mlflow, ... as well; repeatable.", metavar="NAME"),
]
Preview = Annotated[
    str | None,
    option(OUTPUT, "First draw crops and masks of a dozen images; with --dry-run only that.", metavar="FILE.png"),
]
Profile = Annotated[
    int, option(OUTPUT, "Write a torch trace of that many steps into the run folder.", metavar="STEPS", min=0)
]


@app.command()
@options.with_shared()
def pretrain(
    manifest: Manifest = None,
    output: Annotated[str, options.output_option("runs/pretrain")] = "runs/pretrain",
    recipe: Recipe = None,
    assignments: Assignments = None,
    init_from: Annotated[
        str | None, option(MODEL, "Start from a run, a weights file or a Hugging Face folder.", metavar="MODEL")
    ] = None,
    eval_train: EvalTrain = None,
    eval_test: EvalTest = None,
    eval_share: EvalShare = None,
    resume: Resume = False,
    track: Track = None,
    preview: Preview = None,
    profile: Profile = 0,
    num_processes: Processes = 1,
    seed: Seed = None,
    *,
    shared: "Options",
) -> "Result | None":
    """Train a vision transformer by DINOv2's objective, from nothing or from other weights."""
    from ..features.launch import prints_result
    from .config import TrainConfig, command_config
    from .launch import ending_together
    from .pretrain import pretrain as run
    from .run import LaunchOptions, MonitorOptions

    with ending_together():
        config = command_config(TrainConfig, output, recipe, assignments or [], resume=resume, seed=seed)
        monitor = MonitorOptions(eval_train, eval_test, eval_share, tuple(track or ()), preview, profile)
        launch: LaunchOptions = {"resume": resume, "num_processes": num_processes, "monitor": monitor}
        result = run(manifest, output, config, shared, init_from=init_from, **launch)
    return result if prints_result() else None


@app.command()
@options.with_shared()
def distill(
    teacher: Annotated[str, option(MODEL, f"The frozen model that teaches. {MODEL_HELP}", metavar="RUN|WEIGHTS")],
    manifest: Manifest = None,
    output: Annotated[str, options.output_option("runs/distill")] = "runs/distill",
    arch: Annotated[
        list[str] | None,
        option(MODEL, "The student's architecture; repeatable, a run folder for each.", default="the recipe's"),
    ] = None,
    objective: Annotated[
        Literal["heads", "features"] | None,
        option(METHOD, "Learn the teacher's prototype probabilities, or its tokens.", default="the recipe's, or heads"),
    ] = None,
    recipe: Recipe = None,
    assignments: Assignments = None,
    eval_train: EvalTrain = None,
    eval_test: EvalTest = None,
    eval_share: EvalShare = None,
    resume: Resume = False,
    track: Track = None,
    preview: Preview = None,
    profile: Profile = 0,
    num_processes: Processes = 1,
    seed: Seed = None,
    *,
    shared: "Options",
) -> "Result | None":
    """Train smaller vision transformers to give the outputs of a larger, frozen one."""
    from ..features.launch import prints_result
    from .distill import distill as run
    from .distill import distill_config
    from .launch import ending_together
    from .run import LaunchOptions, MonitorOptions

    with ending_together():
        config = distill_config(
            output, teacher, arch or [], recipe, assignments or [], objective=objective, resume=resume, seed=seed
        )
        monitor = MonitorOptions(eval_train, eval_test, eval_share, tuple(track or ()), preview, profile)
        launch: LaunchOptions = {"resume": resume, "num_processes": num_processes, "monitor": monitor}
        result = run(manifest, output, config, shared, teacher=teacher, **launch)
    return result if prints_result() else None
