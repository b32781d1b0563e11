"""Files that are opened without waiting, and replaced whole.

A reader sees the old content or the new, never half of either.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
