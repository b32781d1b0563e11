"""What `doctor` finds of GPUs, cores, memory and the folders that commands write to."""

import fcntl
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any  # of values that came as JSON

from ..cores import cgroup_quota
from ..errors import ToolkitError
from ..store.files import temporary_name
from ..store.memory import SHARE, free_memory, machine_memory
from ..store.places import cache_path, catalog_path, weights_folder

GIB = 1 << 30
LEAST_FREE = GIB  # chosen: of a disk
FEW_FILES = 1_024  # chosen: each process that decodes images has a socket and a file open
NETWORK = re.compile(r"nfs4?|cifs|smb\w+|lustre|gpfs|beegfs|ceph|glusterfs|9p|afs|panfs|wekafs|orangefs|fuse\..+")
NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    found: str
    warning: str = ""  # what to do
    problem: str = ""  # what to do, where commands cannot work as it is
    figures: Mapping[str, object] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """Return ok, warning or problem."""
        return "problem" if self.problem else "warning" if self.warning else "ok"

    @property
    def to_do(self) -> str:
        """Return what to do, nothing where all is well."""
        return self.problem or self.warning


def gpu_findings(torch: dict[str, Any] | str, faiss: dict[str, Any] | str) -> Iterator[Finding]:
    """Yield what torch and FAISS find of GPUs, where they load."""
    if isinstance(torch, str):
        return
    driver = NVIDIA.read_text() if NVIDIA.is_file() else ""
    release = re.search(r"\d+(\.\d+)+", driver)
    for index, gpu in enumerate(torch["devices"]):
        found = f"{gpu['name']}, {gpu['free_bytes'] / GIB:.1f} GiB free of {gpu['total_bytes'] / GIB:.1f}"
        found += f", CUDA {torch['cuda']}" + (f", driver {release[0]}" if release else "")
        to_do = ""
        if gpu["free_bytes"] < gpu["total_bytes"] / 2:
            to_do = "others use it: end them, or choose another by CUDA_VISIBLE_DEVICES"
        if not gpu["bfloat16"]:
            found += ", no bfloat16: models compute in float16"
        yield Finding(f"GPU {index}", found, to_do, figures=gpu)
    if torch["devices"] and isinstance(faiss, dict) and not faiss["gpus"]:
        yield Finding("FAISS on GPUs", "it finds none, and torch searches there", "pip install faiss-gpu")
    if not torch["devices"]:
        found, to_do = "none, all runs on the CPU", ""
        if driver and os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
            found, to_do = "hidden by CUDA_VISIBLE_DEVICES", "unset it to use the GPU"
        elif driver and torch["cuda"] is None:
            found, to_do = "this torch was built without CUDA", "install one for CUDA, see pytorch.org/get-started"
        elif driver:
            found, to_do = f"torch cannot use it ({torch['reason']})", "update the driver, or install another torch"
        yield Finding("GPU", found, to_do)
    yield Finding("CPU", torch["cpu"])


def limit_findings() -> Iterator[Finding]:
    """Yield the cores, memory and files that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = min(float(cores), cgroup_quota())
    found, to_do = f"{cores} of {os.cpu_count()} usable", ""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if granted < cores:
        found += f", in the time of {granted:g} (the limit of a control group)"
        to_do = "" if asked.isdigit() and int(asked) <= granted else f"set OMP_NUM_THREADS={max(int(granted), 1)}"
    elif asked.isdigit() and int(asked) > cores:
        to_do = f"set OMP_NUM_THREADS={cores} instead of {asked}: threads wait for each other"
    yield Finding("cores", found, to_do, figures={"usable": cores, "granted": granted})

    total, free = machine_memory(), free_memory()
    found = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}; a step takes {total / SHARE / GIB:.1f} unless --memory"
    to_do = "end other processes, or give a smaller --memory" if free < total / SHARE else ""
    yield Finding("memory", found, to_do, figures={"total_bytes": total, "free_bytes": free})

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    to_do = f"ulimit -n {FEW_FILES}" if files < FEW_FILES else ""
    yield Finding("open files", f"at most {files:,}", to_do, figures={"limit": files})

    if (shared := Path("/dev/shm")).is_dir():  # noqa: S108  # only looked at
        room = shutil.disk_usage(shared)
        found = f"{shared} has {room.free / GIB:.1f} GiB free of {room.total / GIB:.1f}; only several GPUs need it"
        yield Finding("shared memory", found, figures={"free_bytes": room.free, "total_bytes": room.total})


def folder_findings() -> Iterator[Finding]:
    """Yield what can be done in every folder that commands write to."""
    places: dict[str, Callable[[], Path]] = {
        "working folder": Path.cwd,
        "catalog folder": lambda: catalog_path().parent,
        "cache folder": cache_path,
        "weights folder": weights_folder,
        "temporary folder": lambda: Path(tempfile.gettempdir()),
    }
    for check, place in places.items():
        try:
            yield _folder(check, place())
        except (ToolkitError, OSError) as problem:
            found = f"nothing can be written there ({getattr(problem, 'strerror', None) or problem})"
            if check in ("catalog folder", "cache folder"):
                yield Finding(check, found, problem=ELSEWHERE[check])
            else:
                yield Finding(check, found, ELSEWHERE[check])


ELSEWHERE = {
    "working folder": "work in a folder of your own",
    "catalog folder": "set DINOV2_CATALOG to a file in another",
    "cache folder": "set DINOV2_CATALOG to a file in another folder, the cache goes with it",
    "weights folder": "set DINOV2_CACHE to another",
    "temporary folder": "set TMPDIR to another",
}


def _folder(check: str, place: Path) -> Finding:
    """Return room, file system and locks of a folder, or of the one that it would be made in. Raises OSError."""
    folder = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
    usage, kind = os.statvfs(folder), _file_system(folder)
    free, is_network = usage.f_bavail * usage.f_frsize, NETWORK.fullmatch(kind) is not None
    has_locks = _locks_hold(folder)
    found = f"{place}, {free / GIB:.1f} GiB free, {kind}{' (a network file system)' if is_network else ''}"
    to_do = ""
    if not has_locks:
        found, to_do = f"{found}, where locks do not hold", f"{ELSEWHERE[check]}, or run one command at a time"
    elif free < LEAST_FREE or (usage.f_files and not usage.f_favail):
        to_do = f"make room, or {ELSEWHERE[check]}"
    elif is_network and check in ("catalog folder", "cache folder"):
        to_do = f"{ELSEWHERE[check]} on a local disk, which is faster"
    figures = {"path": str(folder), "free_bytes": free, "file_system": kind, "network": is_network, "locks": has_locks}
    return Finding(check, found, to_do, figures=figures)


def _locks_hold(folder: Path) -> bool:
    """Write a probe, and tell whether a lock on it keeps others away. Raises OSError where nothing can be written."""
    probe = folder / temporary_name()
    try:
        probe.write_bytes(b"probe")
        with probe.open("r+b") as one, probe.open("r+b") as other, suppress(OSError):
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False
    finally:
        probe.unlink(missing_ok=True)


def _file_system(folder: Path) -> str:
    """Return the kind of file system that a folder is on, such as ext4 or nfs4."""
    device = folder.stat().st_dev
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields = line.split()
            if fields[2] == f"{os.major(device)}:{os.minor(device)}":
                return fields[fields.index("-") + 1]
    return "unknown file system"
