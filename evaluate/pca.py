"""Principal components of patch features as colours, the background removed.

Shapes: N patch tokens of all images together, D embed_dim, h and w patches down and across an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from .. import console
from ..features.sheet import Tile, draw_sheet
from ..store.artifact import Options, Result
from ..store.pixels import Picture, as_image
from .pictures import Drawn, PatchModel, PictureSettings, draw_images

RANGE = (0.02, 0.98)  # quantiles of a component that become no colour and full colour; chosen against stray patches
PAIRS_A_ROW = 4
CLEAR_BORDER = 0.6  # chosen: the split is clear when the borders have less than this much of the inside's foreground
BACKGROUND = 18  # grey level of the background


@dataclass(frozen=True)
class Colours:
    """The components of several images as colours."""

    images: list[npt.NDArray[np.uint8]]  # (h, w, 3) each
    foreground_share: float | None  # of all patches; None: no clear split, no background removed


def draw_pca(arguments: list[str], output: str, settings: PictureSettings, options: Options) -> Result | None:
    """Draw images and the PCA of their patch features side by side; return None after a dry run.

    Raises ToolkitError when no image can be read, the model has no patch tokens, or the size does not suit it.
    """
    return draw_images("pca", arguments, output, settings, options, what="the patch features of", draw=_draw)


def _draw(model: PatchModel, pictures: list[Picture], captions: list[str]) -> Drawn:
    tokens, grids = [model.patch_tokens(picture) for picture in pictures], [model.grid(picture) for picture in pictures]
    colours = colour_patches(tokens, grids)
    if colours.foreground_share is None:
        note = "no clear background: components 1, 2, 3 of all patches as red, green, blue"
        console.warn("the first component separates no background from the image borders; no background was removed")
    else:
        kept = f"{colours.foreground_share:.0%} kept"
        note = f"components 2, 3, 4 as red, green, blue; background by component 1 ({kept})"
    pairs = []
    for picture, caption, image in zip(pictures, captions, colours.images, strict=True):
        enlarged = Image.fromarray(image).resize(picture.size, Image.Resampling.NEAREST)  # from one pixel a patch
        pairs.append([Tile(as_image(picture), caption), Tile(enlarged)])
    rows = [pairs[start : start + PAIRS_A_ROW] for start in range(0, len(pairs), PAIRS_A_ROW)]
    picture = draw_sheet(rows, title=f"Principal components of patch features: {model.title}", note=note)
    return picture, {"images": len(pictures), "foreground_share": colours.foreground_share}


def colour_patches(tokens: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Colours:
    """Turn patch tokens of several images, (h * w, D) each, into colours that mean the same in all of them.

    The first principal component of all patches splits foreground and background, where the variance between both
    sides is largest; the background is the side that has more of the image borders. Of the foreground, the next
    three components are red, green and blue. Where the first component does not follow the borders, no background is
    removed and the first three are shown.
    Source: figure 1 of Oquab et al. 2023 (DINOv2). There, the threshold is 0; here it is found, for a small
    foreground pulls the mean away from the gap.
    """
    features = torch.cat(list(tokens)).double()  # (N, D)
    features = features - features.mean(dim=0)
    foreground = find_foreground(features, grids)
    if foreground is None:
        share, kept = None, torch.ones(len(features), dtype=torch.bool)
        projected = features @ principal_directions(features, 3)
    else:
        share, kept = float(foreground.double().mean()), foreground
        direction = principal_directions(features, 1)
        rest = features - features @ direction @ direction.T
        projected = rest @ principal_directions(rest[kept] - rest[kept].mean(dim=0), 3)
    low, high = torch.quantile(projected[kept], torch.tensor(RANGE, dtype=torch.float64), dim=0)
    shades = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    shades[~kept] = BACKGROUND
    parts = torch.split(shades.round().to(torch.uint8), [height * width for height, width in grids])
    images = [part.view(*grid, 3).numpy() for part, grid in zip(parts, grids, strict=True)]  # (h w, 3) -> (h, w, 3)
    return Colours(images, share)


def principal_directions(centred: Tensor, count: int) -> Tensor:
    """Return the first principal directions (D, count) of centred features (N, D), float64.

    Their sign is free; the entry of largest magnitude is made positive, so that it is always the same.
    """
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # eigenvalues ascend
    directions = vectors[:, -count:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    signed: Tensor = directions * torch.sign(largest)
    return signed


def find_foreground(features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor | None:
    """Return which patches (N,) are foreground by the first component of centred features (N, D), float64.

    None where the first component does not follow the borders of the images.
    """
    first = (features @ principal_directions(features, 1))[:, 0]
    inside_of = (torch.zeros(height - 2, width - 2) for height, width in grids)
    border = torch.cat([pad(inside, (1, 1, 1, 1), value=1).flatten() for inside in inside_of]).bool()
    above = first > best_split(first)
    foreground = above if above[border].double().mean() < above[~border].double().mean() else ~above
    at_border, inside = foreground[border].double().mean(), foreground[~border].double().mean()
    return foreground if at_border < CLEAR_BORDER * inside else None


def best_split(values: Tensor) -> float:
    """Return the threshold that leaves the least variance on its two sides (Otsu 1979), of values (N,)."""
    ordered = values.sort().values
    count = torch.arange(1, len(ordered), dtype=torch.float64)
    below = ordered.cumsum(0)[:-1]
    above = ordered.sum() - below
    between = below**2 / count + above**2 / (len(ordered) - count)
    place = int(between.argmax())
    return float(ordered[place] + ordered[place + 1]) / 2
