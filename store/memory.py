"""How much memory a step may take."""

import os
import re
from pathlib import Path

from ..errors import ToolkitError

SHARE = 3  # a step takes a third of the machine unless told otherwise
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SMALLEST = 256 << 20  # below this, no block would be large enough to work on
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


def machine_memory() -> int:
    """Return the memory of the machine in bytes, or of the container where that has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in CGROUP_LIMITS:
        if limit.exists() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total
