"""The errors that end a command with one line instead of a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class ToolkitError(Exception):
    """What is wrong, with the value, and what to do; `cli.main` prints it as one line and exits 1."""


class Stopped(Exception):
    """A signal ended the work after everything was saved; `cli.main` prints it and exits 75, so a scheduler resumes."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" with the known name nearest to an unknown one; nothing where none is near."""
    found = get_close_matches(name, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
