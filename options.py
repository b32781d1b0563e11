"""The options that commands share, the panels that --help shows them in, and how a result is printed."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from . import console, cores

if TYPE_CHECKING:
    from .store.artifact import Result

PANELS = ("Input", "Filters", "Model", "Method", "Output", "Advanced")  # in the order of --help
INPUT, FILTERS, MODEL, METHOD, OUTPUT, ADVANCED = PANELS
MODEL_HELP = "Run folder, weights file, Hugging Face folder, name of pulled weights, random:ARCH, pixels or copy."

T = TypeVar("T")


def option(panel: str, help: str, *names: str, default: str | None = None, **settings: Any) -> Any:
    """Return a typer option in a panel of --help; `default` says in words what is taken where it is left out."""
    if default is not None:
        help, settings = f"{help} [default: {default}]", {"show_default": False, **settings}
    return typer.Option(*names, help=help, rich_help_panel=panel, **settings)


def output_option(default: str) -> Any:
    """Return the -o/--output option; `default` only appears in the help."""
    return option(OUTPUT, "Where the result goes.", "-o", "--output", default=default)


Seed = Annotated[int, option(ADVANCED, "Seed of every random choice.", "--seed")]
Force = Annotated[bool, option(OUTPUT, "Overwrite an output that was made with other settings.", "--force")]
DryRun = Annotated[bool, option(OUTPUT, "Check everything and say what it would do; write nothing.", "--dry-run")]
Limit = Annotated[int | None, option(INPUT, "Read only the first N rows or images.", "--limit", min=1)]
Json = Annotated[bool, option(OUTPUT, "Print the result as one JSON object.", "--json")]
Quiet = Annotated[bool, option(OUTPUT, "Say nothing on stderr but errors.", "-q", "--quiet")]
Verbose = Annotated[int, option(OUTPUT, "Say more on stderr.", "-v", "--verbose", count=True, show_default=False)]
Null = Annotated[bool, option(INPUT, "Names on stdin end in NUL (for find -print0).", "-0", "--null")]
Memory = Annotated[
    str | None,
    option(ADVANCED, "Memory to use, such as 3GB.", "--memory", metavar="SIZE", default="a third of the machine"),
]
Recall = Annotated[
    float,
    option(
        ADVANCED, "Share of the true neighbours that a large search must find; 1 compares all with all.", "--recall"
    ),
]
Where = Annotated[
    str | None,
    option(FILTERS, 'Only rows that fulfil a condition in SQL, such as "width >= 224".', "--where", metavar="SQL"),
]
BatchSize = Annotated[int, option(ADVANCED, "Images that the model sees at a time.", "--batch-size", min=1)]
Threads = Annotated[
    int | None,
    option(
        ADVANCED,
        "Cores to compute on, of every process.",
        "--threads",
        min=1,
        metavar="N",
        default="OMP_NUM_THREADS, else all that it may use",
    ),
]
NumWorkers = Annotated[
    int | None, option(ADVANCED, "Processes that decode images.", "--num-workers", min=1, default="one a core")
]
MaxPixels = Annotated[
    int,
    option(
        FILTERS,
        "Leave out images of more pixels; $DINOV2_MAX_PIXELS for all commands.",
        "--max-pixels",
        min=1,
        metavar="N",
    ),
]
MaxImageBytes = Annotated[
    int,
    option(
        FILTERS,
        "Leave out images whose file or row is larger; $DINOV2_MAX_IMAGE_BYTES for all commands.",
        "--max-image-bytes",
        min=1,
        metavar="N",
    ),
]
ImageTimeout = Annotated[
    float,
    option(
        FILTERS,
        "Leave out images that take longer to decode; $DINOV2_IMAGE_TIMEOUT for all commands.",
        "--image-timeout",
        min=0.1,
        metavar="SECONDS",
    ),
]
SHARED: dict[str, tuple[Any, Any]] = {  # name -> annotation, default
    "limit": (Limit, None),
    "force": (Force, False),
    "dry_run": (DryRun, False),
    "json": (Json, False),
    "quiet": (Quiet, False),
    "verbose": (Verbose, 0),
    "seed": (Seed, 0),
    "threads": (Threads, None),
}


def with_shared(*without: str, **defaults: Any) -> Callable[[Callable[..., "Result | None"]], Callable[..., None]]:
    """Give a command the options that all commands with an output share, and print the result that it returns.

    The command receives them as `shared`, an `Options`. One that it declares itself it gets by its own name instead.
    `without` names shared options that make no sense for the command; `defaults` are others than usual (limit=12).
    """

    def decorate(function: Callable[..., "Result | None"]) -> Callable[..., None]:
        own = dict(inspect.signature(function).parameters)
        del own["shared"]
        keyword = inspect.Parameter.KEYWORD_ONLY
        added = [
            inspect.Parameter(name, keyword, default=defaults.get(name, default), annotation=annotation)
            for name, (annotation, default) in SHARED.items()
            if name not in own and name not in without
        ]

        @wraps(function)
        def command(**values: Any) -> None:
            from .store.artifact import Options

            console.set_verbosity(values.pop("quiet"), values.pop("verbose"))
            as_json = values.pop("json")
            if (threads := values.pop("threads", None)) is not None:
                cores.use_threads(threads)
            shared = {each.name: values.pop(each.name) for each in added if each.name in values}
            emit(function(**values, shared=Options(**shared)), as_json)

        own_by_name = [each.replace(kind=keyword) for each in own.values()]
        parameters = sorted([*own_by_name, *added], key=_panel_number)
        command.__dict__["__signature__"] = inspect.Signature(parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _panel_number(parameter: inspect.Parameter) -> int:
    """Return where --help shows the panel of an option, which is where its first option stands; -1 for an argument."""
    panels = (getattr(info, "rich_help_panel", None) for info in getattr(parameter.annotation, "__metadata__", ()))
    return next((PANELS.index(panel) for panel in panels if panel in PANELS), -1)


def settings_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """Return a settings dataclass from the options of its fields' names: lists as tuples, the default for None."""
    chosen = {field.name: values.get(field.name) for field in fields(kind)}  # type: ignore[arg-type]  # a dataclass
    given = {name: value for name, value in chosen.items() if value is not None}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def help_when_bare(context: typer.Context) -> None:
    """Print the help of a group that is called without a command, and exit with 0."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def emit(result: "Result | None", as_json: bool) -> None:
    """Print a result on stdout: one line, a path or a value, or one JSON object; nothing after a dry run."""
    if result is None:
        return
    if as_json:
        value = {} if result.value is None else {"value": result.value}
        print(json.dumps({"output": result.output, **value, **result.figures}))
    else:
        print(result.output if result.value is None else f"{result.value:.{result.digits}f}")
