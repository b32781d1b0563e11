"""Steps a second and memory of a function that trains on a batch, on a GPU or a CPU."""

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Batch = TypeVar("Batch")

WARMUP_STEPS, TIMED_STEPS = 3, 5  # chosen; the first ones compile, and fill the allocator


def now(device: torch.device) -> float:
    """Return the time in seconds when the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def steps_per_second(
    step: Callable[[Batch], object], make_batch: Callable[[], Batch], device: torch.device
) -> tuple[float, int]:
    """Return the steps a second on one batch, and the most bytes that tensors took on a GPU; 0 on a CPU.

    The host runs ahead of the GPU, as in training. Raises torch.OutOfMemoryError.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    batch = make_batch()
    for _ in range(WARMUP_STEPS):
        step(batch)
    start = now(device)
    for _ in range(TIMED_STEPS):
        step(batch)
    rate = TIMED_STEPS / (now(device) - start)
    return rate, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
