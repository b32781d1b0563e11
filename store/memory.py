"""How much memory a step may take."""

import ctypes
import os
import re
from pathlib import Path

from ..errors import ToolkitError

SHARE = 3  # a step takes a third of the machine unless told otherwise
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SMALLEST = 256 << 20  # below this, no block would be large enough to work on
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
KEPT_BYTES = 64 << 20  # chosen: what is larger leaves holes that nothing else fits in, and is given back
GROWTH = 1.1  # chosen: of what a process holds, before freed memory is given back
STATM = Path("/proc/self/statm")  # its second number: resident pages
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def memory_budget(size: str | None) -> int:
    """Return a --memory SIZE such as 3GB, 3GiB or 800M in bytes (units of 1,024); None means a third of the machine.

    Raises ToolkitError when it is no size, or less than 256M.
    """
    if size is None:
        return max(machine_memory() // SHARE, SMALLEST)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", size.strip(), re.IGNORECASE)
    if match is None:
        raise ToolkitError(f"--memory {size} is no size; give such as 3GB or 800MB")
    budget = int(float(match[1]) * UNITS[match[2].upper()])
    if budget < SMALLEST:
        raise ToolkitError(f"--memory {size} is too little to work in; give 256MB or more")
    return budget


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation; without glibc, do nothing.

    By itself it gives every large tensor back and asks for it anew, and the kernel clears each page again: measured,
    some percent of a training step on a CPU. The peak grows by some percent as well. All threads take from one arena,
    or what one has freed would not serve another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (M_MMAP_THRESHOLD, KEPT_BYTES),
            (M_TRIM_THRESHOLD, 2**31 - 1),
            (M_ARENA_MAX, 1),
        ):
            mallopt(parameter, value)


def give_back_freed_memory() -> None:
    """Let glibc return to the machine what is freed, holes between what is in use too; without glibc, do nothing."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


class TidyHeap:
    """Keeps what freed memory leaves behind from growing, in a loop whose steps allocate much the same.

    Sizes that change a little from step to step, and two threads at once, leave holes that the next step does not quite
    fit in, so that it takes other pages: in some hundred steps half as much again. What is given back is cleared anew,
    some percent of a step; so that is done when the process has grown by a tenth since the step after the last time.
    """

    def __init__(self) -> None:
        self._limit: float | None = None  # bytes

    def after_step(self) -> None:
        """Look at what the process holds; without /proc, do nothing."""
        if not STATM.exists():
            return
        resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if self._limit is None:
            self._limit = GROWTH * resident
        elif resident > self._limit:
            give_back_freed_memory()
            self._limit = None


def machine_memory() -> int:
    """Return the memory of the machine in bytes, or of the container where that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in CGROUP_LIMITS:
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total
