"""Half precision: the one that the hardware has, and the scale of the loss that fp16 needs.

fp16 has no numbers between 0 and 6e-8, so small gradients would vanish. Under fp16 the loss is multiplied by a scale
before backward, and the gradients are divided by it afterwards. A scale that was too large leaves gradients that are
not finite; then the step is skipped and the scale halved. Source: Micikevicius et al. 2018, section 3.2; the numbers
are those of torch's GradScaler.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .optimizer import not_finite

Precision = Literal["no", "bf16", "fp16"]
HALF: dict[Precision, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}

FIRST_SCALE, MIN_SCALE, MAX_SCALE = 2.0**16, 1.0, 2.0**24  # at most 2^24, chosen: whole numbers are exact in float32
GROWTH_STEPS = 2000  # without a skipped one, before the scale is doubled


def supported(wanted: Precision) -> Precision:
    """Return what is wanted, or fp16 instead of bf16 where the GPU would only emulate that."""
    if wanted == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"  # pragma: no cover  # needs an old GPU
    return wanted


class LossScale:
    """The scale of a run's loss, on the device, which no step waits for; Accelerate takes it as its `scaler`.

    Args:
        counts: of the run, perhaps with `loss_scale` and `loss_scale_steps` of a checkpoint.
    """

    def __init__(self, counts: Mapping[str, int], device: torch.device) -> None:
        self.factor = torch.full((), float(counts.get("loss_scale", FIRST_SCALE)), device=device)
        self.num_good = torch.full((), float(counts.get("loss_scale_steps", 0)), device=device)  # since it last changed

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss that backward starts from."""
        return loss * self.factor

    def unscale(self, networks: nn.ModuleDict) -> None:
        """Divide all gradients by the scale."""
        gradients = [weight.grad for weight in networks.parameters() if weight.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        torch._foreach_mul_(local, 1 / self.factor)  # a power of two: exact

    def update(self, is_bad: Tensor, loss: Tensor) -> Tensor:
        """Halve the scale after a step whose gradients are not finite, double it after many that are.

        Args:
            is_bad: () 1 where the step was skipped, the same in all processes.
            loss: of this process.

        Returns:
            () 1 where the step was skipped for another reason than the scale: the loss is not finite, or the scale is
            at its smallest.
        """
        is_lost = torch.maximum(not_finite([loss]), (self.factor <= MIN_SCALE).float())
        num_good = (self.num_good + 1) * (1 - is_bad)
        is_grown = (num_good >= GROWTH_STEPS).float()
        self.num_good = num_good * (1 - is_grown)
        self.factor = (self.factor * (1 - is_bad / 2) * (1 + is_grown)).clamp(MIN_SCALE, MAX_SCALE)
        return is_bad * is_lost

    def counts(self) -> dict[str, int]:
        """Read the scale and its good steps from the device."""
        return {"loss_scale": int(self.factor), "loss_scale_steps": int(self.num_good)}
