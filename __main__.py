"""The `dinov2` command, `python -m dinov2_toolkit`, and what `features.launch` starts."""

from . import console, cores, process
from .errors import ToolkitError


def main() -> None:
    """Run the command line and exit; a signal ends it in one line, even while modules are imported."""
    process.prepare()
    cores.prepare()
    try:
        process.check_environment()
        from .cli import run

        code = run()
        process.end_at_signals()
    except ToolkitError as problem:  # of the environment, which is read while modules are imported
        console.error(str(problem))
        code = 1
    except BaseException:
        if process.received:
            process.end_interrupted()
        raise
    raise SystemExit(code)


if __name__ == "__main__":
    main()
