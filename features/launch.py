"""Several processes by one command, each with its share of the work: started here, or by torchrun or srun.

They meet at the start and at the end only, and nothing that they exchange lies on a GPU: hence gloo, always.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .. import console
from ..errors import ToolkitError
from .launched import SIGNALS, adopt_slurm, is_launched

PATIENCE = timedelta(days=30)  # chosen: how long one process waits for the others' shares


@dataclass(frozen=True)
class Group:
    """The processes that work together; the first speaks, writes and prints for all."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Tell whether this process speaks for all."""
        return self.rank == 0

    def decide(self, decision: Callable[[], bool]) -> bool:
        """Return in every process what the first one decides; where it raises an error, the others just end."""
        told: list[bool | None] = [None]
        try:
            if self.is_first:
                told = [decision()]
        finally:
            if self.count > 1:
                broadcast_object_list(told)
        if told[0] is None:
            raise SystemExit(1)
        return told[0]

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises ToolkitError when one of them has ended.
        """
        if self.count == 1:
            return
        try:
            PartialState().wait_for_everyone()
        except RuntimeError as problem:  # torch has no other name for a connection that broke
            reason = str(problem).splitlines()[0]
            raise ToolkitError(f"another process ended ({reason}); run the same command again") from None


def local_count() -> int:
    """Return how many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def join_group() -> Group:
    """Return the processes that work together: this one alone, or those that a launcher has started.

    Each takes the GPU of its local rank, and all but the first are silent.
    """
    if not is_launched(os.environ):
        return Group()
    adopt_slurm(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    state = PartialState(cpu=True, timeout=PATIENCE)
    if state.num_processes != int(os.environ["WORLD_SIZE"]):
        raise ToolkitError(
            f"{os.environ['WORLD_SIZE']} processes were launched, but {state.num_processes} found one another;"
            " start them by --num-processes or torchrun"
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(state.local_process_index % torch.cuda.device_count())
    if state.process_index > 0:
        console.set_verbosity(quiet=True, verbose=0)
    return Group(state.process_index, state.num_processes)


def launch(num_processes: int) -> None:
    """Run this very command line in `num_processes` processes on this machine, and wait for them.

    Signals are passed on to all of them; where one fails, the others are stopped.

    Raises:
        SystemExit: with the first exit code that is not 0; whoever ended with it has said why.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    environment.update(WORLD_SIZE=str(num_processes), LOCAL_WORLD_SIZE=str(num_processes))
    environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        for rank in range(num_processes):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dinov2_toolkit", *sys.argv[1:]],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's Ctrl-C comes through `pass_on`, once
                )
            )
        codes = _ended(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if failed := [code for code in codes if code]:
        raise SystemExit(failed[0])


def _ended(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all processes, stopping those that are left when one has failed; return exit codes as they came."""
    codes: list[int] = []
    running = list(processes)
    while running:
        for process in list(running):
            try:
                code = process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            running.remove(process)
            codes.append(code if code >= 0 else 128 - code)  # as a shell tells of a signal
            if code not in (0, 75):
                for other in running:
                    other.terminate()
    return codes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
