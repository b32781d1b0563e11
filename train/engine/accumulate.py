"""The student's forward and backward pass for a step: at once, or in micro-batches whose gradients add up."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ... import console
from ...errors import ToolkitError
from ...models import cpu
from ..config import TrainConfig
from ..counter_rng import derived_seed
from ..objective.micro_batch import MicroBatch, split_by_view, split_microbatches


def forward_backward(
    wrapped: nn.Module,
    step: MicroBatch,
    accelerator: Accelerator,
    *,
    seed: int,
    sequential_views: bool,
    micro_batch_size: int,
    smallest: int,
) -> tuple[dict[str, Tensor], int]:
    """Add the gradients of a step to the student's weights.

    When a GPU runs out of memory, the step is repeated in micro-batches of half as many images; its images stay.

    Args:
        wrapped: the model as Accelerate prepared it.
        seed: of torch's random numbers, which stochastic depth draws; the same for every attempt.
        sequential_views, micro_batch_size: as in `TrainConfig`; 0 = all images.
        smallest: images that a micro-batch needs (2 for KoLeo, which compares them).

    Returns:
        The losses of the step, detached, and the micro-batch size that fitted.

    Raises:
        ToolkitError: if the memory does not suffice for the smallest micro-batch, or for one of several processes.
    """
    while True:
        torch.manual_seed(seed)
        batches = split_microbatches(step, sequential_views=sequential_views, num_images=micro_batch_size)
        try:
            return _accumulate(wrapped, batches, accelerator, seed), micro_batch_size
        except torch.OutOfMemoryError:
            pass  # go on below, where nothing refers to the tensors of the failed attempt
        size = micro_batch_size or step.num_images
        smaller = halved(size, step.num_images, smallest)
        if smaller is None:
            raise ToolkitError(
                f"the GPU's memory does not suffice for {size} images at a time; "
                "set sequential_views=true, activation_checkpointing=full, or a smaller arch"
            )
        if accelerator.num_processes > 1:  # the others wait for gradients that will not come
            raise ToolkitError(  # pragma: no cover  # needs several GPUs
                f"the GPU of process {accelerator.process_index} has too little memory for {size} images at a time; "
                f"set micro_batch_size={smaller}"
            )
        console.warn(
            f"out of GPU memory: from here on {smaller} images at a time instead of {size}; "
            f"the batch stays {step.num_images}"
        )
        micro_batch_size = smaller
        for weight in wrapped.parameters():
            weight.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def halved(micro_batch_size: int, num_images: int, smallest: int) -> int | None:
    """Return at most half the micro-batch size that leaves no last one below `smallest`; None if there is none."""
    for size in range(micro_batch_size // 2, smallest - 1, -1):
        if num_images % size == 0 or num_images % size >= smallest:
            return size
    return None


def _accumulate(
    wrapped: nn.Module, microbatches: Iterable[MicroBatch], accelerator: Accelerator, seed: int
) -> dict[str, Tensor]:
    batches = list(microbatches)
    # FSDP reduces the gradients of every micro-batch: whole gradients would take the memory that sharding saves.
    is_sharded = isinstance(next(wrapped.parameters()), DTensor)
    outputs, num_views = [], 2
    for number, batch in enumerate(batches):
        if len(batch.cls_targets) != num_views:
            cpu.give_back_freed_memory(
                batch.global_crops.device
            )  # tensors of other sizes do not fit in the holes it left
        num_views = len(batch.cls_targets)
        with nullcontext() if is_sharded or batch is batches[-1] else accelerator.no_sync(wrapped):
            part_seed = derived_seed(seed, "part", number)
            outputs.append(microbatch_backward(wrapped, batch, accelerator.backward, part_seed))
    return sum_outputs(outputs)


def microbatch_backward(
    wrapped: nn.Module, batch: MicroBatch, backward: Callable[[Tensor], object], seed: int
) -> dict[str, Tensor]:
    """Add the gradients of a micro-batch to the student's weights, by `backward(loss)`; return the losses, detached.

    `seed` is of stochastic depth where a CPU runs the views apart; elsewhere it draws torch's own numbers.
    """

    def run(batch: MicroBatch) -> dict[str, Tensor]:
        outputs: Mapping[str, Tensor] = wrapped(batch)
        backward(outputs["total"])
        return {name: value.detach() for name, value in outputs.items()}

    if len(batch.cls_targets) == 2 and cpu.runs_in_halves(batch.global_crops.device):
        return sum_outputs(cpu.in_threads(run, split_by_view(batch, seed)))
    return run(batch)


def sum_outputs(outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return a step's outputs from those of its micro-batches: losses summed, tokens concatenated."""
    return {
        name: torch.stack([output[name] for output in outputs]).sum(0)
        if value.ndim == 0
        else torch.cat([output[name] for output in outputs])
        for name, value in outputs[0].items()
    }


def weighted_losses(losses: Mapping[str, float], config: TrainConfig) -> dict[str, float]:
    """Return each loss, of several students NAME_loss, times its weight as `LOSS_weighted`; the sum is the total."""
    weights = dict.fromkeys(("dino_local", "dino_global", "cls_local", "cls_global"), config.dino_weight)
    weights |= {"ibot": config.ibot_weight, "patch": config.ibot_weight, "koleo": config.koleo_weight}
    return {
        f"{name}_weighted": weight * value
        for name, value in losses.items()
        for loss, weight in weights.items()
        if name == loss or name.endswith(f"_{loss}")
    }
