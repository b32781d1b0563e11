"""The student's forward and backward pass for a step: at once, or in micro-batches whose gradients add up."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

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
    sequential_views: bool = False,
    micro_batch_size: int = 0,
    before_exchange: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Add the gradients of a step to the student's weights; return its losses, detached.

    Args:
        wrapped: the model as Accelerate prepared it.
        seed: of torch's random numbers, which stochastic depth draws.
        sequential_views, micro_batch_size: as in `TrainConfig`; 0 = all images.
        before_exchange: called under DDP after the last forward pass, before its backward adds up all gradients; an
            error that it raises leaves DDP as it was.
    """
    torch.manual_seed(seed)
    batches = list(split_microbatches(step, sequential_views=sequential_views, num_images=micro_batch_size))
    # FSDP reduces the gradients of every micro-batch: whole gradients would take the memory that sharding saves.
    is_sharded = isinstance(next(wrapped.parameters()), DTensor)
    outputs, num_views = [], 2
    for number, batch in enumerate(batches):
        if len(batch.cls_targets) != num_views:
            cpu.give_back_freed_memory(
                batch.global_crops.device
            )  # tensors of other sizes do not fit in the holes it left
        num_views, is_last = len(batch.cls_targets), number == len(batches) - 1
        with (
            nullcontext() if is_sharded or is_last else accelerator.no_sync(wrapped),
            _after_forward(wrapped, before_exchange) if is_last else nullcontext(),
        ):
            part_seed = derived_seed(seed, "part", number)
            outputs.append(microbatch_backward(wrapped, batch, accelerator.backward, part_seed))
    return sum_outputs(outputs)


@contextmanager
def _after_forward(wrapped: nn.Module, function: Callable[[], None]) -> Iterator[None]:
    """Call a function at the end of a forward pass of the model inside DDP, before DDP itself goes on."""
    if not isinstance(wrapped, DistributedDataParallel):
        yield
        return
    hook = wrapped.module.register_forward_hook(lambda *_: function())
    try:
        yield
    finally:
        hook.remove()


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
