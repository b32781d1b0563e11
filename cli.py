"""The `dinov2` command: mounts the groups, and turns every failure a user can cause into one line and an exit code."""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import console, options
from .curate.cli import app as curate
from .errors import Stopped, ToolkitError
from .evaluate.cli import app as evaluate
from .manage.cli import app as catalog
from .manage.cli import export, models
from .report.cli import report
from .train.cli import app as train

# Typer carries its own copy of click, whose general exceptions it does not export by name.
UsageError: Any = typer.BadParameter.__bases__[0]
ClickException: Any = UsageError.__bases__[0]

EXIT_ERROR, EXIT_USAGE, EXIT_STOPPED, EXIT_INTERRUPTED = 1, 2, 75, 130


class InOrder(TyperGroup):
    """Lists the commands in the order in which a project uses them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names for --help."""
        return ["curate", "train", "evaluate", "report", "export", "models", "catalog"]


app = typer.Typer(cls=InOrder, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.add_typer(curate, name="curate")
app.add_typer(train, name="train")
app.add_typer(evaluate, name="evaluate")
app.command()(report)
app.command()(export)
app.add_typer(models, name="models")
app.add_typer(catalog, name="catalog")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("dinov2-toolkit"))
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Curate images, train DINOv2 vision transformers on them, distil them, and measure the features."""
    options.help_when_bare(context)


def main() -> None:
    """Run the command line; exits with 0, 1 (ToolkitError), 2 (usage), 75 (stopped, resumable) or 130 (Ctrl-C)."""
    code = EXIT_ERROR
    try:
        returned = app(standalone_mode=False)
        sys.stdout.flush()
        if returned == EXIT_INTERRUPTED:  # newer Typer turns Ctrl-C into this code, older into Abort
            raise KeyboardInterrupt
        code = returned or 0
    except BrokenPipeError:  # the reader of a pipe has gone, as in `dinov2 ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except UsageError as problem:
        where = problem.ctx.command_path if problem.ctx else "dinov2"
        console.error(f"{problem.format_message().rstrip('.')}; see `{where} --help`")
        code = EXIT_USAGE
    except ClickException as problem:
        console.error(problem.format_message())
    except ToolkitError as problem:
        console.error(str(problem))
    except OSError as problem:  # a full disk, a folder without permission
        name = f": {problem.filename}" if problem.filename else ""
        console.error(f"{problem.strerror or problem}{name}")
    except Stopped as problem:
        console.say(str(problem))
        code = EXIT_STOPPED
    except (KeyboardInterrupt, typer.Abort):
        console.error("interrupted; nothing more was saved")
        code = EXIT_INTERRUPTED
    sys.exit(code)
