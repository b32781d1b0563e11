"""Both views at once, each on half of the cores: on a CPU a product on several cores waits for the slowest of them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")


def is_by_half(crops: Tensor) -> bool:
    """Return whether a step goes by halves: on a CPU, in a single process.

    On one core too, there one after the other, so that the number of cores does not show in what is drawn.
    """
    return crops.device.type == "cpu" and not (dist.is_available() and dist.is_initialized())


def at_once(function: Callable[[T], R], first: T, second: T) -> tuple[R, R]:
    """Return `function(first)` and `function(second)`, both in the caller's modes of autograd and autocast."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return function(first), function(second)
    has_gradients, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    is_autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run(argument: T) -> R:
        torch.set_num_threads((num_threads + 1) // 2)  # of this thread's products
        with (
            torch.inference_mode(is_inference),
            torch.set_grad_enabled(has_gradients),
            torch.autocast("cpu", dtype, enabled=is_autocast),
        ):
            return function(argument)

    try:
        results = [_threads().submit(run, argument) for argument in (first, second)]
        wait(results)
        return results[0].result(), results[1].result()
    finally:
        torch.set_num_threads(num_threads)  # of threads that are yet to come


def by_half(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return what a function makes of tensors (B, ...), row by row.

    Where a step goes by halves it is given their halves at once, and what it makes of them is joined along B.
    """
    if not is_by_half(tensors[0]) or len(tensors[0]) < 2:
        return function(*tensors)
    halves = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
    both = at_once(lambda arguments: function(*arguments), *halves)
    return tuple(torch.cat(rows) for rows in zip(*both, strict=True))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)
