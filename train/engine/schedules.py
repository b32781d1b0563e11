"""What changes over a run, as functions of the step: learning rate, weight decay, EMA momentum, teacher temperature.

Steps count from 0; a schedule of n steps has its values at 0 to n - 1 and keeps the final one from n on.
Source: section 6 of the official recipe, github.com/facebookresearch/dinov2 (dinov2/utils/utils.py, CosineScheduler).
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...errors import ToolkitError

Growth = tuple[tuple[int, int], ...]  # (images seen, batch from then on), both rising


def linear_then_constant(step: int, *, start: float, final: float, num_steps: int) -> float:
    """Return the value of a line from `start` at step 0 to `final` at step num_steps - 1, then `final`."""
    if step >= num_steps:
        return final
    return start + (final - start) * step / max(num_steps - 1, 1)


def warmup_then_cosine(step: int, *, base: float, final: float, num_steps: int, warmup_steps: int = 0) -> float:
    """Return a line from 0 to `base` in `warmup_steps`, both ends included, then half a cosine to `final`."""
    if step < warmup_steps:
        return linear_then_constant(step, start=0.0, final=base, num_steps=warmup_steps)
    if step >= num_steps:
        return final
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def last_layer_lr(step: int, lr: float, *, freeze_steps: int) -> float:
    """Return the learning rate of the heads' last layer: 0 for the first `freeze_steps`, then `lr`."""
    return 0.0 if step < freeze_steps else lr


def thawing_lr(step: int, lr: float, *, freeze_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of a backbone that is frozen at first: 0, then a warm-up of its own to `lr`."""
    if step < freeze_steps:
        return 0.0
    return linear_then_constant(step - freeze_steps, start=0.0, final=lr, num_steps=warmup_steps if freeze_steps else 0)


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return the peak learning rate for a global batch: base_lr * sqrt(batch_size / 1024)."""
    return base_lr * math.sqrt(batch_size / 1024)


@dataclass(frozen=True)
class BatchSizes:
    """The global batch of every step, where it grows with the images seen; a new batch starts with a step.

    Source: Smith et al. 2018, "Don't decay the learning rate, increase the batch size".
    """

    sizes: tuple[int, ...]  # of each stage
    first_steps: tuple[int, ...]  # at which each begins
    images_before: tuple[int, ...]  # seen when each begins

    def at(self, step: int) -> int:
        """Return the images of a step."""
        return self.sizes[self._stage(step)]

    def images_until(self, step: int) -> int:
        """Return how many images were seen in the steps before this one."""
        stage = self._stage(step)
        return self.images_before[stage] + (step - self.first_steps[stage]) * self.sizes[stage]

    def images_of(self, step: int) -> range:
        """Return the numbers of the images of a step, counted from the run's first."""
        start = self.images_until(step)
        return range(start, start + self.at(step))

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self.first_steps, step) - 1


def batch_sizes(batch_size: int | Sequence[Sequence[int]]) -> BatchSizes:
    """Return the batch of every step: one number, or (images seen, batch from then on) from (0, ...) up.

    Raises:
        ToolkitError: when that is no such list, or a batch has no image.
    """
    stages = [(0, batch_size)] if isinstance(batch_size, int) else [(images, size) for images, size in batch_size]
    rises = all(one[0] < other[0] for one, other in pairwise(stages))
    if not stages or stages[0][0] != 0 or not rises or min(size for _, size in stages) < 1:
        raise ToolkitError(
            f"batch_size is {batch_size}; it must be 1 or more, or a list that starts at 0 images and rises, "
            "like [[0, 256], [100000, 512]]"
        )
    first_steps, images_before = [0], [0]
    for (_, size), (images, _) in pairwise(stages):
        steps = -(-(images - images_before[-1]) // size)  # the first step that starts with so many seen
        first_steps.append(first_steps[-1] + steps)
        images_before.append(images_before[-1] + steps * size)
    return BatchSizes(tuple(size for _, size in stages), tuple(first_steps), tuple(images_before))
