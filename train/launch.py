"""A run of several processes: checks of its launcher's settings, how the error of one ends all, and the status file.

Processes wait for one another inside libraries (NCCL, gloo), where no exception reaches them. So each has a thread that
looks into the store by which they meet, and ends its process when another one has left an error there.

torchrun turns every failure into exit code 1, so a run leaves its own code in `status.json` of its folder.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from ..errors import Stopped, ToolkitError
from ..features.launch import adopt_slurm, check_launcher, is_launched
from ..process import is_main_process
from ..store.files import write_text
from ..store.json_text import json_object

STATUS = "status.json"
MEETING = timedelta(minutes=10)  # chosen: how long a process waits for the first one at the start
LOOK_EVERY_S = 0.5  # chosen
LEAVE_AFTER_S = 50.0  # chosen: so long the one that keeps the store waits for the others, who may be yet to start
STOPPED_AFTER_S = 2.0  # chosen: the same when the run was stopped, for then another may have been killed
GONE_AFTER_S = 30.0  # chosen: so long after the store is gone, a process that has not noticed by itself is ended
DONE = json.dumps({"exit_code": 0})  # its text when the run is done


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise ToolkitError where Accelerate would silently train with fewer processes, or by other means, than asked."""
    check_launcher(environment)
    started = "WORLD_SIZE" in environment
    # `accelerate launch --cpu --num_processes 2` starts one process, which this shows.
    if not started and environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment:
        raise ToolkitError(
            "`accelerate launch --cpu` starts a single process; start with torchrun, or this command's --num-processes"
        )
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ToolkitError(f"ACCELERATE_USE_{name} is set, which this training does not know; use DDP or FSDP")
    # It would compile the whole model at once, which takes the longer the deeper it is, and not what the teacher does.
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ToolkitError("ACCELERATE_DYNAMO_BACKEND is set; set it to no, and compile by --set compile=true")


class _Failures:
    """Where the first process that fails leaves its error, and a thread that ends this one when another has."""

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # by a star

        self.rank, self._count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun keeps the store by which processes meet; otherwise the first one does, for torch's own use too.
        self._keeps_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = TCPStore(host, port, None, self._keeps_store, MEETING, wait_for_workers=False, multi_tenant=True)
        except RuntimeError as problem:
            raise ToolkitError(
                f"process {self.rank} of {self._count} cannot meet the others at {host}:{port} ({problem}); check "
                "MASTER_ADDR and MASTER_PORT, and that process 0 runs"
            ) from None
        self._store = PrefixStore("dinov2", store)
        self._has_ended = threading.Event()
        self.status: Path | None = None  # this process's to write
        threading.Thread(target=self._watch, daemon=True).start()

    def leave(self, problem: Exception) -> None:
        """Leave an error for the others, unless one has left another."""
        message = str(problem) if isinstance(problem, ToolkitError) else f"{type(problem).__name__}: {problem}"
        self._store.compare_set("error", "", f"{self.rank} {' '.join(message.split())}")

    def found(self) -> tuple[int, str] | None:
        """Return the rank that failed first and its error, if one has."""
        if not self._store.check(["error"]):
            return None
        rank, _, message = self._store.get("error").decode().partition(" ")
        return int(rank), message

    def end(self, patience_s: float = LEAVE_AFTER_S) -> None:
        """Stop looking. The process that keeps the store stays until the others have ended, or for so long."""
        self._has_ended.set()
        with suppress(RuntimeError):  # the process that kept the store has ended
            num_ended = self._store.add("ended", 1)
            deadline = time.monotonic() + patience_s
            while self._keeps_store and num_ended < self._count and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY_S / 5)
                num_ended = self._store.add("ended", 0)

    def _watch(self) -> None:
        while not self._has_ended.wait(LOOK_EVERY_S):
            try:
                found = self.found()
            except RuntimeError:
                if not self._has_ended.wait(GONE_AFTER_S):
                    os._exit(75)
                return
            if found is not None and found[0] != self.rank:
                self._end_now(found[1])
            if found is not None:
                return

    def _end_now(self, message: str) -> NoReturn:
        if self.status is not None:
            _write_end(self.status, 1, message)
        self.end()
        if sys.stderr.isatty():
            os.write(2, b"\r\x1b[2K\x1b[?25h")  # instead of the progress bar a cursor
        os._exit(1)


_failures: _Failures | None = None


@contextmanager
def ending_together() -> Iterator[None]:
    """End all processes of a run with exit code 1 when one raises an error in the block, which it alone then says.

    Without a launcher, and inside another such block, this does nothing.
    """
    global _failures
    if _failures is not None or not is_launched(os.environ):
        yield
        return
    adopt_slurm(os.environ)
    check_launch(os.environ)
    if int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    failures = _failures = _Failures()
    patience_s = STOPPED_AFTER_S
    try:
        yield
        patience_s = LEAVE_AFTER_S
    except Exception as problem:
        code, _, is_own = _settled(problem)
        if code == 1:
            patience_s = LEAVE_AFTER_S
        if is_own:
            raise
        raise SystemExit(code) from None
    finally:
        _failures = None
        failures.end(patience_s)


def _settled(problem: Exception) -> tuple[int, str, bool]:
    """Return the exit code and the message that an error ends the run with, and whether this process is to say it.

    That is the error which the first process to fail has left, so this one is left too if it is the first.
    """
    code, message = 75 if isinstance(problem, Stopped) else 1, str(problem)
    if _failures is None:
        return code, message, True
    with suppress(RuntimeError):  # the process that kept the store has ended
        if code == 1:
            _failures.leave(problem)
        if (found := _failures.found()) is not None:
            return 1, found[1], found[0] == _failures.rank
    return code, message, code == 1 or is_main_process()


@contextmanager
def errors_left() -> Iterator[None]:
    """Leave an error of the block for the other processes at once, before all that surrounds it is closed."""
    try:
        yield
    except Exception as problem:
        _settled(problem)
        raise


@contextmanager
def status_kept(run_folder: Path) -> Iterator[None]:
    """Keep the main process's id in `status.json` while the block runs, and its exit code and message afterwards.

    What stops all processes, such as a signal, the main one says.
    """
    is_main, status = is_main_process(), run_folder / STATUS
    if is_main:
        write_text(status, json.dumps({"pid": os.getpid()}))
        if _failures is not None:
            _failures.status = status
    try:
        yield
    except Exception as problem:
        code, message, is_own = _settled(problem)
        if is_main:
            _write_end(status, code, message)
        if is_own:
            raise
        raise SystemExit(code) from None
    if is_main:
        write_text(status, DONE)


def _write_end(status: Path, code: int, message: str) -> None:
    write_text(status, json.dumps({"exit_code": code, "message": message}))


def read_status(run_folder: Path) -> dict[str, object]:
    """Return the content of `status.json`, empty where there is none yet, or a damaged one."""
    path = run_folder / STATUS
    try:
        return json_object(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return {}
