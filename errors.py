"""The errors that end a command with one line instead of a traceback."""


class ToolkitError(Exception):
    """What is wrong, with the value, and what to do; `cli.main` prints it as one line and exits 1."""


class Stopped(Exception):
    """A signal ended the work after everything was saved; `cli.main` prints it and exits 75, so a scheduler resumes."""
