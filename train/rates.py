"""The rates of a step: what the settings' schedules say, and what the optimizer's groups get of it."""

from functools import partial
from typing import NamedTuple

from torch.optim import Optimizer

from .config import TrainConfig
from .engine.optimizer import apply_schedules
from .engine.schedules import (
    batch_sizes,
    last_layer_lr,
    linear_then_constant,
    scaled_lr,
    thawing_lr,
    warmup_then_cosine,
)


class Rates(NamedTuple):
    """What the schedules say of a step."""

    lr: float
    weight_decay: float
    momentum: float  # of the teacher's average
    teacher_temp: float


def rates_at(step: int, config: TrainConfig) -> Rates:
    """Return a step's learning rate, weight decay, teacher momentum and teacher temperature."""
    peak_lr = scaled_lr(config.base_lr, batch_sizes(config.batch_size).at(0))
    final_lr = peak_lr if config.hold_lr else config.min_lr
    cosine = partial(warmup_then_cosine, step, num_steps=config.steps)
    (first_temp, last_temp), temp_steps = config.teacher_temp, config.teacher_temp_warmup_steps
    return Rates(
        lr=cosine(base=peak_lr, final=final_lr, warmup_steps=config.warmup_steps),
        weight_decay=cosine(base=config.weight_decay[0], final=config.weight_decay[1]),
        momentum=cosine(base=config.momentum[0], final=config.momentum[1]),
        teacher_temp=linear_then_constant(step, start=first_temp, final=last_temp, num_steps=temp_steps),
    )


def apply_rates(optimizer: Optimizer, step: int, rates: Rates, config: TrainConfig) -> None:
    """Write a step's rates into the optimizer's groups; the last layer and the backbone may be frozen at first."""
    apply_schedules(
        optimizer,
        lr=rates.lr,
        last_layer_lr=last_layer_lr(step, rates.lr, freeze_steps=config.freeze_last_layer_steps),
        weight_decay=rates.weight_decay,
        backbone_lr=thawing_lr(
            step, rates.lr, freeze_steps=config.freeze_backbone_steps, warmup_steps=config.warmup_steps
        ),
    )
