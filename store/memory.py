"""How much memory a step may take."""

import os
import re
from contextlib import suppress
from pathlib import Path

from ..errors import ToolkitError

SHARE = 3  # a step takes a third of the machine unless told otherwise
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SMALLEST = 256 << 20  # below this, no block would be large enough to work on
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


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
    limits = cgroup_values("memory", "memory.max", "memory.limit_in_bytes")
    return min([total, *(int(limit) for limit in limits if limit.isdigit())])


def cgroup_values(controller: str, name: str, old_name: str) -> list[str]:
    """Return what a file says in the control groups of this process, from its own up to the root: `old_name` in v1."""
    values = []
    with suppress(OSError):  # not Linux
        for line in OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = CGROUPS / controller if controllers else CGROUPS
            own = root / path.strip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(root) and (file := folder / (old_name if controllers else name)).is_file():
                    values.append(file.read_text().strip())
    return values


def free_memory() -> int:
    """Return the bytes that are free, in the container too where there is one."""
    free = machine_memory()
    used = cgroup_values("memory", "memory.current", "memory.usage_in_bytes")
    if used and used[0].isdigit():
        free = max(free - int(used[0]), 0)
    with suppress(OSError):
        if available := re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text()):
            free = min(int(available[1]) * 1_024, free)
    return free
