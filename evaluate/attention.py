"""Attention of the last block: of the class token, head by head, and of the registers.

Shapes: C channels, H and W pixels, N patch tokens, R register tokens, n = 1 + R + N tokens, D embed_dim.
"""

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ..features.extract.extract import best_device
from ..features.sheet import Tile, draw_sheet
from ..models.block import Block
from ..models.preprocess import normalise
from ..models.vit import VisionTransformer
from ..store.artifact import Options, Result
from ..store.pixels import Picture, as_image
from .pictures import Drawn, PatchModel, PictureSettings, draw_images, pixels_of

HEAT = np.array([(12, 8, 38), (106, 23, 110), (221, 81, 58), (252, 165, 10), (252, 255, 164)])  # from none to most
BRIGHTEST = 0.98  # quantile of a map that is shown as most, for single patches may draw most of it


def draw_attention(arguments: list[str], output: str, settings: PictureSettings, options: Options) -> Result | None:
    """Draw images and, beside each, where the class token and the registers look; return None after a dry run.

    Raises ToolkitError when no image can be read, the model has no patch tokens, or the size does not suit it.
    """
    return draw_images("attention", arguments, output, settings, options, what="the attention on", draw=_draw)


def _draw(model: PatchModel, pictures: list[Picture], captions: list[str]) -> Drawn:
    shown = zip(pictures, captions, strict=True)
    rows = [[[Tile(as_image(picture), caption)], *_maps(model, picture)] for picture, caption in shown]
    note = "of the class token to the patches, mean and head by head"
    if model.backbone.num_register_tokens:
        note += "; then of each register, mean of the heads"
    note += f"; each map from none to its own {BRIGHTEST:.0%} quantile"
    picture = draw_sheet(rows, title=f"Attention in the last block: {model.title}", note=note)
    return picture, {"images": len(rows), "heads": model.backbone.num_heads}


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


def _maps(model: PatchModel, picture: Picture) -> list[list[Tile]]:
    """Return the maps of one image: of the class token, and of the registers where there are any."""
    with torch.inference_mode():
        images = normalise(pixels_of(picture).to(best_device()), model.model.preprocess)
        attention = last_attention(model.backbone, images)[0].float().cpu().numpy()
    first_patch = attention.shape[1]
    # (heads, 1 + R, n) -> (heads, 1 + R, h, w)
    to_patches = attention[:, :, first_patch:].reshape(*attention.shape[:2], *model.grid(picture))
    mean = to_patches.mean(axis=0)
    heads = [Tile(heat(each, picture.size), f"head {number}") for number, each in enumerate(to_patches[:, 0], 1)]
    registers = [Tile(heat(each, picture.size), f"register {number}") for number, each in enumerate(mean[1:], 1)]
    groups = [[Tile(heat(mean[0], picture.size), "class token"), *heads], registers]
    return [group for group in groups if group]


def heat(values: npt.NDArray[np.float32], size: tuple[int, int]) -> Image.Image:
    """Return a map (h, w) as colours, its BRIGHTEST quantile the brightest, enlarged to `size` pixels."""
    shares = values / max(float(np.quantile(values, BRIGHTEST)), 1e-12)
    places = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(shares, places, channel) for channel in HEAT.T], axis=2)
    return Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
