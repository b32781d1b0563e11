"""A training run of several processes: checks of its launcher's settings, and its status file.

torchrun turns every failure into exit code 1, so a run leaves its own code in `status.json` of its folder.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import Stopped, ToolkitError
from ..process import is_main_process
from ..store.files import write_text
from ..store.json_text import json_object

STATUS = "status.json"
DONE = json.dumps({"exit_code": 0})  # its text when the run is done


def check_launch(environment: Mapping[str, str]) -> None:
    """Raise ToolkitError where Accelerate would silently train with fewer processes, or by other means, than asked."""
    started = "WORLD_SIZE" in environment
    missing = sorted({"RANK", "MASTER_ADDR", "MASTER_PORT"} - environment.keys())
    if started and missing:
        raise ToolkitError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} but {', '.join(missing)} is not set; start with torchrun, "
            "srun or --num-processes, or unset WORLD_SIZE"
        )
    # `accelerate launch --cpu --num_processes 2` starts one process, which this shows.
    if not started and environment.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in environment:
        raise ToolkitError(
            "`accelerate launch --cpu` starts a single process; start with torchrun, or this command's --num-processes"
        )
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ToolkitError(f"ACCELERATE_USE_{name} is set, which this training does not know; use DDP or FSDP")
    # It would compile the whole model, whose last block has other shapes every step.
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ToolkitError("ACCELERATE_DYNAMO_BACKEND is set; set it to no, and compile by --set compile=true")


@contextmanager
def status_kept(run_folder: Path) -> Iterator[None]:
    """Keep the main process's id in `status.json` while the block runs, and its exit code afterwards.

    What the main process says, the others do not say again.
    """
    is_main, status = is_main_process(), run_folder / STATUS
    if is_main:
        write_text(status, json.dumps({"pid": os.getpid()}))
    try:
        yield
    except (Stopped, ToolkitError) as problem:
        code = 75 if isinstance(problem, Stopped) else 1
        if is_main:
            write_text(status, json.dumps({"exit_code": code, "message": str(problem)}))
            raise
        if code == 1:
            time.sleep(1)  # for the main process to write its own
        if code == 75 or read_status(run_folder).get("message") == str(problem):
            raise SystemExit(code) from None
        raise
    if is_main:
        write_text(status, DONE)


def read_status(run_folder: Path) -> dict[str, object]:
    """Return the content of `status.json`, empty where there is none yet, or a damaged one."""
    path = run_folder / STATUS
    try:
        return json_object(path.read_bytes()) if path.is_file() else {}
    except ValueError:
        return {}
