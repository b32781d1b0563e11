"""Patches that find each other in two images, drawn as lines.

Shapes: N patch tokens of an image, D embed_dim, M matches.
"""

import colorsys
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from ..features.sheet import (
    CAPTION_PX,
    FAINT,
    INK,
    MARGIN_PX,
    PAPER,
    TITLE_PX,
    check_picture_name,
    is_picture_up_to_date,
    write_picture,
)
from ..store.artifact import Options, Result
from ..store.manifest import Provenance
from ..store.pixels import as_image
from .pca import find_foreground
from .whole import open_images, open_viewer

HEIGHT_PX, BETWEEN_PX = 420, 48  # of the pictures as they are drawn
DOT_PX = 4
HUE_STEP = 0.618  # of the golden section: neighbours in the list get hues far apart


@dataclass(frozen=True)
class MatchSettings:
    """What `dinov2 evaluate match` can be told, beside the options that all commands share."""

    model: str | None = None
    image_size: int | None = None  # short side in pixels; None: the model's own, or 8 patches
    num_matches: int = 20  # the best so many are drawn


@dataclass(frozen=True)
class Matches:
    """Pairs of patches, best first."""

    left: Tensor  # (M,) patch numbers
    right: Tensor  # (M,)
    similarities: Tensor  # (M,) cosines
    num_mutual: int  # how many patches found each other in all


def draw_match(left: str, right: str, output: str, settings: MatchSettings, options: Options) -> Result | None:
    """Draw two images and lines between the patches that are each other's nearest; return None after a dry run.

    Raises ToolkitError when an image cannot be read, the model has no patch tokens, or the size does not suit it.
    """
    path = check_picture_name(output)
    both = [open_images([name], str(path.absolute()), limit=1) for name in (left, right)]
    for name, images in zip((left, right), both, strict=True):
        if not images.named:
            raise ToolkitError(f"{name} names no image; give two images")
    viewer = open_viewer(settings.model, settings.image_size, options.seed)
    provenance = Provenance(
        kind="picture",
        command="evaluate match",
        parameters={"image_size": viewer.side_px, "matches": settings.num_matches},
        seed=options.seed,
        inputs=(*both[0].inputs, *both[1].inputs, viewer.source),
    )
    if is_picture_up_to_date(path, provenance, options):
        return None if options.dry_run else Result(output)
    if options.dry_run:
        console.say(f"would draw up to {settings.num_matches} matches at {viewer.side_px} px to {path}")
        return None

    pictures = []
    for images in both:
        uri, _ = images.named[0]
        picture = viewer.read(uri)
        if picture is None:
            raise ToolkitError(f"{uri} cannot be read; give two images")
        pictures.append(picture)
    grids = [viewer.grid(picture) for picture in pictures]
    tokens = [viewer.patch_tokens(picture) for picture in pictures]
    matches = match_patches(tokens[0], tokens[1], grids, settings.num_matches)
    middles = [
        [divmod(number, grid[1]) for number in numbers.tolist()]
        for numbers, grid in zip((matches.left, matches.right), grids, strict=True)
    ]
    title = f"Patches that find each other: {viewer.name}, {viewer.side_px} px"
    note = f"the best {len(matches.left)} of {matches.num_mutual} mutual nearest neighbours by cosine"
    if len(matches.left):
        best, last = float(matches.similarities.max()), float(matches.similarities.min())
        note += f", {best:.3f} to {last:.3f}"
    write_picture(_draw([as_image(picture) for picture in pictures], grids, middles, title, note), path, provenance)
    return Result(output, {"matches": len(matches.left), "mutual": matches.num_mutual})


def match_patches(left: Tensor, right: Tensor, grids: list[tuple[int, int]], num_matches: int) -> Matches:
    """Return the most similar pairs of patch tokens (N, D) and (N', D) that are each other's nearest by cosine.

    Where a foreground shows in the first principal component of both images together, pairs that lie in it come
    first, for patches of plain background resemble each other most. `grids` has the patches down and across of each.
    Source: the patch matching of Oquab et al. 2023 (DINOv2), figure 10.
    """
    together = torch.cat([left, right]).double()
    foreground = find_foreground(together - together.mean(dim=0), grids)
    left, right = (torch.nn.functional.normalize(tokens.double(), dim=1) for tokens in (left, right))
    similarities = left @ right.T  # (N, N')
    nearest_right, nearest_left = similarities.argmax(dim=1), similarities.argmax(dim=0)
    mutual = torch.nonzero(nearest_left[nearest_right] == torch.arange(len(left))).flatten()
    partner = nearest_right[mutual]
    similarity = similarities[mutual, partner]
    rank = similarity.clone()
    if foreground is not None:
        rank += 3 * (foreground[mutual] & foreground[len(left) + partner])  # above every cosine
    best = rank.argsort(descending=True, stable=True)[:num_matches]
    return Matches(mutual[best], partner[best], similarity[best], len(mutual))


def _draw(
    pictures: list[Image.Image],
    grids: list[tuple[int, int]],
    middles: list[list[tuple[int, int]]],
    title: str,
    note: str,
) -> Image.Image:
    """Return both pictures under a title, with a line between the middles of each pair of patches (down, across)."""
    shown = [
        picture.convert("RGB").resize((max(1, round(picture.width * HEIGHT_PX / picture.height)), HEIGHT_PX))
        for picture in pictures
    ]
    fonts = ImageFont.load_default(TITLE_PX), ImageFont.load_default(CAPTION_PX)
    head_px = MARGIN_PX + 2 * TITLE_PX + 2 * CAPTION_PX
    lefts = [MARGIN_PX, MARGIN_PX + shown[0].width + BETWEEN_PX]
    text_px = round(max(fonts[0].getlength(title), fonts[1].getlength(note)))
    width = max(lefts[1] + shown[1].width, MARGIN_PX + text_px) + MARGIN_PX
    sheet = Image.new("RGB", (width, head_px + HEIGHT_PX + MARGIN_PX), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN_PX, MARGIN_PX), title, INK, fonts[0])
    pen.text((MARGIN_PX, MARGIN_PX + round(1.6 * TITLE_PX)), note, FAINT, fonts[1])
    for picture, left in zip(shown, lefts, strict=True):
        sheet.paste(picture, (left, head_px))
    ends = [
        [
            (left + (across + 0.5) / grid[1] * picture.width, head_px + (down + 0.5) / grid[0] * picture.height)
            for down, across in patches
        ]
        for picture, left, grid, patches in zip(shown, lefts, grids, middles, strict=True)
    ]
    for number, line in enumerate(zip(*ends, strict=True)):
        red, green, blue = (round(255 * share) for share in colorsys.hsv_to_rgb(number * HUE_STEP % 1, 0.85, 0.9))
        pen.line(line, (red, green, blue), 2)
        for x, y in line:
            pen.ellipse((x - DOT_PX, y - DOT_PX, x + DOT_PX, y + DOT_PX), (red, green, blue), "white")
    return sheet
