"""--memory sizes, and memory that is kept."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.store import memory
from dinov2_toolkit.store.memory import TidyHeap, machine_memory, memory_budget


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("3GB", 3 << 30), ("3GiB", 3 << 30), ("3g", 3 << 30), ("1.5G", 3 << 29), ("800 MB", 800 << 20), ("1T", 1 << 40)],
)
def test_a_size_is_read_in_units_of_1024(size: str, num_bytes: int) -> None:
    assert memory_budget(size) == num_bytes


def test_left_out_it_is_a_third_of_the_machine() -> None:
    assert memory_budget(None) == machine_memory() // 3


@pytest.mark.parametrize("size", ["", "much", "3 GBs", "-1G", "1e9", "nan"])
def test_what_is_no_size_is_an_error_that_shows_it(size: str) -> None:
    with pytest.raises(ToolkitError, match=f"--memory {size} is no size"):
        memory_budget(size)


def test_too_little_is_an_error() -> None:
    with pytest.raises(ToolkitError, match="256MB or more"):
        memory_budget("100MB")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    faults_of_the_second = """
import numpy, resource
from dinov2_toolkit.store.memory import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
numpy.ones(1 << 22)  # 32 MiB, 8,192 pages
before = faults()
numpy.ones(1 << 22)
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", faults_of_the_second], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_what_was_kept_is_given_back_when_asked_for() -> None:
    resident_mib_before_and_after = """
import numpy, pathlib
from dinov2_toolkit.store.memory import give_back_freed_memory, keep_freed_memory
resident = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) >> 8
keep_freed_memory()
arrays = [numpy.ones(1 << 20) for _ in range(32)]  # 256 MiB
last = arrays.pop()  # holds the end of the heap
del arrays
print(resident())
give_back_freed_memory()
print(resident())
"""
    done = subprocess.run(
        [sys.executable, "-c", resident_mib_before_and_after], capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before - after > 200


def test_a_heap_that_has_grown_by_a_tenth_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[None] = []
    monkeypatch.setattr(memory, "STATM", tmp_path / "statm")
    monkeypatch.setattr(memory, "give_back_freed_memory", lambda: times.append(None))
    heap = TidyHeap()
    heap.after_step()  # nothing tells how much it is
    given_back = []
    for step, pages in enumerate([100, 90, 109, 111, 150, 164, 166, 80, 87, 89]):
        (tmp_path / "statm").write_text(f"9999 {pages} 5 1 0 3 0\n")
        before = len(times)
        heap.after_step()
        given_back += [step] * (len(times) - before)
    assert given_back == [3, 6, 9]
