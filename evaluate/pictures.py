"""Whole images through a model, at any size that suits its patches, and the pictures that are drawn of them.

Shapes: C channels, H and W pixels down and across, N patch tokens, D embed_dim.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from PIL import Image
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, best_device, forward, open_model
from ..features.extract.reading import load_whole
from ..features.image_workers import image_workers
from ..features.sheet import check_picture_name, is_picture_up_to_date, picture_provenance, write_picture
from ..models.vit import VisionTransformer
from ..store.artifact import Options, Result, check_not_input
from ..store.images import UnreadableImage
from ..store.lock import writing
from ..store.manifest import Provenance, Source
from ..store.pixels import Picture, values_of
from ..store.sources import entries, listing_id, open_sources
from .labelled import short_name

MAX_ASPECT = 4  # a longer image is cut to its middle, this many times as long as it is wide
MIN_PATCHES = 8  # chosen: fewer a side show no parts, so images are enlarged for models that see fewer

Named = tuple[str, str]  # an image's uri and caption
Drawn = tuple[Image.Image, dict[str, object]]  # a picture and its figures


@dataclass(frozen=True)
class PictureSettings:
    """Options of `dinov2 evaluate pca` and `attention`, besides those that all commands share."""

    model: str | None = None
    image_size: int | None = None  # short side in pixels; None: the model's own, or 8 patches
    null: bool = False  # names on stdin end in NUL


@dataclass(frozen=True)
class PatchModel:
    """A vision transformer and the size at which it sees whole images."""

    model: FeatureModel
    backbone: VisionTransformer
    side_px: int  # of the short side

    @property
    def title(self) -> str:
        """Return the model and the size, for the title of a picture."""
        return f"{short_name(self.model.source.path)}, {self.side_px} px"

    def read(self, uri: str) -> Picture | None:
        """Return the image as the model takes it, None (and a warning) where it cannot be read.

        Its short side is `side_px`, the other a multiple of the patch.
        """
        load = partial(
            load_whole,
            preprocess=self.model.preprocess,
            patch_size=self.backbone.patch_size,
            short_side_px=self.side_px,
            max_aspect=MAX_ASPECT,
        )
        with image_workers(load, 1) as read:
            (picture,) = read([uri])
        if isinstance(picture, UnreadableImage):
            console.warn(f"{uri} left out: {picture.reason}")
            return None
        return picture

    def patch_tokens(self, picture: Picture) -> Tensor:
        """Return the patch tokens of what `read` returned, (N, D) float32, row by row."""
        features = forward(self.backbone, self.model.preprocess, pixels_of(picture), best_device())
        tokens = features.patch_tokens[0].float().cpu()
        if not tokens.isfinite().all():
            raise ToolkitError(f"the patch tokens of {self.model.source.path} are not finite; name another --model")
        return tokens

    def grid(self, picture: Picture) -> tuple[int, int]:
        """Return how many patches an image has down and across."""
        return picture.height // self.backbone.patch_size, picture.width // self.backbone.patch_size


Draw = Callable[[PatchModel, list[Picture], list[str]], Drawn]  # of the images that can be read and their captions


def open_patch_model(name: str | None, image_size: int | None, seed: int) -> PatchModel:
    """Return the model that --model names, for images with a short side of --image-size.

    None means the model's own size, or MIN_PATCHES patches where that is more.
    Raises ToolkitError when the model has no patch tokens, or the size does not suit it.
    """
    model = open_model(name, seed)
    if not isinstance(model.backbone, VisionTransformer):
        raise ToolkitError(f"the model {model.source.path!r} has no patch tokens; name a vision transformer by --model")
    backbone = model.backbone.to(best_device()).eval()
    patch_size = backbone.patch_size
    side_px = image_size or max(model.preprocess.image_size, MIN_PATCHES * patch_size)
    if side_px % patch_size or side_px < 3 * patch_size:
        nearest = max(3, round(side_px / patch_size)) * patch_size
        wrong = f"is no multiple of the model's patch size {patch_size}, or less than 3 patches"
        raise ToolkitError(f"--image-size {side_px} {wrong}; use {nearest}")
    return PatchModel(model, backbone, side_px)


def pixels_of(picture: Picture) -> Tensor:
    """Return the pixels of an image, (1, C, H, W) uint8 or uint16."""
    return torch.tensor(values_of(picture)).permute(2, 0, 1)[None]  # (H, W, C) -> (1, C, H, W)


def open_images(
    arguments: list[str], output: str, *, null: bool = False, limit: int | None = None
) -> tuple[list[Source], list[Named]]:
    """Return the sources that arguments name and their first images, without the output among them."""
    skip = {str(check_picture_name(output).absolute())}.__contains__
    sources = open_sources(arguments, null=null)
    inputs = [Source("images", source.path, listing_id(source, skip)) for source in sources]
    listed = (entry for source in sources for entry in entries(source, "folder", skip))
    named = [(entry.uri, entry.label or os.path.basename(entry.uri)) for entry in islice(listed, limit)]
    return inputs, named


def draw_images(
    command: str, arguments: list[str], output: str, settings: PictureSettings, options: Options, what: str, draw: Draw
) -> Result | None:
    """Run a command of `evaluate` that draws what a model sees in images; return None after a dry run.

    `what` names the picture.
    Raises ToolkitError when no image can be read, the model has no patch tokens, or the size does not suit it.
    """
    inputs, images = open_images(arguments, output, null=settings.null, limit=options.limit)
    model = open_patch_model(settings.model, settings.image_size, options.seed)
    parameters: dict[str, object] = {"image_size": model.side_px, "limit": options.limit}
    inputs.append(model.model.source)
    provenance = Provenance("picture", f"evaluate {command}", parameters, options.seed, tuple(inputs))

    def drawn() -> Drawn:
        read = [(picture, caption) for uri, caption in images if (picture := model.read(uri)) is not None]
        if not read:
            raise ToolkitError(f"none of the {len(images)} images can be read; name others")
        return draw(model, [picture for picture, _ in read], [caption for _, caption in read])

    described = f"{what} {len(images)} images at {model.side_px} px"
    return make_picture(output, provenance, options, described=described, draw=drawn)


def make_picture(
    output: str, provenance: Provenance, options: Options, *, described: str, draw: Callable[[], Drawn]
) -> Result | None:
    """Draw a picture with its provenance, unless it is up to date; return None after a dry run.

    Raises ToolkitError when something else stands at the output and --force was not given.
    """
    path = check_picture_name(output)
    check_not_input(path, provenance, picture_provenance)
    with nullcontext() if options.dry_run else writing(path):
        if is_picture_up_to_date(path, provenance, options):
            return None if options.dry_run else Result(output)
        if options.dry_run:
            console.say(f"would draw {described} to {path}")
            return None
        picture, figures = draw()
        write_picture(picture, path, provenance)
    return Result(output, figures)
