"""Arrays in files (.npy), mapped: their space is taken before they are written, and damaged ones are made anew."""

import errno
import os
import time
import tokenize
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .. import console
from ..errors import ToolkitError
from .files import remove

ZEROS = bytes(1 << 20)
SEALED_NS = 1_000_000_000 * 10**9  # in 2001; whole even seconds, which every file system keeps
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Array = npt.NDArray[Any]


def new_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Array:
    """Return a new .npy file as a mapped array of zeros, whose space on the disk is taken already.

    Writing through a map to a hole would end the process without a word (SIGBUS) when the disk is full.
    Raises ToolkitError when there is no room for it.
    """
    array: Array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
    with path.open("r+b") as file:
        allocate(file.fileno(), path.stat().st_size, path.parent)
    return array


def seal(path: Path) -> None:
    """Give a finished array the time stamp by which it is known; whatever writes to it later moves that.

    So garbage of the right size is found without reading it. When it was used last is its access time.
    """
    os.utime(path, ns=(time.time_ns(), SEALED_NS))


def kept_array(
    path: Path, dtype: npt.DTypeLike, shape: tuple[int | None, ...], mode: Literal["r", "r+"] = "r"
) -> Array | None:
    """Return an array that was kept in the cache, mapped; None where there is none. Of a `shape`, None is any length.

    One of another type, shape or length is damaged: it is removed, and said. So is one that was written to after it was
    sealed; those that are opened to be written to ("r+") are not.
    """
    if not path.exists():
        return None
    if not path.is_file() or (mode == "r" and path.stat().st_mtime_ns != SEALED_NS):
        discard(path)
        return None
    try:
        array: Array = np.lib.format.open_memmap(path, mode)
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError):  # what NumPy raises of headers
        array = np.empty(0)
    wanted = tuple(
        own if any_length is None else any_length for own, any_length in zip(array.shape, shape, strict=False)
    )
    if array.dtype == np.dtype(dtype) and array.ndim == len(shape) and array.shape == wanted:
        if mode == "r":
            seal(path)
        return array
    discard(path)
    return None


def discard(path: Path) -> None:
    """Remove a damaged file of the cache, and say so."""
    console.warn(f"{path} is damaged; it is made again")
    remove(path)


def allocate(file: int, num_bytes: int, folder: Path) -> None:
    """Take the space of an open file in a folder on the disk. Raises ToolkitError when there is no room for it."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, max(num_bytes, 1))
        else:  # macOS
            for start in range(os.fstat(file).st_size, num_bytes, len(ZEROS)):
                os.pwrite(file, ZEROS[: num_bytes - start], start)
    except OSError as problem:
        if problem.errno not in NO_SPACE:
            raise
        raise ToolkitError(
            f"no space left in {folder} for {num_bytes / 1e6:,.0f} MB; make room, or set DINOV2_CATALOG to a file on"
            " another disk, beside which the cache is kept"
        ) from None
