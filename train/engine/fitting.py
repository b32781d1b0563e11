"""A step in the memory that there is: where it runs out, all processes repeat the step in smaller micro-batches.

A GPU that waits for others in a collective cannot be called back. So before processes exchange anything, all say on the
host whether their memory has sufficed: after the teacher's networks, and before the last backward pass, in which
gradients are added up. A host waits for other hosts there, not for its GPU, whose work is asked for ahead. What comes
after that is tried out in a step of each process alone: on a GPU before the first step, and for each smaller size.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ... import console
from ...errors import ToolkitError
from ...features.launch import ALONE, Group
from ..config import TrainConfig
from ..objective.losses import alone
from ..objective.micro_batch import MicroBatch
from .accumulate import forward_backward
from .optimizer import step_unless

# Makes a step's targets in parts of so many images, and calls the function before processes exchange anything.
MakeStep = Callable[[int, Callable[[], None]], MicroBatch]


def is_tried_first(device: torch.device) -> bool:
    """Return whether a run begins with a trial step: where memory that runs out is an error that can be caught."""
    return device.type == "cuda"


def step_that_fits(
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    make_step: MakeStep,
    accelerator: Accelerator,
    processes: Group,
    config: TrainConfig,
    *,
    seed: int,
    num_images: int,
    micro_batch_size: int,
    is_tried: bool = False,
    was_short: bool = False,
) -> tuple[MicroBatch, dict[str, Tensor], int]:
    """Add the gradients of a step to the student's weights; return the step, its outputs and the images at a time.

    When memory runs out in any process, all repeat the step in micro-batches of half as many images. So the result is
    that of the smaller micro-batch from the start.

    Args:
        wrapped: the model as Accelerate prepared it, with the optimizer.
        seed: of torch's random numbers, the same for every attempt.
        num_images: those of this process in the step.
        micro_batch_size: as in `TrainConfig`; 0 = all images.
        is_tried: take a trial step first.
        was_short: the crops have just run out of memory here, and were made once more.

    Raises:
        ToolkitError: if the memory does not suffice for the smallest micro-batch, or runs out where it cannot be told
            to the others: with shards, in KoLeo over all processes, and in the last backward pass after the trial.
    """
    is_sharded = isinstance(next(wrapped.parameters()), DTensor)
    exchanges = bool(config.koleo_distributed and config.koleo_weight)  # in the student's forward pass
    buffers = [buffer.clone() for buffer in wrapped.buffers()]

    def attempt(
        module: nn.Module, micro_batch_size: int, agreement: _Agreement
    ) -> tuple[MicroBatch, dict[str, Tensor], int]:
        step = make_step(micro_batch_size, agreement.ready)
        agreement.is_open = not is_sharded and not exchanges
        outputs = forward_backward(
            module,
            step,
            accelerator,
            seed=seed,
            sequential_views=config.sequential_views,
            micro_batch_size=micro_batch_size,
            before_exchange=agreement.ready,
        )
        return step, outputs, micro_batch_size

    def try_alone(micro_batch_size: int) -> None:
        # Not by way of DDP, which may exchange what it has learnt of the order of gradients.
        module = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        with alone():
            _, outputs, _ = attempt(module, micro_batch_size, _Agreement(ALONE, is_open=True))
            step_unless(torch.ones_like(outputs["total"]), optimizer)  # makes room for the moments, and changes nothing

    while True:
        size = micro_batch_size or num_images
        smaller = halved(size, num_images, 2 if config.koleo_weight else 1)
        agreement = _Agreement(processes, is_open=not is_sharded, is_short=was_short and smaller is not None)
        try:
            if is_tried and not is_sharded:
                try_alone(micro_batch_size)
                agreement.ready()
                agreement.is_open = True
                _undo(wrapped, buffers)
            return attempt(wrapped, micro_batch_size, agreement)
        except torch.OutOfMemoryError as problem:
            is_agreed = agreement.tell(problem)
        # Nothing refers to the tensors of the failed attempt any more.
        _undo(wrapped, buffers)
        if smaller is None:
            raise ToolkitError(
                f"the GPU's memory does not suffice for {size} images at a time; "
                "set sequential_views=true, activation_checkpointing=full, or a smaller arch"
            )
        if not is_agreed:
            raise ToolkitError(
                f"the GPU of process {processes.rank} has too little memory for {size} images at a time; "
                f"set micro_batch_size={smaller}"
            )
        console.warn(
            f"out of GPU memory: from here on {smaller} images at a time instead of {size}; "
            f"the batch stays {num_images}"
        )
        micro_batch_size, is_tried, was_short = smaller, processes.count > 1, False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def halved(micro_batch_size: int, num_images: int, smallest: int) -> int | None:
    """Return at most half the micro-batch size that leaves no last one below `smallest`; None if there is none."""
    for size in range(micro_batch_size // 2, smallest - 1, -1):
        if num_images % size == 0 or num_images % size >= smallest:
            return size
    return None


class _ShortElsewhere(torch.OutOfMemoryError):
    """Another process has too little memory."""


class _Agreement:
    """What all processes say of their memory before they exchange anything."""

    def __init__(self, processes: Group, *, is_open: bool, is_short: bool = False) -> None:
        self._processes, self._is_short = processes, is_short
        self.is_open = is_open  # the others have yet to come to the same point

    def ready(self) -> None:
        """Go on if all processes can; raise torch.OutOfMemoryError where one cannot."""
        if self.is_open:
            self.is_open = False
            [num_short] = self._processes.started_sum([self._is_short])()
            self._is_short = False
            if num_short:
                raise _ShortElsewhere

    def tell(self, problem: torch.OutOfMemoryError) -> bool:
        """Tell the others of an error, unless they know; return whether they could be told."""
        if isinstance(problem, _ShortElsewhere) or self._processes.count == 1:
            return True
        if self.is_open:
            self._processes.started_sum([1])()
        return self.is_open


@torch.no_grad()
def _undo(wrapped: nn.Module, buffers: list[Tensor]) -> None:
    """Take back what an attempt has done: gradients, and what the teacher's targets moved."""
    for weight in wrapped.parameters():
        weight.grad = None
    for buffer, before in zip(wrapped.buffers(), buffers, strict=True):
        buffer.copy_(before)
