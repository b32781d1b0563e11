"""A file that one process at a time holds."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import ToolkitError

FLAGS = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC  # changes nothing that stands there


@contextmanager
def held(lock: Path, doing: str) -> Iterator[None]:
    """Hold a lock, a file that is made when missing and stays; it is let go when the process ends, however it does.

    Raises ToolkitError when another process has it; `doing` says what that does, such as "writing pool.parquet".
    """
    file = os.open(lock, FLAGS, 0o644)
    try:
        if not try_lock(file):
            raise ToolkitError(f"another process is {doing}; wait for it, or end it")
        yield
    finally:
        os.close(file)


@contextmanager
def writing(*outputs: Path) -> Iterator[None]:
    """Hold the right to write some outputs: `.NAME.lock` beside each, removed when the block ends.

    A folder in which no lock can be made cannot be written to either; then there is none.
    Raises ToolkitError when another process writes one of them.
    """
    with ExitStack() as stack:
        for output in outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
            lock = output.with_name(f".{output.name}.lock")
            with suppress(PermissionError):
                while True:
                    file = os.open(lock, FLAGS, 0o644)
                    stack.callback(os.close, file)
                    if not try_lock(file):
                        raise ToolkitError(f"another process is writing {output}; wait for it, or end it")
                    if _is_at(file, lock):  # else who had it has just removed it
                        if not os.fstat(file).st_size:  # else it is somebody's file by that name
                            stack.callback(lock.unlink, missing_ok=True)
                        break
        yield


def _is_at(file: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def is_held(lock: Path) -> bool:
    """Tell whether a process holds a lock."""
    try:
        file = os.open(lock, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not try_lock(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


def try_lock(file: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file or folder until it is closed; return False where another process has it."""
    with suppress(OSError):  # a network file system without locks
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
