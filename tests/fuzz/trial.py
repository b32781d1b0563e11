"""One damaged file, one command: what it did, and what it must not do."""

import hashlib
import importlib
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

import torch

from dinov2_toolkit import __main__ as program

MOST_DATA, MOST_RESIDENT = 6 << 30, 3 << 30  # bytes of a command on files of a few kilobytes
CODES = (0, 1, 75)
FAULTS = re.compile("Traceback|this is a fault of the toolkit|out of memory|the disk is full|interrupted")
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
SEED = int(os.environ.get("FUZZ_SEED", 0))


def import_all() -> None:
    """Import what commands import, once and not in every forked process."""
    for room in ("curate", "evaluate", "features", "manage", "models", "report", "store", "train"):
        package = importlib.import_module(f"dinov2_toolkit.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in ("dinov2_toolkit.cli", "torch._dynamo", "pydantic.json_schema"):
        importlib.import_module(name)


@dataclass(frozen=True)
class Ended:
    """What a command did."""

    code: int  # negative: the number of the signal that ended it
    said: str  # on stderr
    result: str  # on stdout
    resident: int  # bytes, at most
    in_time: bool


def run(arguments: Sequence[str], folder: Path, limit_s: float) -> Ended:
    """Run a command in a process of its own, whose messages stand in files beside the folder."""
    said, result = folder.parent / "said", folder.parent / "result"
    child = os.fork()
    if child == 0:
        _be(arguments, folder, said, result)
    end, in_time, pause_s = time.monotonic() + limit_s, True, 0.002
    while True:
        process, status, usage = os.wait4(child, os.WNOHANG)
        if process:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            in_time = False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    text, answer = (path.read_text(errors="backslashreplace") for path in (said, result))
    return Ended(os.waitstatus_to_exitcode(status), text, answer, usage.ru_maxrss * 1024, in_time)


def _be(arguments: Sequence[str], folder: Path, said: Path, result: Path) -> NoReturn:
    code = 99
    try:
        os.setsid()
        os.chdir(folder)
        for number, path in ((0, os.devnull), (1, result), (2, said)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if number else 0)), number)
        sys.stdin, sys.stdout, sys.stderr = (open(number, "w" if number else "r") for number in range(3))
        sys.argv = ["dinov2", *arguments]
        os.environ.pop("DINOV2_CATALOG", None)
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_DATA, resource.getrlimit(resource.RLIMIT_DATA)[1]))
        torch.set_num_threads(1)
        program.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def fault(ended: Ended, changed: Sequence[str]) -> str | None:
    """Return what a command did wrong; None if nothing. `changed` are files that it should have left alone."""
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if not ended.in_time:
        return "hangs"
    if ended.code not in CODES:
        return f"exit code {ended.code}"
    if found := FAULTS.search(ended.said):
        return found.group()
    if found := CONTROL.search(ended.said + ended.result):
        return f"control character {found.group()!r}"
    if ended.code == 1 and len(errors) != 1 and not ended.result:
        return f"{len(errors)} lines of error"
    if ended.code == 1 and errors and not ended.said.splitlines()[-1].startswith("error: "):
        return "words after the error"
    if ended.resident > MOST_RESIDENT:
        return f"{ended.resident >> 20} MiB"
    return f"changed {', '.join(changed)}" if changed else None


def contents(folder: Path) -> dict[str, str]:
    """Return what every file in and beside a working folder holds, but for outputs, catalog and cache.

    Outputs are named out*; in .dinov2, notes.txt is somebody's.
    """
    found = {}
    for place, folders, names in os.walk(folder.parent):
        below = os.path.relpath(place, folder)
        folders[:] = [name for name in folders if not (name.startswith("out") or name in ("pristine", "failed"))]
        for name in names:
            is_ours = below.startswith(".dinov2") and name != "notes.txt"
            is_output = name.startswith("out") or (below == ".." and name in ("said", "result"))
            path = os.path.join(place, name)
            if not (is_ours or is_output or is_lock(name)) and os.path.isfile(path):
                with open(path, "rb") as file:
                    found[os.path.join(below, name)] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


def is_lock(name: str) -> bool:
    """Tell whether a file only serves to be locked."""
    return name.startswith(".") and name.endswith(".lock")


def trials(
    work: Path,
    numbers: range,
    prepare: Callable[[Random], list[str]],
    *,
    kind: str,
    limit_s: float = 60.0,
    told: Callable[[list[str], Ended], None] | None = None,
) -> list[str]:
    """Damage files in a fresh copy of `pristine` and run a command, number by number; return what went wrong.

    A failing folder is kept below `failed`; copied back to `work`, the command repeats the failure.
    """
    failures = []
    for number in numbers:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(work.parent / "pristine", work, symlinks=True)
        arguments = prepare(Random(f"{kind} {SEED} {number}"))
        before = contents(work)
        kept = work.parent / "failed" / f"{kind}-{SEED}-{number}"
        shutil.copytree(work, kept, symlinks=True, dirs_exist_ok=True)
        ended = run(arguments, work, limit_s)
        after = contents(work)
        changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        if told is not None:
            told(arguments, ended)
        if (what := fault(ended, changed)) is None:
            shutil.rmtree(kept)
        else:
            command = " ".join(repr(argument) if " " in argument else argument for argument in arguments)
            failures.append(
                f"FUZZ_SEED={SEED}, {kind} {number}: {what}\n  rm -rf {work}; cp -r {kept} {work}; cd {work}\n"
                f"  dinov2 {command}\n  {ended.said[-500:]}"
            )
    return failures
