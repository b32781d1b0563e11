"""Two processes of one run, forked from the test, which has imported everything already."""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from accelerate.state import AcceleratorState

from dinov2_toolkit import console
from dinov2_toolkit.errors import Stopped, ToolkitError


def started_pair(work: Callable[[int], object], folder: Path) -> list[BaseProcess]:
    """Start `work(rank)` in two processes as torchrun does; they end as a command does, and what they say is kept."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])

    def process(rank: int) -> None:
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        AcceleratorState._reset_state(reset_partial_state=True)  # of what ran in the parent
        with (folder / f"said-{rank}.txt").open("w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = open(2, "w", closefd=False)
        try:
            work(rank)
        except Stopped as problem:
            console.say(str(problem))
            sys.exit(75)
        except ToolkitError as problem:
            console.error(str(problem))
            sys.exit(1)

    context = multiprocessing.get_context("fork")
    pair: list[BaseProcess] = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    for each in pair:
        each.start()
    return pair


def ended(pair: list[BaseProcess], patience_s: float) -> list[int | None]:
    """Wait for processes, end those that are still there, and return the exit codes."""
    deadline = time.monotonic() + patience_s
    for process in pair:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return [process.exitcode for process in pair]


def said(folder: Path) -> list[str]:
    """Return the lines that the two have said, those of the first one first."""
    return [line for rank in range(2) for line in (folder / f"said-{rank}.txt").read_text().splitlines()]
