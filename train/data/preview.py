"""A sheet of what a run will see: the first dozen images, their crops as training draws them, and the masks.

Shapes as in `multicrop`.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, takewhile

import torch
from PIL import Image
from torch import Tensor

from ...features.sheet import (
    Tile,
    check_picture_name,
    draw_sheet,
    is_picture_up_to_date,
    picture_provenance,
    write_picture,
)
from ...store.artifact import Options, check_not_input
from ...store.images import shown
from ...store.lock import writing
from ...store.manifest import Provenance
from ..config import TrainConfig
from ..engine.schedules import batch_sizes
from .images import Batch, ImageSet, read_batches
from .multicrop import decoded_side_px, make_crops, make_masks, preprocess_of, view_settings

NUM_IMAGES, TILE_PX = 12, 112
MASK_COLOUR = (0.53, 0.33, 0.75)  # of the patches that the student does not see: violet, which is rare in images


def draw_preview(output: str, images: ImageSet, config: TrainConfig, provenance: Provenance, options: Options) -> None:
    """Write the sheet of a run's first images as a PNG, unless it is up to date.

    Raises:
        ToolkitError: if the output is no PNG, or something else stands there and --force was not given.
    """
    path = check_picture_name(output)
    provenance = replace(provenance, kind="picture", command=f"{provenance.command} --preview")
    check_not_input(path, provenance, picture_provenance)
    if is_picture_up_to_date(path, provenance, options):
        return
    note = f"image; two global crops of {config.global_crop_size_px} px, violet where the student's patches are masked"
    if config.num_local_crops:
        note += f"; {config.num_local_crops} local crops of {config.local_crop_size_px} px"
    with writing(path):
        rows = list(preview_rows(images, config, NUM_IMAGES))
        write_picture(draw_sheet(rows, title="What training sees", note=note, tile_px=TILE_PX), path, provenance)


def preview_rows(images: ImageSet, config: TrainConfig, num_images: int) -> Iterator[list[list[Tile]]]:
    """Yield the tiles of a run's first images in one process: the image, its global crops with masks, its local ones.

    No other images of their batches are read. Raises ToolkitError when a thousand images in a row cannot be read.
    """
    sizes = batch_sizes(config.batch_size)
    steps = list(takewhile(lambda step: sizes.images_until(step) < num_images, count()))
    samples = (range(batch.start, min(batch.stop, num_images)) for batch in map(sizes.images_of, steps))
    batches = read_batches(
        images,
        seed=config.seed,
        batches=samples,
        short_side_px=decoded_side_px(config),
        in_chans=config.in_chans,
        bit_depth=config.bit_depth,
        limits=config.limits,
    )
    for batch in batches:
        yield from _rows(batch, config)


def _rows(batch: Batch, config: TrainConfig) -> list[list[list[Tile]]]:
    """Return the tiles of each image of a batch: itself, its global crops, its local ones."""
    masks = torch.from_numpy(make_masks(batch.samples, config))
    global_views, local_views = view_settings(config)
    drawn = batch.images, batch.samples, config.seed
    global_crops = make_crops(*drawn, "global crops", global_views)
    local_crops = make_crops(*drawn, "local crops", local_views) if local_views else None
    views = [_masked(_pixels(global_crops, config), masks, config.patch_size)]
    views += [] if local_crops is None else [_pixels(local_crops, config)]
    groups = [crops.view(-1, len(batch.samples), *crops.shape[1:]) for crops in views]  # (V * B, ...) -> (V, B, ...)
    return [
        [
            [Tile(shown(batch.images.image(number).numpy()))],
            *([Tile(_as_image(view[number])) for view in group] for group in groups),
        ]
        for number in range(len(batch.samples))
    ]


def _pixels(crops: Tensor, config: TrainConfig) -> Tensor:
    """Return normalised crops (n, C, S, S) as RGB in [0, 1], (n, 3, S, S): the first three channels, or one as grey.

    `shown` does the same with the image itself.
    """
    preprocess = preprocess_of(config)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    pixels = (crops * std + mean).clamp(0, 1)
    return pixels[:, :3] if config.in_chans >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def _masked(pixels: Tensor, masks: Tensor, patch_size: int) -> Tensor:
    """Return pixels (n, 3, S, S) with the masked patches, (n, N) bool, in one colour."""
    side = pixels.shape[-1] // patch_size
    # (n, N) -> (n, 1, S, S)
    covered = masks.view(-1, 1, side, side).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return torch.where(covered, torch.tensor(MASK_COLOUR).view(-1, 1, 1), pixels)


def _as_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
