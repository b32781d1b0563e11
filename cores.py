"""The cores that a command computes on, and how its threads wait; set before libraries that compute are imported.

Torch, FAISS, Arrow and NumPy's BLAS take as many threads as OMP_NUM_THREADS says.
"""

import math
import os
import re
import sys

from .store.memory import cgroup_values

THREADS = "OMP_NUM_THREADS"
# Threads wait for one another at the end of every parallel loop. By default they spin there for milliseconds, and where
# other programs keep the cores busy, the one that is waited for does not run: a step of training takes ten times as
# long or more (benchmarks/results/busy.md). So they sleep after some microseconds.
WAITING = {
    "GOMP_SPINCOUNT": "1000",  # turns of a loop; what libgomp takes itself where threads are more than cores
    "KMP_BLOCKTIME": "1",  # milliseconds; of the OpenMP of LLVM and Intel
    "OPENBLAS_THREAD_TIMEOUT": "10",  # 2^10 cycles; by default 2^26
}

_asked: int | None = None  # by --threads
_given = os.environ.get(THREADS)  # by the user


def prepare() -> None:
    """Set what libraries read when they are loaded; what the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault(THREADS, str(usable_cores()))


def use_threads(count: int) -> None:
    """Compute with so many threads from now on."""
    global _asked
    _asked = count
    os.environ[THREADS] = str(count)
    if "torch" in sys.modules:  # which has read the variable
        sys.modules["torch"].set_num_threads(count)


def threads_of_each(num_processes: int) -> str:
    """Return OMP_NUM_THREADS for processes to be started: as it was given, else their shares of the cores."""
    return str(_asked) if _asked else _given or str(max(1, usable_cores() // num_processes))


def usable_cores() -> int:
    """Return on how many cores this process may compute: its share of those of the machine, at most --threads."""
    every = os.cpu_count() or 1
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    local = _leading_number("LOCAL_WORLD_SIZE")  # of our launcher and torchrun
    if bound == every:  # srun often binds each process to cores of its own
        local = max(local, _leading_number("SLURM_NTASKS_PER_NODE"))  # such as 4(x2): on each of two nodes
    count = max(1, int(min(bound, cgroup_quota()) // local))
    return count if _asked is None else min(count, _asked)


def _leading_number(variable: str) -> int:
    """Return the number that an environment variable begins with, 1 where there is none or it is 0."""
    digits = re.match(r"[0-9]*", os.environ.get(variable, ""))
    return max(1, int(digits[0])) if digits and digits[0] else 1


def cgroup_quota() -> float:
    """Return how many cores' time the kernel gives to this process, as in a container; infinite if it sets no limit."""
    values = [value.partition(" ") for value in cgroup_values("cpu", "cpu.max", "cpu.cfs_quota_us")]
    # Quota and period; v1 has the period in another file, and this is the usual one. No limit is "max" or -1.
    return min([math.inf, *(int(quota) / int(period or 100_000) for quota, _, period in values if quota.isdigit())])
