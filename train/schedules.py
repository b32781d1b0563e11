"""What changes over a run, as functions of the step: learning rate, weight decay, EMA momentum, teacher temperature.

Steps count from 0; a schedule of n steps has its values at 0 to n - 1 and keeps the final one from n on.
Source: section 6 of the official recipe, github.com/facebookresearch/dinov2 (dinov2/utils/utils.py, CosineScheduler).
"""

import math


def linear_then_constant(step: int, *, start: float, final: float, num_steps: int) -> float:
    """Return the value of a line from `start` at step 0 to `final` at step num_steps - 1, then `final`.

    The teacher's temperature goes from 0.04 to 0.07 this way.
    """
    if step >= num_steps:
        return final
    return start + (final - start) * step / max(num_steps - 1, 1)


def warmup_then_cosine(
    step: int, *, base: float, final: float, num_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Return the value of a line from `warmup_start` to `base`, then of half a cosine from `base` towards `final`.

    The line takes `warmup_steps`, both ends included. With no warm-up the cosine starts at step 0: so do weight decay
    and the EMA's momentum.
    """
    if step < warmup_steps:
        return linear_then_constant(step, start=warmup_start, final=base, num_steps=warmup_steps)
    if step >= num_steps:
        return final
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def last_layer_lr(step: int, lr: float, *, freeze_steps: int) -> float:
    """Return the learning rate of the heads' last layer: 0 for the first `freeze_steps`, then `lr`."""
    return 0.0 if step < freeze_steps else lr


def scaled_lr(base_lr: float, batch_size: int) -> float:
    """Return the peak learning rate for a global batch: base_lr * sqrt(batch_size / 1024)."""
    return base_lr * math.sqrt(batch_size / 1024)
