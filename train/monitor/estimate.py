"""What a run will cost, said before it starts: operations, memory, and time by a trial of a few steps."""

import math
import time
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ... import console
from ...features.extract.extract import best_device
from ..config import TrainConfig
from ..data.multicrop import make_masks
from ..engine.accumulate import microbatch_backward
from ..engine.build import build_model
from ..engine.checkpoint import TrainedModel
from ..engine.half_precision import HALF, supported
from ..engine.optimizer import build_optimizer
from ..engine.schedules import batch_sizes
from ..objective.micro_batch import split_microbatches
from ..objective.networks import update_teacher
from .flop import flop_per_image
from .memory import memory_bytes

TRIAL_DEPTH, TRIAL_IMAGES, TRIAL_STEPS = 2, 8, 3  # chosen; the first step warms up


def measured_flops(config: TrainConfig, device: torch.device) -> float:
    """Return the operations a second that this process reaches in a few steps of a shallow model of this width.

    Random crops and two blocks, everything else as in training, so that it takes seconds whatever the model's size.
    """
    depth, half = min(TRIAL_DEPTH, config.depth or TRIAL_DEPTH), HALF[supported(config.mixed_precision)]
    shallow = replace(config, depth=depth, activation_checkpointing="none", compile=False)
    model = build_model(shallow).to(device).train()
    optimizer = build_optimizer(model.student)
    num_images = min(TRIAL_IMAGES, batch_sizes(config.batch_size).at(0))
    crops = [
        torch.randn(number * num_images, config.in_chans, side, side, device=device)
        for number, side in ((2, config.global_crop_size_px), (config.num_local_crops, config.local_crop_size_px))
    ]
    masks = make_masks(np.arange(num_images), config)
    fastest = math.inf
    for _ in range(TRIAL_STEPS):
        start = _now(device)
        with torch.autocast(device.type, half, enabled=half is not None):
            step = model.teacher_targets(crops[0], crops[1] if len(crops[1]) else None, masks, teacher_temp=1.0)
            for batch in split_microbatches(step, sequential_views=config.sequential_views):
                microbatch_backward(model, batch, Tensor.backward, seed=0)
        optimizer.step()
        optimizer.zero_grad()
        update_teacher(model.teacher, model.student, 1.0)
        fastest = min(fastest, _now(device) - start)
    return num_images * flop_per_image(shallow, model) / fastest


def say_cost(config: TrainConfig, model: TrainedModel, num_processes: int, base_bytes: float) -> None:
    """Say what a step computes, how much memory a process will take, and how long the run, by a trial on this machine.

    `model` may be on the meta device. A process holds `base_bytes` besides: libraries, the manifest, decoded images.
    """
    device = best_device()
    flop = flop_per_image(config, model)
    memory = memory_bytes(config, model, num_processes, base_bytes)
    speed = measured_flops(config, device)
    images = batch_sizes(config.batch_size).images_until(config.steps)
    workers = num_processes if device.type == "cuda" else 1  # processes share this machine's cores
    console.say(
        f"{flop / 1e9:,.2f} GFLOP an image; about {memory / 2**20:,.0f} MiB of memory a process at the peak; "
        f"about {_duration(images * flop / (workers * speed))}, if data are there in time, at the "
        f"{speed / 1e9:,.{0 if speed > 1e10 else 1}f} GFLOP/s that a trial of a few steps reached here"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
