"""A file that one process at a time holds."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import console
from ..errors import ToolkitError


@contextmanager
def held(lock: Path, doing: str) -> Iterator[None]:
    """Hold a lock, a file that is made when missing and stays; it is let go when the process ends, however it does.

    Raises ToolkitError when another process has it; `doing` says what that does, such as "writing pool.parquet".
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolkitError(f"another process is {doing}; wait for it, or end it") from None
        except OSError as problem:  # a network file system without locks
            console.detail(f"{lock} cannot be locked: {problem.strerror}")
        yield


def is_held(lock: Path) -> bool:
    """Tell whether a process holds a lock."""
    if not lock.exists():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
