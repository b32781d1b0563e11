"""What patch features see: their principal components as colours, the background taken away.

Shapes: N patch tokens of all images together, D embed_dim, h and w patches down and across an image.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from ..features.extract import FeatureModel, best_device, forward, open_model
from ..features.sheet import Tile, check_picture_name, draw_sheet, is_picture_up_to_date, write_picture
from ..models.vit import VisionTransformer
from ..store.artifact import Options, Result
from ..store.images import ColourMode, UnreadableImage, decode_sized, read_bytes
from ..store.manifest import Provenance, Source
from ..store.sources import entries, open_sources, survey

LONGEST_SIDES = 4  # a longer picture is cut to its middle, this many times as long as it is wide
RANGE = (0.02, 0.98)  # quantiles of a component that become no colour and full colour; chosen against stray patches
PAIRS_A_ROW = 4
MIN_PATCHES = 8  # chosen: fewer a side show no parts, so images are enlarged for models that see fewer
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
    sources = open_sources(arguments, null=settings.null)
    model = open_model(settings.model, options.seed)
    backbone, side_px = _backbone(model), _side_px(model, settings.image_size)
    own = {str(path.absolute())}
    inputs = [Source("images", source.path, survey(source, own.__contains__)[0]) for source in sources]
    provenance = Provenance(
        kind="picture",
        command="evaluate pca",
        parameters={"image_size": side_px, "limit": options.limit},
        seed=options.seed,
        inputs=(*inputs, model.source),
    )
    if is_picture_up_to_date(path, provenance, options):
        return None if options.dry_run else Result(output)
    listed = chain.from_iterable(entries(source, "folder", own.__contains__) for source in sources)
    named = [(entry.uri, entry.label) for entry in islice(listed, options.limit)]
    if options.dry_run:
        console.say(f"would draw the patch features of {len(named)} images at {side_px} px to {path}")
        return None

    pictures: list[Image.Image] = []
    captions: list[str] = []
    tokens: list[Tensor] = []
    grids: list[tuple[int, int]] = []
    device = best_device()
    backbone = backbone.to(device).eval()
    for uri, label in named:
        picture = _read(uri, model, backbone.patch_size, side_px)
        if picture is None:
            continue
        pixels = torch.from_numpy(np.array(picture)).view(picture.height, picture.width, -1)
        pixels = pixels.permute(2, 0, 1)[None]  # (H, W, C) -> (1, C, H, W)
        tokens.append(forward(backbone, model.preprocess, pixels, device).patch_tokens[0].float().cpu())
        grids.append((picture.height // backbone.patch_size, picture.width // backbone.patch_size))
        pictures.append(picture)
        captions.append(label or os.path.basename(uri))
    if not pictures:
        raise ToolkitError(f"none of the {len(named)} images can be read; name others")
    colours = colour_patches(tokens, grids)
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
    title = f"Principal components of patch features: {_name(model)}, {side_px} px"
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
    first = features @ principal_directions(features, 1)  # (N, 1)
    border = torch.cat([_border(height, width) for height, width in grids])
    foreground = _foreground(first[:, 0], border)
    if foreground is None:
        share, kept = None, torch.ones(len(features), dtype=torch.bool)
        projected = features @ principal_directions(features, 3)
    else:
        share, kept = float(foreground.double().mean()), foreground
        rest = features - first @ principal_directions(features, 1).T
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


def _foreground(first: Tensor, border: Tensor) -> Tensor | None:
    """Return which patches (N,) are foreground by their first component, or None where it does not follow borders."""
    above = first > best_split(first)
    on_border, inside = above[border].double().mean(), above[~border].double().mean()
    foreground = above if on_border < inside else ~above
    on_border, inside = foreground[border].double().mean(), foreground[~border].double().mean()
    return foreground if on_border < CLEAR_BORDER * inside else None


def best_split(values: Tensor) -> float:
    """Return the threshold that leaves the least variance on its two sides (Otsu 1979), of values (N,)."""
    ordered = values.sort().values
    count = torch.arange(1, len(ordered), dtype=torch.float64)
    below = ordered.cumsum(0)[:-1]
    above = ordered.sum() - below
    between = below**2 / count + above**2 / (len(ordered) - count)
    place = int(between.argmax())
    return float(ordered[place] + ordered[place + 1]) / 2


def _border(height: int, width: int) -> Tensor:
    """Return which patches of a grid lie at its edge, (h * w,)."""
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return ~inside.flatten()


def _backbone(model: FeatureModel) -> VisionTransformer:
    if not isinstance(model.backbone, VisionTransformer):
        raise ToolkitError(f"the model {model.source.path!r} has no patch tokens; name a vision transformer by --model")
    return model.backbone


def _side_px(model: FeatureModel, wanted: int | None) -> int:
    patch_size = _backbone(model).patch_size
    side_px = wanted or max(model.preprocess.image_size, MIN_PATCHES * patch_size)
    if side_px % patch_size or side_px < 3 * patch_size:
        nearest = max(3, round(side_px / patch_size)) * patch_size
        raise ToolkitError(
            f"--image-size {side_px} is no multiple of the model's patch size {patch_size}, or less than 3 patches;"
            f" use {nearest}"
        )
    return side_px


def _read(uri: str, model: FeatureModel, patch_size: int, side_px: int) -> Image.Image | None:
    """Return the whole picture with its short side at `side_px` and the other a multiple of the patch, or None."""
    mode: ColourMode = "L" if model.preprocess.in_chans == 1 else "RGB"
    try:
        picture, _ = decode_sized(read_bytes(uri), mode)
    except UnreadableImage as problem:
        console.warn(f"{uri} left out: {problem.reason}")
        return None
    width, height = picture.size
    scale = side_px / min(width, height)
    longest = LONGEST_SIDES * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    picture = picture.crop((left, top, width - left, height - top))
    size = [max(1, round(side * scale / patch_size)) * patch_size for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def _enlarged(image: npt.NDArray[np.uint8], picture: Image.Image) -> Image.Image:
    """Return one pixel a patch as large as the picture that it belongs to."""
    return Image.fromarray(image).resize(picture.size, Image.Resampling.NEAREST)


def _name(model: FeatureModel) -> str:
    return os.path.relpath(model.source.path) if os.path.isabs(model.source.path) else model.source.path
