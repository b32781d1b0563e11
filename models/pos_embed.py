"""Position embeddings, stored for one square grid of patches, for every other grid.

Shapes: M x M patches of the stored grid, D embed_dim.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolated(pos_embed: Tensor, rows: int, columns: int, *, antialias: bool, offset: float) -> Tensor:
    """Return a position embedding (1, 1 + M M, D), the class token's first, as (1, 1 + rows * columns, D).

    It is resized bicubically in float32: with an offset above 0 by the scale factor (grid + offset) / M, with 0 to the
    grid's size.
    """
    side = math.isqrt(pos_embed.shape[1] - 1)
    if rows == columns == side:
        return pos_embed
    stored = pos_embed.float()
    grid = stored[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, M M, D) -> (1, D, M, M)
    if offset:
        grid = _bicubic(grid, antialias, scale_factor=((rows + offset) / side, (columns + offset) / side))
    else:
        grid = _bicubic(grid, antialias, size=(rows, columns))
    # (1, D, rows, columns) -> (1, rows * columns, D)
    return torch.cat([stored[:, :1], grid.flatten(2).transpose(1, 2)], dim=1).to(pos_embed.dtype)


def _bicubic(
    grid: Tensor,
    antialias: bool,
    *,
    size: tuple[int, int] | None = None,
    scale_factor: tuple[float, float] | None = None,
) -> Tensor:
    """Resize (1, D, H, W). Where torch is to be deterministic, by a matrix: its own gradient on a GPU is not."""
    resize = partial(F.interpolate, size=size, scale_factor=scale_factor, mode="bicubic", antialias=antialias)
    if not torch.are_deterministic_algorithms_enabled():
        return resize(grid)
    height, width = grid.shape[2:]
    with torch.autocast(grid.device.type, enabled=False):
        one_hot = torch.eye(height * width, device=grid.device).view(-1, 1, height, width)
        weights = resize(one_hot)  # (H W, 1, rows, columns)
        return (grid.flatten(2) @ weights.flatten(1)).view(*grid.shape[:2], *weights.shape[2:])
