"""Several processes by one command: started here, or by torchrun or srun; and how a process is asked to stop."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from .. import console, cores
from .. import process as own_process
from ..errors import Stopped, ToolkitError
from ..process import LAUNCHER, SIGNALS, Handler, is_main_process, set_handler, take_first_signal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOST = re.compile(  # in the errors of torch
    "Connection (closed|reset) by peer|gloo/transport|Broken pipe|process exited|ncclRemoteError|Timed out waiting"
)
PATIENCE = timedelta(days=30)  # chosen: how long one process waits for the others' shares
KEPT = "what it had is kept, and the same command resumes"
STOP_AFTER_S = 3.0  # chosen: those left when one has failed mostly notice; those still there are asked to stop
KILL_AFTER_S = 30.0  # chosen: what has not ended so long after another has failed is killed

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes that work together; the first speaks, writes and prints for all."""

    rank: int = 0
    count: int = 1
    host: "ProcessGroup | None" = None  # by which they exchange what lies in main memory; None: torch's default one

    @property
    def is_first(self) -> bool:
        """Tell whether this process speaks for all."""
        return self.rank == 0

    def decide(self, decision: Callable[[], T]) -> T:
        """Return in every process what the first one decides; where it raises an error, the others just end."""
        decided: list[tuple[T] | None] = [None]
        try:
            if self.is_first:
                decided = [(decision(),)]
        finally:
            if self.count > 1:
                from torch.distributed import broadcast_object_list

                with needs_others():
                    broadcast_object_list(decided, group=self.host)
        if decided[0] is None:
            raise SystemExit(1)
        return decided[0][0]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank, in all of them."""
        if self.count == 1:
            return [value]
        from torch.distributed import all_gather_object

        values: list[T] = [value] * self.count
        with needs_others():
            all_gather_object(values, value, group=self.host)
        return values

    def started_sum(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to sum some numbers over all processes; return what waits for the sums, not for a GPU."""
        if self.count == 1:
            return lambda: list(numbers)
        import torch

        total = torch.tensor(numbers, dtype=torch.int64)
        work = torch.distributed.all_reduce(total, group=self.host, async_op=True)

        def sums() -> list[int]:
            work.wait()
            return [int(number) for number in total]

        return sums

    def wait(self) -> None:
        """Wait until all processes are here. Raises Stopped when one of them has ended."""
        if self.count > 1:
            from torch.distributed import barrier

            with needs_others():
                barrier(group=self.host)


ALONE = Group()


@contextmanager
def needs_others(kept: Callable[[], str] = lambda: KEPT) -> Iterator[None]:
    """Turn the error that another process's end causes in this one into Stopped; `kept` says what is saved."""
    try:
        yield
    except RuntimeError as problem:  # torch has no other name for a connection that broke
        if not LOST.search(str(problem)):
            raise
        # Our own launcher knows more, and says it.
        raise Stopped("" if LAUNCHER in os.environ else f"stopped: another process ended; {kept()}") from None


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
    check_launcher(os.environ)
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


def is_launched(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher (ours, torchrun, srun) started this process, so that it works in place."""
    return "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def check_launcher(environment: Mapping[str, str]) -> None:
    """Raise ToolkitError where a launcher did not set all that processes need to meet."""
    missing = sorted({"RANK", "MASTER_ADDR", "MASTER_PORT"} - environment.keys())
    if "WORLD_SIZE" in environment and missing:
        raise ToolkitError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} but {', '.join(missing)} is not set; start with torchrun, "
            "srun or --num-processes, or unset WORLD_SIZE"
        )


def prints_result() -> bool:
    """Tell whether this process prints the result: the one that the user started, or the first of theirs."""
    return is_main_process() and LAUNCHER not in os.environ


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set what torch.distributed reads (RANK, WORLD_SIZE, ...) from the variables of an `srun` step with many tasks."""
    if "WORLD_SIZE" in environment or not is_launched(environment):
        return
    port = 20_000 + int(environment["SLURM_JOB_ID"]) % 20_000
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        # Such as 8(x2),4: where nodes differ, that of the first.
        LOCAL_WORLD_SIZE=re.split(r"\D", environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0],
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


def launch(num_processes: int, kept: Callable[[], str] = lambda: KEPT) -> None:
    """Run this very command line in `num_processes` processes on this machine, and wait for them.

    Signals are passed on to all of them; where one fails, the others are stopped; when this one is killed, all stop.

    Raises:
        Stopped: if one was killed, as for memory; `kept` says what is saved.
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
    environment = {**os.environ, cores.THREADS: cores.threads_of_each(num_processes)}
    environment |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LAUNCHER: str(os.getpid())}
    with _handled_signals() as previous:
        for number in previous:
            signal.signal(number, pass_on)
        for rank in range(num_processes):
            processes.append(
                subprocess.Popen(  # noqa: S603  # this command
                    [sys.executable, "-m", "dinov2_toolkit", *sys.argv[1:]],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=None if rank == 0 else subprocess.DEVNULL,
                    start_new_session=True,  # a terminal's Ctrl-C comes through `pass_on`, once
                )
            )
        failed = _first_failures(processes)
    if any(-code in received for code in failed.values()):
        raise KeyboardInterrupt
    for rank, code in failed.items():
        if code < 0:
            how = signal.Signals(-code).name
            raise Stopped(f"stopped: process {rank} of {num_processes} was ended by {how}; {kept()}")
    for code in failed.values():
        raise SystemExit(code)


def _first_failures(processes: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for all processes, stopping those that are left when one has failed.

    Returns by rank the exit codes of those that failed first, or, where none did, 75 of those that stopped.
    """
    running, stopped, failed = dict(enumerate(processes)), dict[int, int](), dict[int, int]()
    stop_at = kill_at = float("inf")
    while running:
        time.sleep(0.1)
        ended = {rank: code for rank, process in running.items() if (code := process.poll()) is not None}
        running = {rank: process for rank, process in running.items() if rank not in ended}
        stopped |= {rank: code for rank, code in ended.items() if code == 75}
        now = time.monotonic()
        if not failed:
            failed = {rank: code for rank, code in ended.items() if code not in (0, 75)}
            if failed:
                stop_at, kill_at = now + STOP_AFTER_S, now + KILL_AFTER_S
        if now > stop_at:
            stop_at = float("inf")
            for process in running.values():
                process.terminate()
        if now > kill_at:
            for process in running.values():
                process.kill()
    return failed or stopped


@contextmanager
def caught_signals(unit: str) -> Iterator[list[int]]:
    """Collect SIGTERM, SIGINT and SIGUSR1 in the yielded list instead of dying; a second one ends at once.

    `unit` says what is finished first, such as "step".
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            own_process.received.append(number)
            own_process.end_interrupted()
        received.append(number)
        console.say(f"{signal.Signals(number).name}: saving after this {unit}; once more to end at once")

    with _handled_signals() as previous:
        take_first_signal(note)
        try:
            yield received
        finally:
            if received:  # what is left to do until the end does not ask for a third signal
                previous.update(dict.fromkeys(SIGNALS, signal.SIG_DFL))


@contextmanager
def _handled_signals() -> Iterator[dict[signal.Signals, Handler | int | None]]:
    """Yield the handlers of the signals that stop a command; those in it at the end are set again."""
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield previous
    finally:
        for number, handler in previous.items():
            set_handler(number, handler)
