"""What a step shows the model of its batch of B images: crops of side S, and masks of N patches, by the settings."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from ..config import TrainConfig
from .augment import apply_crops
from .crops import ViewSettings, draw_crops
from .images import Batch
from .masking import step_masks
from .packed import PackedImages


def decoded_side_px(config: TrainConfig) -> int:
    """Return the short side that larger images are shrunk to when read: twice that of the largest crop."""
    return 2 * max(config.global_crop_size_px, config.local_crop_size_px)


def preprocess_of(config: TrainConfig) -> Preprocess:
    """Return how pixels are read and normalised, and how the finished model wants its images."""
    is_rgb = config.in_chans == 3
    return Preprocess(
        image_size=config.global_crop_size_px,
        crop_ratio=config.crop_ratio,
        mean=config.pixel_mean or (IMAGENET_MEAN if is_rgb else (0.5,) * config.in_chans),
        std=config.pixel_std or (IMAGENET_STD if is_rgb else (0.25,) * config.in_chans),
        bit_depth=config.bit_depth,
    )


def view_settings(config: TrainConfig) -> tuple[ViewSettings, ViewSettings | None]:
    """Return how the two global views are drawn, and how the local ones are, if there are any."""
    preprocess = preprocess_of(config)
    shared = ("flip", "jitter", "jitter_strength", "grayscale", "blur_sigma_px")
    global_views = ViewSettings(
        size_px=config.global_crop_size_px,
        scale=config.global_crop_scale,
        blur=config.blur[:2],
        solarize=config.solarize[:2],
        mean=preprocess.mean,
        std=preprocess.std,
        **{name: getattr(config, name) for name in shared},
    )
    if not config.num_local_crops:
        return global_views, None
    return global_views, replace(
        global_views,
        size_px=config.local_crop_size_px,
        scale=config.local_crop_scale,
        blur=config.blur[2:] * config.num_local_crops,
        solarize=config.solarize[2:] * config.num_local_crops,
    )


class Views(NamedTuple):
    """What a step shows the model. Crops and masks are view-major: all first views, then all second views."""

    global_crops: Tensor  # (2 B, C, S, S), on the device
    local_crops: Tensor | None
    masks: NDArray[np.bool_]  # (2 B, N), on the host, True = masked
    num_replaced: int  # images that could not be read
    was_short: bool = False  # memory ran out, and the crops were made once more, after the step before


def make_views(batch: Batch, config: TrainConfig, device: torch.device) -> Views:
    """Return a batch's crops, made on the device, and its masks."""
    images = batch.images.on(device)
    global_views, local_views = view_settings(config)
    return Views(
        make_crops(images, batch.samples, config.seed, "global crops", global_views),
        make_crops(images, batch.samples, config.seed, "local crops", local_views) if local_views else None,
        make_masks(batch.samples, config),
        batch.num_replaced,
    )


def make_crops(
    images: PackedImages, samples: NDArray[np.int64], seed: int, purpose: str, views: ViewSettings
) -> Tensor:
    """Return the crops of one size of samples (B,), (views * B, C, S, S) view-major, on the device of their images."""
    crops = draw_crops(seed, purpose, samples, images.sizes, views)
    return apply_crops(images, crops, views.mean, views.std)


def make_masks(samples: NDArray[np.int64], config: TrainConfig) -> NDArray[np.bool_]:
    """Return the masks (2 B, N) of samples (B,), view-major; a sample's are the same whatever its batch and process."""
    side = config.global_crop_size_px // config.patch_size
    return step_masks(config.seed, samples, (side, side), config.mask_probability, config.mask_ratio)
