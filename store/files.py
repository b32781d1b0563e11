"""Files that are opened without waiting, and replaced whole: a reader sees the old content or the new, never half.

What is not whole yet stands beside its place as `.dinov2-HOST-PID-NUMBER.tmp`. A process that is killed leaves it
behind; the next one that writes into that folder removes it.
"""

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import ToolkitError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
HOST = re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:64]
TEMPORARY = re.compile(r"\.dinov2-(\w+)-(\d+)-\d+\.tmp")
ABANDONED_S = 7 * 24 * 3600.0  # chosen: nobody writes for a week without touching the file

_swept: set[Path] = set()  # folders, by this process


class NotRegularError(OSError):
    """Something that is no file of bytes, and would block or give no end of them; `strerror` says what it is."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file to read its bytes, without waiting for what is no regular file.

    Raises NotRegularError when it is none, OSError when it cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would wait for a writer
    try:
        mode = os.fstat(file).st_mode
        if not stat.S_ISREG(mode):
            raise NotRegularError(errno.EINVAL, _kind(mode), str(path))
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def check_regular(path: Path) -> Path:
    """Return a path; ToolkitError where it is a named pipe, socket or device, which others would wait for.

    A folder or nothing at all is for the caller to find.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ToolkitError(f"{path} is {_kind(mode)}, not a regular file; name a file")
    return path


def _kind(mode: int) -> str:
    return next((name for is_kind, name in KINDS if is_kind(mode)), "something else")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; when the block ends, flush that file and rename it to `path`.

    The folder is made where it is missing. When the block raises, the temporary file is removed and `path` stays as it
    was. Raises OSError when the disk refuses.
    """
    with temporary_beside(path) as temporary:
        try:
            yield temporary
            flush(temporary)
        except OSError as problem:
            if problem.filename is None and problem.errno in (errno.ENOSPC, errno.EDQUOT):
                problem.filename = str(path)
            raise
        os.replace(temporary, path)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a free name for a file or folder beside `path`; what still stands there when the block ends is removed."""
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    if folder.absolute() not in _swept:
        _swept.add(folder.absolute())
        sweep(folder)
    temporary = folder / temporary_name()
    try:
        yield temporary
    finally:
        remove(temporary)


def temporary_name() -> str:
    """Return a name that nobody can guess, and by which it is removed when this process is killed."""
    return f".dinov2-{HOST}-{os.getpid()}-{secrets.randbits(64)}.tmp"


def is_temporary(name: str) -> bool:
    """Tell whether a file's name is one that `temporary_name` gave, in whatever process."""
    return TEMPORARY.fullmatch(name) is not None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Write a file, or a folder's entries, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that processes of this toolkit left in a folder when they were killed.

    Those of a process that lives stay, and those of other machines until they are a week old.
    """
    for left in abandoned(folder):
        remove(left)


def abandoned(folder: Path) -> list[Path]:
    """Return what `sweep` removes from a folder."""
    found = [(folder / name, TEMPORARY.fullmatch(name)) for name in os.listdir(folder)]
    return [path for path, made in found if made is not None and _is_abandoned(path, made[1], int(made[2]))]


def _is_abandoned(temporary: Path, host: str, process: int) -> bool:
    with suppress(OSError):
        if time.time() - temporary.lstat().st_mtime > ABANDONED_S:
            return True
    if host != HOST or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # of another user
        pass
    return False


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, where there is one."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
