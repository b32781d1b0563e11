"""What a run says before it begins: its model, its length, and the time and memory that it will take."""

from collections.abc import Callable

import torch

from .. import console
from ..features.extract.extract import best_device
from ..models.vit import VisionTransformer
from .config import TrainConfig
from .data.images import ImageSet, decoded_bytes
from .data.multicrop import decoded_side_px
from .engine.checkpoint import TrainedModel
from .engine.schedules import batch_sizes, scaled_lr
from .monitor.estimate import say_cost
from .monitor.memory import fitted, free_bytes_of
from .monitor.metrics import peak_memory_mib


def describe(config: TrainConfig, num_images: int, model: TrainedModel, num_processes: int) -> None:
    """Say what a run trains on how many images, and for how long."""
    backbones = [part for part in model.student.values() if isinstance(part, VisionTransformer)]
    backbone = sum(weight.numel() for part in backbones for weight in part.parameters())
    heads = sum(weight.numel() for weight in model.student.parameters()) - backbone
    sizes = batch_sizes(config.batch_size)
    samples = sizes.images_until(config.steps)
    batch = f"{sizes.at(0)}" if len(sizes.sizes) == 1 else f"{sizes.at(0)} to {sizes.at(config.steps - 1)}"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    console.say(
        f"{config.arch}: {backbone / 1e6:.2f} M parameters, {heads / 1e6:.2f} M more in heads; "
        f"{config.steps:,} steps of {batch} images in {processes}: {samples:,} samples, "
        f"{samples / num_images:.1f} passes over {num_images:,} images; peak learning rate "
        f"{scaled_lr(config.base_lr, sizes.at(0)):.2e} (base_lr * sqrt(batch_size / 1024))"
    )


def describe_cost(config: TrainConfig, images: ImageSet, build: Callable[[], TrainedModel], num_processes: int) -> None:
    """Say what a run would train, and what time and memory it would take."""
    device = best_device()
    base_bytes = held_bytes(config, images, device)  # before torch loads what a meta device needs
    with torch.device("meta"):
        model = build()
    describe(config, len(images), model, num_processes)
    free_bytes = free_bytes_of(device, base_bytes, num_processes)
    config = fitted(config, model, num_processes, base_bytes, free_bytes)
    say_cost(config, model, num_processes, base_bytes)


def held_bytes(config: TrainConfig, images: ImageSet, device: torch.device) -> float:
    """Return what this process holds without a model, and with the images it keeps decoded; 0 where a GPU trains."""
    if device.type == "cuda":
        return 0.0
    num_seen = min(len(images), batch_sizes(config.batch_size).images_until(config.steps))
    side_px = decoded_side_px(config)
    decoded = num_seen * decoded_bytes(images, side_px, config.in_chans, config.bit_depth, config.limits)
    return peak_memory_mib(device) * 2**20 + min(config.cache_mib << 20, decoded)
