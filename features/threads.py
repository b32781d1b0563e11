"""Threads, each of which computes on one core."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Workers(ThreadPoolExecutor):
    """`count` threads for products, each of which takes one core."""

    def __init__(self, count: int) -> None:
        # How many threads a product takes is a setting of the thread that asks for it.
        super().__init__(count, initializer=torch.set_num_threads, initargs=(1,))
        self.count = count


def num_cores() -> int:
    """Return on how many cores to compute: OMP_NUM_THREADS, or all that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers() -> Iterator[Workers]:
    """Yield a thread a core; torch computes in one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Workers(num_cores()) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)


def run(threads: Workers, step: Callable[[T], R], parts: Iterable[T], ahead: int = 2) -> Iterator[R]:
    """Yield `step(part)` of every part in their order, each thread up to `ahead` parts ahead."""
    waiting = []
    for part in parts:
        waiting.append(threads.submit(step, part))
        if len(waiting) > ahead * threads.count:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def in_parallel(step: Callable[[int], None], starts: range) -> None:
    """Run `step(start)` for all starts on all cores; the steps write to places of their own."""
    count = num_cores()
    if count == 1 or len(starts) < 2 * count:
        for start in starts:
            step(start)
        return
    with ThreadPoolExecutor(count) as threads:
        for _ in threads.map(step, starts):
            pass
