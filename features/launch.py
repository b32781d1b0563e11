"""Several processes by one command: started here, or by torchrun or srun; and how a process is asked to stop."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

from .. import console
from ..errors import ToolkitError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHED = "DINOV2_LAUNCHED"  # set in the processes that `launch` starts
PATIENCE = timedelta(days=30)  # chosen: how long one process waits for the others' shares
KILL_AFTER_S = 30.0  # chosen: what has not ended so long after another has failed is killed


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
        from accelerate.utils import broadcast_object_list

        decided: list[bool | None] = [None]
        try:
            if self.is_first:
                decided = [decision()]
        finally:
            if self.count > 1:
                broadcast_object_list(decided)
        if decided[0] is None:
            raise SystemExit(1)
        return decided[0]

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises ToolkitError when one of them has ended.
        """
        if self.count == 1:
            return
        from accelerate import PartialState

        try:
            PartialState().wait_for_everyone()
        except RuntimeError as problem:  # torch has no other name for a connection that broke
            reason = str(problem).splitlines()[0]
            raise ToolkitError(f"another process ended ({reason}); run the same command again") from None


def join_group() -> Group:
    """Return the processes that work together: this one alone, or those that a launcher has started.

    They meet at the start and at the end only, and nothing that they exchange lies on a GPU: hence gloo, always. Each
    takes the GPU of its local rank, and all but the first are silent.
    """
    if not is_launched(os.environ):
        return Group()
    import torch
    from accelerate import PartialState

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


def local_count() -> int:
    """Return how many of the processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or 1)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher (ours, torchrun, srun) started this process, so that it works in place."""
    return "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def is_main_process() -> bool:
    """Tell whether this process is the first of those that were started together."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def prints_result() -> bool:
    """Tell whether this process prints the result: the one that the user started, or the first of theirs."""
    return is_main_process() and LAUNCHED not in os.environ


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set what torch.distributed reads (RANK, WORLD_SIZE, ...) from the variables of an `srun` step with many tasks."""
    if "WORLD_SIZE" in environment or not is_launched(environment):
        return
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 20_000
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        MASTER_ADDR=first_host(environment["SLURM_STEP_NODELIST"]),
        MASTER_PORT=environment.get("MASTER_PORT", str(port)),
    )


def first_host(node_list: str) -> str:
    """Return the first name of a SLURM node list, such as `gpu-07` of `gpu-[07-09,12],cpu-1`.

    Raises ToolkitError when it names none.
    """
    first = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\]([^,]*))?", node_list)
    if first is None:
        raise ToolkitError(f"SLURM_STEP_NODELIST is {node_list!r}, no list of nodes; set MASTER_ADDR and WORLD_SIZE")
    return "".join(part or "" for part in first.groups())


def launch(num_processes: int) -> None:
    """Run this very command line in `num_processes` processes on this machine, and wait for them.

    Signals are passed on to all of them; where one fails, the others are stopped.

    Raises:
        SystemExit: with the first exit code that is not 0; whoever ended with it has said why.
        KeyboardInterrupt: if a signal ended a process that had nothing to save.
    """
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]  # a free one
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)), **os.environ}
    environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), LAUNCHED: "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with _handled_signals(pass_on):
        for rank in range(num_processes):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dinov2_toolkit", *sys.argv[1:]],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's Ctrl-C comes through `pass_on`, once
                )
            )
        code = next((code for code in _exit_codes(processes) if code), 0)
    if code < 0 and -code in received:
        raise KeyboardInterrupt
    if code:
        raise SystemExit(code if code > 0 else 128 - code)  # as a shell tells of a signal


def _exit_codes(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all processes, stopping those that are left when one has failed; return exit codes as they came."""
    codes, running, deadline = list[int](), processes, float("inf")
    while running:
        time.sleep(0.1)
        if time.monotonic() > deadline:
            for process in running:
                process.kill()
        ended = [process for process in running if process.poll() is not None]
        running = [process for process in running if process not in ended]
        codes += [process.returncode for process in ended]
        if deadline == float("inf") and not {0, 75}.issuperset(codes):
            deadline = time.monotonic() + KILL_AFTER_S
            for process in running:
                process.terminate()
    return codes


@contextmanager
def caught_signals(unit: str) -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 in the yielded list instead of dying; a second one acts as usual.

    `unit` says what is finished first, such as "step".
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        console.say(f"{signal.Signals(number).name}: saving after this {unit}; once more to end at once")
        restore()

    with _handled_signals(note) as restore:
        yield received


@contextmanager
def _handled_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[Callable[[], None]]:
    """Set a handler of the signals that stop a command; yields what sets the previous ones again, done at the end."""
    previous = {number: signal.signal(number, handler) for number in SIGNALS}

    def restore() -> None:
        for number, before in previous.items():
            signal.signal(number, before)

    try:
        yield restore
    finally:
        restore()
