"""Patches of two images that are each other's nearest, drawn as lines.

Shapes: N patch tokens of an image, D embed_dim, M matches.
"""

import colorsys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ToolkitError
from ..features.sheet import MARGIN_PX, titled_sheet
from ..store.artifact import Options, Result
from ..store.manifest import Provenance
from ..store.pixels import Picture, as_image
from .pca import find_foreground
from .pictures import Drawn, PatchModel, make_picture, open_images, open_patch_model

HEIGHT_PX, BETWEEN_PX = 420, 48  # of the images as they are drawn
DOT_PX = 4
HUE_STEP = 0.618  # of the golden section: neighbours in the list get hues far apart


@dataclass(frozen=True)
class MatchSettings:
    """Options of `dinov2 evaluate match`, besides those that all commands share."""

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
    inputs, uris = [], []
    for name in (left, right):
        sources, images = open_images([name], output, limit=1)
        if not images:
            raise ToolkitError(f"{name} names no image; give two images")
        inputs += sources
        uris.append(images[0][0])
    model = open_patch_model(settings.model, settings.image_size, options.seed)
    parameters: dict[str, object] = {"image_size": model.side_px, "matches": settings.num_matches}
    inputs.append(model.model.source)
    provenance = Provenance("picture", "evaluate match", parameters, options.seed, tuple(inputs))

    def drawn() -> Drawn:
        pictures = []
        for uri in uris:
            if (picture := model.read(uri)) is None:
                raise ToolkitError(f"{uri} cannot be read; give two images")
            pictures.append(picture)
        return _draw(model, pictures, settings.num_matches)

    described = f"up to {settings.num_matches} matches at {model.side_px} px"
    return make_picture(output, provenance, options, described=described, draw=drawn)


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


def _draw(model: PatchModel, pictures: list[Picture], num_matches: int) -> Drawn:
    grids = [model.grid(picture) for picture in pictures]
    left, right = (model.patch_tokens(picture) for picture in pictures)
    matches = match_patches(left, right, grids, num_matches)
    note = f"the best {len(matches.left)} of {matches.num_mutual} mutual nearest neighbours by cosine"
    if len(matches.left):
        note += f", {float(matches.similarities.max()):.3f} to {float(matches.similarities.min()):.3f}"
    shown = [
        image.convert("RGB").resize((max(1, round(image.width * HEIGHT_PX / image.height)), HEIGHT_PX))
        for image in map(as_image, pictures)
    ]
    width = shown[0].width + BETWEEN_PX + shown[1].width
    sheet, pen, top = titled_sheet(f"Mutual nearest patches: {model.title}", note, width, HEIGHT_PX)
    lefts = [MARGIN_PX, MARGIN_PX + shown[0].width + BETWEEN_PX]
    ends: list[list[tuple[float, float]]] = []  # of the lines, in the middle of each patch
    for image, start, grid, patches in zip(shown, lefts, grids, (matches.left, matches.right), strict=True):
        sheet.paste(image, (start, top))
        down, across = np.divmod(patches.numpy(), grid[1])
        x, y = start + (across + 0.5) / grid[1] * image.width, top + (down + 0.5) / grid[0] * image.height
        ends.append(list(zip(x.tolist(), y.tolist(), strict=True)))
    for number, line in enumerate(zip(*ends, strict=True)):
        red, green, blue = (round(255 * share) for share in colorsys.hsv_to_rgb(number * HUE_STEP % 1, 0.85, 0.9))
        pen.line(line, (red, green, blue), 2)
        for x, y in line:
            pen.ellipse((x - DOT_PX, y - DOT_PX, x + DOT_PX, y + DOT_PX), (red, green, blue), "white")
    return sheet, {"matches": len(matches.left), "mutual": matches.num_mutual}
