"""A file that one process at a time holds."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import ToolkitError


@contextmanager
def held(lock: Path, doing: str) -> Iterator[None]:
    """Hold a lock, a file that is made when missing and stays; it is let go when the process ends, however it does.

    Raises ToolkitError when another process has it; `doing` says what that does, such as "writing pool.parquet".
    """
    with lock.open("w") as file:
        if not try_lock(file.fileno()):
            raise ToolkitError(f"another process is {doing}; wait for it, or end it")
        yield


def is_held(lock: Path) -> bool:
    """Tell whether a process holds a lock."""
    if not lock.exists():
        return False
    with lock.open() as file:
        return not try_lock(file.fileno(), fcntl.LOCK_SH)


def try_lock(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file or folder until it is closed; return False where another process has it."""
    with suppress(OSError):  # a network file system without locks
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
