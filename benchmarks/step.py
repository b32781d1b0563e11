"""The training step that `dinov2 train pretrain` runs, on random crops: what the benchmarks of it time.

Shapes: B images, 2 global and L local crops of each, of side S and s, C channels, N patch tokens of a global crop.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from dinov2_toolkit.train.config import TrainConfig
from dinov2_toolkit.train.data.multicrop import make_masks
from dinov2_toolkit.train.engine.accumulate import forward_backward
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.engine.optimizer import apply_schedules, clip_gradients, not_finite, step_unless
from dinov2_toolkit.train.engine.parallelize import prepare
from dinov2_toolkit.train.engine.schedules import scaled_lr
from dinov2_toolkit.train.objective.networks import update_teacher

Batch = tuple[Tensor, Tensor | None, NDArray[np.bool_]]  # global crops, local crops and masks, as `make_views` has them


def random_batch(config: TrainConfig, num_images: int, device: torch.device, number: int = 0) -> Batch:
    """Return the number-th batch: crops (2 B, C, S, S), (L B, C, s, s) of normal numbers, and masks (2 B, N)."""
    sizes = ((2, config.global_crop_size_px), (config.num_local_crops, config.local_crop_size_px))
    crops = [torch.randn(views * num_images, config.in_chans, side, side, device=device) for views, side in sizes]
    samples = np.arange(number * num_images, (number + 1) * num_images)
    return crops[0], crops[1] if len(crops[1]) else None, make_masks(samples, config)


def training_step(config: TrainConfig, accelerator: Accelerator, num_images: int) -> Callable[[Batch], Tensor]:
    """Return a function that trains a new model on a batch of so many images, as `train` does, and returns the loss.

    It raises torch.OutOfMemoryError where training would go on with a smaller micro-batch.
    """
    model = build_model(config).train()
    wrapped, optimizer, *_ = prepare(model, config, accelerator)
    lr = scaled_lr(config.base_lr, num_images)
    apply_schedules(optimizer, lr=lr, last_layer_lr=lr, weight_decay=config.weight_decay[0])
    seeds = itertools.count()

    def step(batch: Batch) -> Tensor:
        micro_batch_size = int(config.micro_batch_size)
        with accelerator.autocast():
            targets = model.teacher_targets(
                *batch, teacher_temp=config.teacher_temp[0], micro_batch_size=micro_batch_size
            )
        outputs = forward_backward(
            wrapped,
            targets,
            accelerator,
            seed=next(seeds),
            sequential_views=config.sequential_views,
            micro_batch_size=micro_batch_size,
        )
        norms = clip_gradients(model.student, config.clip_grad_norm)
        is_bad = not_finite([outputs["total"], *norms.values()])
        step_unless(is_bad, optimizer)
        update_teacher(model.teacher, model.student, config.momentum[0], is_bad)
        optimizer.zero_grad()
        return outputs["total"]

    return step
