"""What patch features see: their principal components as colours, the background taken away.

Shapes: N patch tokens of all images together, D embed_dim, h and w patches down and across an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from ..features.sheet import Tile, check_picture_name, draw_sheet, is_picture_up_to_date, write_picture
from ..store.artifact import Options, Result
from ..store.manifest import Provenance
from ..store.pixels import as_image
from .whole import open_images, open_viewer

RANGE = (0.02, 0.98)  # quantiles of a component that become no colour and full colour; chosen against stray patches
PAIRS_A_ROW = 4
CLEAR_BORDER = 0.6  # chosen: the split is clear when the borders have less than this much of the inside's foreground
BACKGROUND = 18  # grey level of what was taken away


@dataclass(frozen=True)
class PcaSettings:
    """What `dinov2 evaluate pca` can be told, beside the options that all commands share."""

    model: str | None = None
    image_size: int | None = None  # short side in pixels; None: the model's own, or 8 patches
    null: bool = False  # names on stdin end in NUL


@dataclass(frozen=True)
class Colours:
    """The components of several images as colours."""

    images: list[npt.NDArray[np.uint8]]  # (h, w, 3) each
    foreground_share: float | None  # of all patches; None: no clear split, nothing was taken away


def draw_pca(arguments: list[str], output: str, settings: PcaSettings, options: Options) -> Result | None:
    """Draw images and the PCA of their patch features side by side; return None after a dry run.

    Raises ToolkitError when no image can be read, the model has no patch tokens, or the size does not suit it.
    """
    path = check_picture_name(output)
    images = open_images(arguments, str(path.absolute()), null=settings.null, limit=options.limit)
    viewer = open_viewer(settings.model, settings.image_size, options.seed)
    provenance = Provenance(
        kind="picture",
        command="evaluate pca",
        parameters={"image_size": viewer.side_px, "limit": options.limit},
        seed=options.seed,
        inputs=(*images.inputs, viewer.source),
    )
    if is_picture_up_to_date(path, provenance, options):
        return None if options.dry_run else Result(output)
    if options.dry_run:
        console.say(f"would draw the patch features of {len(images.named)} images at {viewer.side_px} px to {path}")
        return None

    pictures: list[Image.Image] = []
    captions: list[str] = []
    tokens: list[Tensor] = []
    for uri, caption in images.named:
        picture = viewer.read(uri)
        if picture is not None:
            tokens.append(viewer.patch_tokens(picture))
            pictures.append(as_image(picture))
            captions.append(caption)
    if not pictures:
        raise ToolkitError(f"none of the {len(images.named)} images can be read; name others")
    colours = colour_patches(tokens, [viewer.grid(picture) for picture in pictures])
    if colours.foreground_share is None:
        note = "no clear background: components 1, 2, 3 of all patches as red, green, blue"
        console.warn("the first component separates no background from the image borders; nothing was taken away")
    else:
        note = (
            f"components 2, 3, 4 as red, green, blue; background by component 1 ({colours.foreground_share:.0%} kept)"
        )
    pairs = [
        [Tile(picture, caption), Tile(_enlarged(image, picture))]
        for picture, caption, image in zip(pictures, captions, colours.images, strict=True)
    ]
    rows = [pairs[start : start + PAIRS_A_ROW] for start in range(0, len(pairs), PAIRS_A_ROW)]
    title = f"Principal components of patch features: {viewer.name}, {viewer.side_px} px"
    write_picture(draw_sheet(rows, title=title, note=note), path, provenance)
    figures: dict[str, object] = {"images": len(pictures), "foreground_share": colours.foreground_share}
    return Result(output, figures)


def colour_patches(tokens: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Colours:
    """Turn patch tokens of several images, (h * w, D) each, into colours that mean the same in all of them.

    The first principal component of all patches splits foreground and background, where the variance between both
    sides is largest; the background is the side that has more of the image borders. Of the foreground, the next
    three components are red, green and blue. Where the first component does not follow the borders, nothing is
    taken away and the first three are shown.

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
    border = torch.cat([_on_border(height, width) for height, width in grids])
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


def _on_border(height: int, width: int) -> Tensor:
    """Return which patches of a grid lie at its edge, (h * w,)."""
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return ~inside.flatten()


def _enlarged(image: npt.NDArray[np.uint8], picture: Image.Image) -> Image.Image:
    """Return one pixel a patch as large as the picture that it belongs to."""
    return Image.fromarray(image).resize(picture.size, Image.Resampling.NEAREST)
