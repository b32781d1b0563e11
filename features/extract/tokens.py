"""The tokens that describe an image: class token, mean of the patches, or every patch; of one block or several.

Shapes: B images, N patch tokens, D embed_dim, L blocks, E numbers an image, T tiles, R register tokens,
rows x columns patches of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from ...models.vit import Features
from .windows import Layout

Tokens = Literal["cls", "mean", "cls+mean", "patches"]


@dataclass(frozen=True)
class TokenChoice:
    """What to keep of a model's tokens."""

    tokens: Tokens = "cls"
    layers: int = 1  # the last so many blocks, the final norm applied to each

    def dim(self, embed_dim: int) -> int:
        """Return E, the length of an image's vector."""
        return embed_dim * (self.layers + (self.tokens == "cls+mean"))

    @property
    def suffix(self) -> str:
        """Return what sets vectors of this choice apart from the model's class tokens; nothing where they are those."""
        tokens = "" if self.tokens in ("cls", "patches") else f"+{self.tokens}"
        return tokens + (f"+{self.layers}-layers" if self.layers > 1 else "")


def image_vectors(features: Sequence[Features], choice: TokenChoice) -> Tensor:
    """Return the vectors (B, E) of B images.

    cls (and patches): the class tokens of the L blocks behind one another. mean: the same of the means of all patch
    tokens. cls+mean: the class tokens, and behind them the mean of the last block, as DINOv2's linear probes take it.

    Args:
        features: of the L blocks, from first to last.
    """
    class_tokens = [block.cls_token for block in features]
    if choice.tokens in ("cls", "patches"):
        return torch.cat(class_tokens, dim=-1)
    means = [block.patch_tokens.mean(dim=1) for block in features]
    if choice.tokens == "mean":
        return torch.cat(means, dim=-1)
    return torch.cat([*class_tokens, means[-1]], dim=-1)


def patch_vectors(features: Sequence[Features]) -> Tensor:
    """Return the patch tokens of the L blocks behind one another, (B, N, L D)."""
    return torch.cat([block.patch_tokens for block in features], dim=-1)


def chosen_tokens(
    features: Sequence[Features], choice: TokenChoice, layouts: Sequence[Layout]
) -> tuple[Tensor, list[Tensor]]:
    """Return the vectors (B, E) of B images and, if those were chosen, the patches of each, (rows, columns, L D).

    Args:
        features: of the L blocks: of the images, or of all their tiles.
        layouts: (B,) of tiles; empty if the images were not cut.
    """
    wants_patches = choice.tokens == "patches"
    with torch.inference_mode():
        if not layouts:
            patches = patch_vectors(features) if wants_patches else features[0].patch_tokens[:0]
            side = round(patches.shape[1] ** 0.5)
            return image_vectors(features, choice), [image.view(side, side, -1) for image in patches]
        counts = [layout.num_tiles for layout in layouts]
        tiles = [zip(*(torch.split(tensor, counts) for tensor in _tensors(block)), strict=True) for block in features]
        images = [
            [stitch(Features(*tensors), layout) for tensors in blocks]
            for *blocks, layout in zip(*tiles, layouts, strict=True)
        ]
        vectors = torch.cat([image_vectors(blocks, choice) for blocks in images])
        if not wants_patches:
            return vectors, []
        shapes = [(layout.rows, layout.columns, -1) for layout in layouts]
        return vectors, [patch_vectors(blocks)[0].view(shape) for blocks, shape in zip(images, shapes, strict=True)]


def stitch(tiles: Features, layout: Layout) -> Features:
    """Return the features of a whole image, as a batch of one, from those of its T tiles.

    Class (and register) tokens are averaged over the tiles; where tiles overlap, their patch tokens are.
    """
    side = round(tiles.patch_tokens.shape[1] ** 0.5)  # patches a side of a tile
    grids = tiles.patch_tokens.float().view(layout.num_tiles, side, side, -1)  # (T, N, D) -> (T, side, side, D)
    total = grids.new_zeros((layout.rows, layout.columns, grids.shape[-1]))
    count = grids.new_zeros((layout.rows, layout.columns, 1))
    for grid, (top, left) in zip(grids, product(layout.tops, layout.lefts), strict=True):
        total[top : top + side, left : left + side] += grid
        count[top : top + side, left : left + side] += 1
    patches = (total / count).flatten(0, 1)  # (rows, columns, D) -> (rows * columns, D)
    return Features(
        tiles.cls_token.float().mean(dim=0)[None], tiles.register_tokens.float().mean(dim=0)[None], patches[None]
    )


def concatenate(parts: Sequence[Features]) -> Features:
    """Return the features of several batches as those of one."""
    return Features(*(torch.cat(tensors) for tensors in zip(*map(_tensors, parts), strict=True)))


def _tensors(features: Features) -> tuple[Tensor, Tensor, Tensor]:
    return features.cls_token, features.register_tokens, features.patch_tokens
