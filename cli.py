"""The `dinov2` command: mounts the groups, and turns every failure a user can cause into one line and an exit code."""

import os
import re
import select
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import console, options, process
from .curate.cli import app as curate
from .errors import Stopped, ToolkitError
from .evaluate.cli import app as evaluate
from .manage.cli import app as catalog
from .manage.cli import doctor, export, models
from .report.cli import report
from .train.cli import app as train

# Typer carries its own copy of click, whose general exceptions it does not export by name.
UsageError: Any = typer.BadParameter.__bases__[0]
ClickException: Any = UsageError.__bases__[0]

EXIT_ERROR, EXIT_USAGE, EXIT_STOPPED = 1, 2, 75
OUT_OF_MEMORY = re.compile(
    "OutOfMemory|Cannot allocate memory|can't allocate memory|failed to map segment|bad_alloc|start new thread"
)
DISK_FULL = re.compile("No space left on device|Disk quota exceeded|could not write all bytes")


class InOrder(TyperGroup):
    """Lists the commands in the order in which a project uses them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names for --help."""
        return ["curate", "train", "evaluate", "report", "export", "models", "catalog", "doctor"]


app = typer.Typer(cls=InOrder, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.add_typer(curate, name="curate")
app.add_typer(train, name="train")
app.add_typer(evaluate, name="evaluate")
app.command()(report)
app.command()(export)
app.add_typer(models, name="models")
app.add_typer(catalog, name="catalog")
app.command()(doctor)


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
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from; goes anywhere.")] = False,
) -> None:
    """Curate images, train DINOv2 vision transformers on them, distil them, and measure the features."""
    options.help_when_bare(context)


def main() -> None:
    """Run the command line in a process of its own, and exit."""
    from .__main__ import main as run_prepared

    run_prepared()


def run() -> int:
    """Run the command line of `sys.argv` and return its exit code; whatever goes wrong is one line on stderr.

    0: done. 1: an error. 2: a wrong command line. 75: stopped by a signal, resumable. 130: interrupted.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != process.DEBUG]
    try:
        code = _called(arguments)
        sys.stdout.flush()
        return code
    except BaseException as problem:
        if process.is_debugging() and not isinstance(problem, SystemExit):
            traceback.print_exception(problem)
        return _told(problem)


def _called(arguments: list[str]) -> int:
    """Call the command that the arguments name. Typer's own `main` would turn errors into others, and print some."""
    command: Any = typer.main.get_command(app)
    command._main_shell_completion({}, "dinov2")
    try:
        with command.make_context("dinov2", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return int(end.exit_code)
    return 0


def _told(problem: BaseException) -> int:
    """Say in one line what went wrong and what to do, and return the exit code."""
    again = "run the same command again"
    match problem:
        case BrokenPipeError() if _has_no_reader(1):  # as in `dinov2 ... | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 0
        case SystemExit(__context__=BrokenPipeError()):  # which Rich makes of it
            return 0
        case SystemExit():
            return int(problem.code or 0)
        case Stopped():
            if str(problem):
                console.say(str(problem))
            return EXIT_STOPPED
        case _ if process.received or isinstance(problem, KeyboardInterrupt):
            if process.is_main_process():
                console.error(process.interrupted())
            return process.EXIT_INTERRUPTED
        case UsageError():
            where = problem.ctx.command_path if problem.ctx else "dinov2"
            console.error(f"{_one_line(problem.format_message()).rstrip('.')}; see `{where} --help`")
            return EXIT_USAGE
        case ClickException():
            console.error(_one_line(problem.format_message()))
        case ToolkitError():
            console.error(str(problem))
        case _ if isinstance(problem, MemoryError) or _mentions(problem, OUT_OF_MEMORY):
            console.error(f"out of memory{_reason(problem)}; make some free, or give a smaller --memory or batch size")
        case _ if _mentions(problem, DISK_FULL):
            console.error(f"the disk is full{_file(problem)}; make room and {again}")
        case OSError() if problem.errno is not None:  # such as a folder without permission
            console.error(f"{problem.strerror or problem}{_file(problem)}; mend that and {again}")
        case UnicodeError():
            console.error(f"a name is not UTF-8 ({_one_line(str(problem))}); rename the file or folder")
        case _:
            what = f"unexpected {type(problem).__name__}{_reason(problem)}{_place(problem)}"
            console.error(f"{what}; this is a fault of the toolkit: report it with what --debug shows")
    return EXIT_ERROR


def _has_no_reader(file: int) -> bool:
    """Tell whether an open file is a pipe at whose other end nobody is any more."""
    poll = select.poll()
    poll.register(file, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _mentions(problem: BaseException, words: re.Pattern[str]) -> bool:
    """Tell whether the text of an error has these words; libraries have no common type for memory and disks."""
    return not isinstance(problem, ToolkitError) and words.search(f"{type(problem).__name__}: {problem}") is not None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _reason(problem: BaseException) -> str:
    text = _one_line(str(problem))
    return f" ({text[:300]})" if text else ""


def _file(problem: BaseException) -> str:
    name = getattr(problem, "filename", None)
    return f": {os.fsdecode(name)}" if isinstance(name, str | bytes | os.PathLike) else ""


def _place(problem: BaseException) -> str:
    """Return the last line of ours that an error passed."""
    home = os.path.dirname(__file__)
    ours = [frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename.startswith(home)]
    return f" at {os.path.relpath(ours[-1].filename, home)}:{ours[-1].lineno}" if ours else ""
