"""The student's side of a step: gradients of all its parts, in smaller ones where a GPU's memory does not suffice."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ... import console
from ...errors import ToolkitError
from ...store.memory import give_back_freed_memory
from ..counter_rng import derived_seed
from ..monitor.metrics import added
from ..objective.cpu_parallel import at_once, is_by_half
from ..objective.micro_batch import Part, halves, parts


def learn(
    wrapped: nn.Module,
    step: Part,
    accelerator: Accelerator,
    *,
    seed: int,
    sequential_views: bool,
    micro_batch_size: int,
    smallest: int,
) -> tuple[dict[str, Tensor], int]:
    """Add the gradients of a step to the student's, all at once or part by part, which adds up to the same.

    When a GPU runs out of memory, the same step is done again with half as many images at a time and twice as many
    parts: the images of an update, and so its size, stay what they are.

    Args:
        wrapped: the model as Accelerate prepared it.
        step: what `taught` made.
        seed: of torch's random numbers, which stochastic depth draws; the same for every attempt.
        sequential_views, micro_batch_size: as in `TrainConfig`; 0 = all images.
        smallest: images that a part needs (2 for KoLeo, which compares them).

    Returns:
        The losses of the step, detached, and the images at a time that fitted.

    Raises:
        ToolkitError: if the memory does not suffice for the smallest part, or for one of several processes.
    """
    while True:
        torch.manual_seed(seed)
        try:
            return _all_parts(wrapped, step, accelerator, seed, sequential_views, micro_batch_size), micro_batch_size
        except torch.OutOfMemoryError:
            pass  # go on below, where nothing holds on to what the failed attempt has made
        smaller = halved(micro_batch_size or step.num_images, step.num_images, smallest)
        if smaller is None:
            raise ToolkitError(
                f"the GPU's memory does not suffice for {micro_batch_size or step.num_images} images at a time; "
                "set sequential_views=true, activation_checkpointing=full, or a smaller arch"
            )
        if accelerator.num_processes > 1:  # the others wait for gradients that will not come
            raise ToolkitError(
                f"the GPU of process {accelerator.process_index} has too little memory for "
                f"{micro_batch_size or step.num_images} images at a time; set micro_batch_size={smaller}"
            )
        console.warn(
            f"out of GPU memory: from here on {smaller} images at a time in place of "
            f"{micro_batch_size or step.num_images}; the batch stays {step.num_images}"
        )
        micro_batch_size = smaller
        for weight in wrapped.parameters():
            weight.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def halved(micro_batch_size: int, num_images: int, smallest: int) -> int | None:
    """Return at most half as many images at a time, such that the last part is not too small; None if there is none."""
    for size in range(micro_batch_size // 2, smallest - 1, -1):
        if num_images % size == 0 or num_images % size >= smallest:
            return size
    return None


def _all_parts(
    wrapped: nn.Module, step: Part, accelerator: Accelerator, seed: int, sequential_views: bool, micro_batch_size: int
) -> dict[str, Tensor]:
    all_parts = list(parts(step, by_view=sequential_views, num_images=micro_batch_size))
    # Shards are summed part by part: whole gradients, kept for one sum, would take the memory that sharding saves.
    in_shards = isinstance(next(wrapped.parameters()), DTensor)
    collected: list[dict[str, Tensor]] = []
    for number, part in enumerate(all_parts):
        is_other_kind = number == 0 or len(part.global_crops) != len(all_parts[number - 1].global_crops)
        if sequential_views and is_other_kind and part.masks.device.type == "cpu":
            give_back_freed_memory()  # tensors of another size would not fit where those of the last part were
        adds_only = part is not all_parts[-1] and not in_shards
        with accelerator.no_sync(wrapped) if adds_only else nullcontext():
            collected.append(backward(wrapped, part, accelerator.backward, derived_seed(seed, "part", number)))
    return added(collected)


def backward(wrapped: nn.Module, part: Part, from_loss: Callable[[Tensor], object], seed: int) -> dict[str, Tensor]:
    """Add the gradients of a part of a step to the student's; return the losses, detached.

    On a CPU the two views go through at once. Of the two gradients of a weight that is the sum, whichever is first.

    Args:
        wrapped: the model as Accelerate prepared it.
        from_loss: goes backward from a loss.
        seed: of what stochastic depth draws where views are apart; together they draw from torch's own numbers.
    """

    def learn_from(part: Part) -> dict[str, Tensor]:
        outputs: Mapping[str, Tensor] = wrapped(part)
        from_loss(outputs["total"])
        return {name: value.detach() for name, value in outputs.items()}

    if len(part.cls_targets) == 2 and is_by_half(part.global_crops):
        return added(at_once(learn_from, *halves(part, seed)))
    return learn_from(part)
