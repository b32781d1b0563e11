"""What the last block looks at: attention of the class token, head by head, and of the registers.

Shapes: C channels, H and W pixels, N patch tokens, R register tokens, n = 1 + R + N tokens, D embed_dim.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from ..features.sheet import Tile, check_picture_name, draw_sheet, is_picture_up_to_date, write_picture
from ..models.block import Block
from ..models.vit import VisionTransformer
from ..store.artifact import Options, Result
from ..store.manifest import Provenance
from ..store.pixels import Picture, as_image
from .whole import Viewer, open_images, open_viewer

HEAT = np.array([(12, 8, 38), (106, 23, 110), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # from none to most

BRIGHTEST = 0.98  # of a map's values the quantile that is shown as most, for single patches may draw most of it


@dataclass(frozen=True)
class AttentionSettings:
    """What `dinov2 evaluate attention` can be told, beside the options that all commands share."""

    model: str | None = None
    image_size: int | None = None  # short side in pixels; None: the model's own, or 8 patches
    null: bool = False  # names on stdin end in NUL


def draw_attention(arguments: list[str], output: str, settings: AttentionSettings, options: Options) -> Result | None:
    """Draw images and, beside each, where the class token and the registers look; return None after a dry run.

    Raises ToolkitError when no image can be read, the model has no patch tokens, or the size does not suit it.
    """
    path = check_picture_name(output)
    images = open_images(arguments, str(path.absolute()), null=settings.null, limit=options.limit)
    viewer = open_viewer(settings.model, settings.image_size, options.seed)
    provenance = Provenance(
        kind="picture",
        command="evaluate attention",
        parameters={"image_size": viewer.side_px, "limit": options.limit},
        seed=options.seed,
        inputs=(*images.inputs, viewer.source),
    )
    if is_picture_up_to_date(path, provenance, options):
        return None if options.dry_run else Result(output)
    if options.dry_run:
        console.say(f"would draw the attention on {len(images.named)} images at {viewer.side_px} px to {path}")
        return None

    rows = []
    for uri, caption in images.named:
        picture = viewer.read(uri)
        if picture is not None:
            rows.append([[Tile(as_image(picture), caption)], *_maps(viewer, picture)])
    if not rows:
        raise ToolkitError(f"none of the {len(images.named)} images can be read; name others")
    title = f"Attention in the last block: {viewer.name}, {viewer.side_px} px"
    note = "of the class token to the patches, mean and head by head"
    if viewer.backbone.num_register_tokens:
        note += "; then of each register, mean of the heads"
    note += f"; each map from none to its own {BRIGHTEST:.0%} quantile"
    write_picture(draw_sheet(rows, title=title, note=note), path, provenance)
    return Result(output, {"images": len(rows), "heads": viewer.backbone.num_heads})


def last_attention(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """Return the attention of the class token and the registers in the last block, (B, heads, 1 + R, n).

    A row is a softmax over all tokens of the sequence (class, registers, patches): it sums to 1.
    """
    *first_blocks, last_block = backbone.blocks
    tokens, groups = backbone.embed_packed([images], [None])
    for block in first_blocks:
        tokens = block(tokens, groups)
    ((sequences, length),) = groups
    assert isinstance(last_block, Block)
    # (B n, 3 D) -> 3 x (B, heads, n, D / heads)
    packed = last_block.attn.qkv(last_block.norm1(tokens)).view(sequences, length, 3, backbone.num_heads, -1)
    query, key, _ = packed.permute(2, 0, 3, 1, 4).unbind(0)
    query = query[:, :, : 1 + backbone.num_register_tokens]
    return torch.softmax(query @ key.transpose(2, 3) / key.shape[3] ** 0.5, dim=3)


def _maps(viewer: Viewer, picture: Picture) -> list[list[Tile]]:
    """Return the maps of one picture: of the class token, and of the registers where there are any."""
    with torch.inference_mode():
        attention = last_attention(viewer.backbone, viewer.normalised(picture))[0].float().cpu().numpy()
    grid = viewer.grid(picture)
    first_patch = attention.shape[1]
    to_patches = attention[:, :, first_patch:].reshape(*attention.shape[:2], *grid)  # (heads, 1 + R, h, w)
    heads = [Tile(heat(of_head, picture.size), f"head {number}") for number, of_head in enumerate(to_patches[:, 0], 1)]
    mean = to_patches.mean(axis=0)
    registers = [Tile(heat(of, picture.size), f"register {number}") for number, of in enumerate(mean[1:], 1)]
    groups = [[Tile(heat(mean[0], picture.size), "class token"), *heads], registers]
    return [group for group in groups if group]


def heat(values: npt.NDArray[np.float32], size: tuple[int, int]) -> Image.Image:
    """Return a map (h, w) as colours, its BRIGHTEST quantile the brightest, enlarged to `size` pixels."""
    shares = values / max(float(np.quantile(values, BRIGHTEST)), 1e-12)
    places = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(shares, places, channel) for channel in HEAT.T], axis=2)
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
