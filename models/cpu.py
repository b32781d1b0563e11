"""Faster paths for training on a CPU. They compute the same formulas, so results differ by rounding only.

One switch covers all of them: `is_enabled`. `DINOV2_CPU_PATHS=0` turns them off, and tensors on a GPU never take them.
Gains in images/s of a training step, ViT-S/16, batch 8, AMD EPYC with AVX-512, 2 cores, float32
(benchmarks/results/pretrain_step.md):

    in_threads, in_halves      the two views in two threads                  1.08 to 1.11; nothing at the size of `tiny`
    linear                     linear layers by oneDNN                       1.10; with two threads 1.20
    attention                  plain products for up to 64 tokens            1.02
    keep_freed_memory          glibc keeps what is freed                     a few percent
    spin_less                  3 to 5 beside other busy processes, nothing without them
    TidyHeap                   memory, not time: 2,074 MB instead of 2,643 after some 30 steps
"""

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

T = TypeVar("T")
R = TypeVar("R")

ENABLED = os.environ.get("DINOV2_CPU_PATHS", "1") != "0"
HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
MAX_SHORT = 64  # tokens; measured forward and backward: up to here plain products are 1.1 to 2 times as fast
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
MMAP_BYTES = 64 << 20  # chosen: a freed block above this size leaves a hole that nothing else fits in
GROWTH = 1.1  # chosen: of resident memory, before freed memory is given back
PARALLEL_NUMBERS = 1 << 16  # torch adds so many in several threads
STATM = Path("/proc/self/statm")  # its second number: resident pages


def is_enabled(device: torch.device) -> bool:
    """Return whether tensors on this device take the paths of this module."""
    return ENABLED and device.type == "cpu"


def runs_in_halves(device: torch.device) -> bool:
    """Return whether a step runs as two halves: on a CPU, in a single process.

    On one core too, where the halves run one after the other: so the number of cores does not change random numbers.
    """
    return is_enabled(device) and not (dist.is_available() and dist.is_initialized())


def in_threads(function: Callable[[T], R], arguments: Sequence[T]) -> list[R]:
    """Return the function's result for each of one or two arguments; two run in two threads, each on half of the cores.

    A matrix product on all cores waits for the slowest core; two independent products do not. The threads take over
    the caller's modes of autograd and autocast.
    """
    num_threads = torch.get_num_threads()
    if len(arguments) == 1 or num_threads == 1:
        return [function(argument) for argument in arguments]
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
        results = [_threads().submit(run, argument) for argument in arguments]
        wait(results)
        return [result.result() for result in results]
    finally:
        torch.set_num_threads(num_threads)  # of threads that are yet to come


def in_halves(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return a function's result for tensors (B, ...), row by row; on a CPU, both halves of the rows at once."""
    if not runs_in_halves(tensors[0].device) or len(tensors[0]) < 2:
        return function(*tensors)
    halves = list(zip(*(tensor.chunk(2) for tensor in tensors), strict=True))
    results = in_threads(lambda half: function(*half), halves)
    return tuple(torch.cat(rows) for rows in zip(*results, strict=True))


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(query key^T / sqrt(d)) value: (B, heads, m, d), (B, heads, n, d) twice -> (B, heads, m, d).

    On a CPU the fused kernel works on blocks that a short sequence leaves mostly empty.
    """
    if not is_enabled(query.device) or key.shape[2] > MAX_SHORT:
        return F.scaled_dot_product_attention(query, key, value)
    scaled: Tensor = query * query.shape[-1] ** -0.5
    return (scaled @ key.transpose(-1, -2)).softmax(-1) @ value


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows weight^T + bias: (..., I), (O, I), (O,) -> (..., O), on a CPU in single precision by oneDNN.

    On a core each, oneDNN reaches 200 to 219 GFLOP/s and MKL, which torch takes, 168 to 198. For the gradient of the
    weight MKL is faster, so that stays.

    oneDNN compiles a kernel of about 1 MB for every new number of rows, and keeps a thousand: use this for numbers of
    rows that recur, and not for tokens that a mask selects.
    """
    is_single = rows.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    is_traced = torch.compiler.is_compiling()  # torch's compiler and exporters know torch's own layer
    if not is_enabled(rows.device) or not is_single or not HAS_ONEDNN or is_traced or not len(rows):
        return F.linear(rows, weight, bias)
    product: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return product


def _onednn(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _onednn(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad  # type: ignore[attr-defined]
        flat = grad.flatten(0, -2)
        return (
            _onednn(grad, weight.t()) if needs_rows else None,
            flat.t() @ rows.flatten(0, -2) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation; without glibc, do nothing.

    By default glibc returns every large tensor to the kernel, which clears the pages again for the next one. The peak
    grows by a few percent. All threads share one arena, so that each can reuse what the other freed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if ENABLED and mallopt is not None:
        for parameter, value in ((M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, 2**31 - 1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)


def give_back_freed_memory(device: torch.device) -> None:
    """Let glibc return all freed memory to the kernel, holes between used blocks too; without glibc, do nothing."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if is_enabled(device) and malloc_trim is not None:
        malloc_trim(0)


class TidyHeap:
    """Keep a loop's memory from growing by fragmentation, where freed memory is kept.

    Sizes that differ a little from step to step, and two threads, leave holes that the next step does not quite fit in:
    after a hundred steps the process is half as large again. Giving memory back costs a few percent of a step. So it is
    done only when the process has grown by a tenth since the step after the last time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._limit: float | None = None  # bytes

    def after_step(self) -> None:
        """Give freed memory back if the process has grown; on a GPU, or without /proc, do nothing."""
        if not is_enabled(self._device) or not STATM.exists():
            return
        resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if self._limit is None:
            self._limit = GROWTH * resident
        elif resident > self._limit:
            give_back_freed_memory(self._device)
            self._limit = None


def spin_less() -> None:
    """Have torch's idle threads sleep soon, as long as the thread that calls this lives.

    OpenMP (libgomp) lets them spin for milliseconds while there are no more threads than cores. Beside a busy process,
    such as a decoder, a model then takes 3 to 5 times as long. With the threads that this one gets there are more.
    """
    torch.ones(PARALLEL_NUMBERS).add_(1)
