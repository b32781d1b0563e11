"""Several processes by one command: by torch's own launcher, or in place where a launcher has started this one.

torch's launcher turns every failure into exit code 1, so a run leaves its own code in `status.json` of its folder.
"""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..errors import Stopped, ToolkitError
from ..features.launched import SIGNALS

SENTINEL = "DINOV2_LAUNCHED"  # set in the processes that `launch` starts, so that they do not start others
STATUS = "status.json"


def is_main_process() -> bool:
    """Tell whether this process speaks, writes and prints for all."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def speaks_for_all() -> bool:
    """Tell whether this process prints the result: the one that the user started, or the first of theirs."""
    return is_main_process() and SENTINEL not in os.environ


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise ToolkitError where Accelerate would silently train with fewer processes, or otherwise, than asked for."""
    started = "WORLD_SIZE" in environment
    if started and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        missing = sorted({"RANK", "MASTER_ADDR", "MASTER_PORT"} - environment.keys())
        raise ToolkitError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} but {', '.join(missing)} is not set; start with torchrun, "
            "srun or --num-processes, or unset WORLD_SIZE"
        )
    # `accelerate launch --cpu --num_processes 2` starts one process, which this shows.
    if not started and environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment:
        raise ToolkitError(
            "`accelerate launch --cpu` starts a single process whatever its --num_processes; "
            "leave it out and give --num-processes to this command, or start it with torchrun"
        )
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ToolkitError(f"ACCELERATE_USE_{name} is set, which this training does not know; use DDP or FSDP")
    # It would compile the whole model, whose last block has other shapes every step.
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ToolkitError("ACCELERATE_DYNAMO_BACKEND is set; set it to no, and compile by --set compile=true")


def launch(num_processes: int, run_folder: Path) -> None:
    """Run this very command line in `num_processes` processes on this machine.

    SIGTERM, SIGINT and SIGUSR1 are passed on; the processes agree on where to stop.

    Raises:
        Stopped: if they stopped at a signal, with everything saved.
        SystemExit: with their exit code, if they failed; they have said why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes speak for themselves
    status = run_folder / STATUS
    status.unlink(missing_ok=True)
    os.environ[SENTINEL] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"dinov2-{os.getpid()}",
        max_restarts=0,
        signals_to_handle="SIGHUP",  # the launcher would kill what has not ended 30 s after a signal
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        pid = read_status(run_folder).get("pid")
        if isinstance(pid, int):
            os.kill(pid, number)
        else:  # not training yet: nothing to save
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        elastic_launch(config, sys.executable)("-m", "dinov2_toolkit", *sys.argv[1:])
    except (ChildFailedError, SignalException):
        raise SystemExit(read_status(run_folder).get("exit_code") or 1) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        del os.environ[SENTINEL]
    ended = read_status(run_folder)
    if ended.get("exit_code") == 75:
        raise Stopped(str(ended["message"]))


@contextmanager
def status_kept(run_folder: Path) -> Iterator[None]:
    """Leave this process's id in `status.json` while the block runs, and its exit code afterwards.

    Under `launch`, a stop ends the process with code 0, since the launcher would report anything else as a failure.
    """
    if not is_main_process():
        with _silent_beside_main(run_folder):
            yield
        return
    write_status(run_folder, pid=os.getpid())
    try:
        yield
    except Stopped as stopped:
        write_status(run_folder, exit_code=75, message=str(stopped))
        if SENTINEL in os.environ:
            raise SystemExit(0) from None
        raise
    except ToolkitError as problem:
        write_status(run_folder, exit_code=1, message=str(problem))
        raise
    write_status(run_folder, exit_code=0)


@contextmanager
def _silent_beside_main(run_folder: Path) -> Iterator[None]:
    """End this process without a word where the main process says the same."""
    try:
        yield
    except Stopped:
        raise SystemExit(0 if SENTINEL in os.environ else 75) from None
    except ToolkitError as problem:
        time.sleep(1)  # for the main process to write its own
        if read_status(run_folder).get("message") == str(problem):
            raise SystemExit(1) from None
        raise


def write_status(run_folder: Path, **status: int | str) -> None:
    """Write `status.json` so that a reader sees the old content or the new."""
    aside = run_folder / f".{STATUS}"
    aside.write_text(json.dumps(status))
    os.replace(aside, run_folder / STATUS)


def read_status(run_folder: Path) -> dict[str, object]:
    """Return the content of `status.json`, empty where there is none yet."""
    path = run_folder / STATUS
    content: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return content
