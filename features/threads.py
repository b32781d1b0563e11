"""Work in threads: each computes on one core, results come in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from ..cores import usable_cores

T = TypeVar("T")
R = TypeVar("R")


class Workers(ThreadPoolExecutor):
    """`count` threads for products, each of which takes one core."""

    def __init__(self, count: int) -> None:
        # How many threads a product takes is a setting of the thread that asks for it.
        super().__init__(count, initializer=torch.set_num_threads, initargs=(1,))
        self.count = count


def num_cores() -> int:
    """Return on how many cores to compute: OMP_NUM_THREADS, or its share of those that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked):
        return int(asked)
    return usable_cores()


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


def map_in_order(
    function: Callable[[T], R], items: Iterable[T], executor: ThreadPoolExecutor, ahead: int | None = None
) -> Generator[R, None, None]:
    """Yield `function(item)` of every item in order, while the executor's threads work on those that follow.

    Closing the iterator cancels what has not begun. Items are taken as they are needed: `ahead` more than the one that
    is waited for, two a thread by default.
    """
    ahead = 2 * executor._max_workers if ahead is None else ahead
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def in_parallel(step: Callable[[int], None], starts: range) -> None:
    """Run `step(start)` for all starts on all cores; the steps write to places of their own."""
    count = num_cores()
    if count == 1 or len(starts) < 2 * count:
        for start in starts:
            step(start)
        return
    with ThreadPoolExecutor(count) as threads:
        list(threads.map(step, starts))  # waits for all, and raises what one raises
