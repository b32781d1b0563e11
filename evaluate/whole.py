"""Whole pictures through a model, at any size that suits its patches: what is drawn of single images rests on it.

Shapes: C channels, H and W pixels down and across, N patch tokens, D embed_dim.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, best_device, forward, open_model
from ..models.preprocess import normalise
from ..models.vit import VisionTransformer
from ..store.images import UnreadableImage, read_bytes
from ..store.manifest import Source
from ..store.pixels import Picture, decode_picture, values_of
from ..store.sources import ImageSource, entries, open_sources, survey
from .labelled import short_name

LONGEST_SIDES = 4  # a longer picture is cut to its middle, this many times as long as it is wide
MIN_PATCHES = 8  # chosen: fewer a side show no parts, so images are enlarged for models that see fewer


@dataclass(frozen=True)
class Viewer:
    """A vision transformer and the size at which it looks at pictures."""

    name: str
    model: FeatureModel
    backbone: VisionTransformer
    side_px: int  # of the short side

    @property
    def source(self) -> Source:
        """Return the model as an input of a picture."""
        return self.model.source

    def patch_tokens(self, picture: Picture) -> Tensor:
        """Return the patch tokens of a picture as `read` gives it, (N, D) float32, row by row."""
        tokens = forward(self.backbone, self.model.preprocess, pixels_of(picture), best_device()).patch_tokens
        return tokens[0].float().cpu()

    def normalised(self, picture: Picture) -> Tensor:
        """Return a picture as the backbone takes it, (1, C, H, W)."""
        return normalise(pixels_of(picture).to(best_device()), self.model.preprocess)

    def grid(self, picture: Picture) -> tuple[int, int]:
        """Return how many patches a picture has down and across."""
        return picture.height // self.backbone.patch_size, picture.width // self.backbone.patch_size

    def read(self, uri: str) -> Picture | None:
        """Return the whole picture as the model takes it, or None.

        Its short side is `side_px`, the other a multiple of the patch.
        """
        preprocess = self.model.preprocess
        try:
            picture, _ = decode_picture(read_bytes(uri), preprocess.in_chans, preprocess.bit_depth)
        except UnreadableImage as problem:
            console.warn(f"{uri} left out: {problem.reason}")
            return None
        width, height = picture.size
        scale = self.side_px / min(width, height)
        longest = LONGEST_SIDES * min(width, height)
        left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
        picture = picture.crop((left, top, width - left, height - top))
        size = [
            max(1, round(side * scale / self.backbone.patch_size)) * self.backbone.patch_size for side in picture.size
        ]
        return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)


def open_viewer(name: str | None, image_size: int | None, seed: int) -> Viewer:
    """Return the model that --model names, to look at pictures with a short side of --image-size.

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
        raise ToolkitError(
            f"--image-size {side_px} is no multiple of the model's patch size {patch_size}, or less than 3 patches;"
            f" use {nearest}"
        )
    return Viewer(short_name(model.source.path), model, backbone, side_px)


def pixels_of(picture: Picture) -> Tensor:
    """Return the pixels of a picture, (1, C, H, W) uint8 or uint16."""
    return torch.tensor(values_of(picture)).permute(2, 0, 1)[None]  # (H, W, C) -> (1, C, H, W)


@dataclass(frozen=True)
class NamedImages:
    """The images that arguments name, and where they come from."""

    inputs: list[Source]
    named: list[tuple[str, str]]  # uri and caption


def open_images(arguments: list[str], own: str, *, null: bool = False, limit: int | None = None) -> NamedImages:
    """Return the first images that arguments name, the picture `own` left out where it lies among them."""
    sources = open_sources(arguments, null=null)
    skip = {own}.__contains__
    inputs = [Source("images", source.path, survey(source, skip)[0]) for source in sources]
    listed = chain.from_iterable(_captioned(source, own) for source in sources)
    return NamedImages(inputs, list(islice(listed, limit)))


def _captioned(source: ImageSource, own: str) -> Iterator[tuple[str, str]]:
    for entry in entries(source, "folder", {own}.__contains__):
        yield entry.uri, entry.label or os.path.basename(entry.uri)
