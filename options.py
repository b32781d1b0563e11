"""The options that commands share, and how a result is printed."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from .store.artifact import Result

Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an output that was made otherwise.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and say what it would do; write nothing.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Read only the first N rows or images.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing on stderr but errors.")]
Verbose = Annotated[int, typer.Option("-v", "--verbose", count=True, help="Say more on stderr.")]
Null = Annotated[bool, typer.Option("-0", "--null", help="Names on stdin end in NUL (for find -print0).")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="How much memory to take, such as 3GB. [default: a third of the machine]",
        show_default=False,
    ),
]
Recall = Annotated[
    float,
    typer.Option(
        "--recall", help="Share of the true neighbours that a search of many images must find; 1 compares all with all."
    ),
]
Where = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="SQL",
        help='Only rows that fulfil a condition over the manifest\'s columns, such as "width >= 224".',
        show_default=False,
    ),
]


def output_option(default: str) -> typer.models.OptionInfo:
    """Return the -o/--output option; `default` only appears in the help."""
    help_text = f"Where the result goes. [default: {default}]"
    option: typer.models.OptionInfo = typer.Option("-o", "--output", help=help_text, show_default=False)
    return option


def emit(result: "Result | None", as_json: bool) -> None:
    """Print a result on stdout: one line, a path or a value, or one JSON object; nothing after a dry run."""
    if result is None:
        return
    if as_json:
        value = {} if result.value is None else {"value": result.value}
        print(json.dumps({"output": result.output, **value, **result.figures}))
    else:
        print(result.output if result.value is None else f"{result.value:.{result.digits}f}")
