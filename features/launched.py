"""How this process was started, and how it is asked to stop: by launchers' variables, and by signals."""

import re
import signal
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import FrameType

from .. import console
from ..errors import ToolkitError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def is_launched(environment: Mapping[str, str]) -> bool:
    """Tell whether a launcher (ours, torchrun, srun) started this process, so that it works in place."""
    return "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Set what torch.distributed reads (RANK, WORLD_SIZE, ...) from the variables of an `srun` step with many tasks."""
    if "WORLD_SIZE" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
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

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        restore()
