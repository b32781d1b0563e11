"""A sheet of what a run will see: the first dozen images, their crops as training draws them, and the masks.

Shapes as in `multicrop`.
"""

from dataclasses import replace
from itertools import chain, count, islice

import torch
from PIL import Image
from torch import Tensor

from ...features.sheet import Tile, check_picture_name, draw_sheet, is_picture_up_to_date, write_picture
from ...store.artifact import Options
from ...store.images import shown
from ...store.manifest import Provenance
from ..config import TrainConfig
from ..engine.schedules import batch_sizes
from .images import Batch, ImageSet, read_batches
from .multicrop import decoded_side_px, make_views, preprocess_of

NUM_IMAGES, TILE_PX = 12, 112
MASK_COLOUR = (0.53, 0.33, 0.75)  # of the patches that the student does not see: violet, which is rare in images


def draw_preview(output: str, images: ImageSet, config: TrainConfig, provenance: Provenance, options: Options) -> None:
    """Write the sheet of a run's first images as a PNG, unless it is up to date.

    Raises:
        ToolkitError: if the output is no PNG, or something else stands there and --force was not given.
    """
    path = check_picture_name(output)
    provenance = replace(provenance, kind="picture", command=f"{provenance.command} --preview")
    if is_picture_up_to_date(path, provenance, options):
        return
    batches = read_batches(
        images,
        seed=config.seed,
        batches=map(batch_sizes(config.batch_size).images_of, count()),
        short_side_px=decoded_side_px(config),
        in_chans=config.in_chans,
        bit_depth=config.bit_depth,
    )
    rows = chain.from_iterable(_rows(batch, step, config) for step, batch in enumerate(batches))
    note = f"image; two global crops of {config.global_crop_size_px} px, violet where the student's patches are masked"
    if config.num_local_crops:
        note += f"; {config.num_local_crops} local crops of {config.local_crop_size_px} px"
    sheet = draw_sheet(list(islice(rows, NUM_IMAGES)), title="What training sees", note=note, tile_px=TILE_PX)
    write_picture(sheet, path, provenance)


def _rows(batch: Batch, step: int, config: TrainConfig) -> list[list[list[Tile]]]:
    """Return the tiles of each image of a step: itself, its global crops, its local ones."""
    global_crops, local_crops, masks = make_views(batch, config, step, batch.images.device)
    views = [_masked(_pixels(global_crops, config), masks, config.patch_size)]
    views += [] if local_crops is None else [_pixels(local_crops, config)]
    groups = [crops.view(-1, len(batch.samples), *crops.shape[1:]) for crops in views]  # (V * B, ...) -> (V, B, ...)
    return [
        [
            [Tile(shown(batch.images[number, :height, :width].numpy()))],
            *([Tile(_as_image(view[number])) for view in group] for group in groups),
        ]
        for number, (height, width) in enumerate(batch.sizes)
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
