"""From a picture to what a model takes: resized, cropped to the centre, normalised.

Shapes: B images, C channels, S side of the square in pixels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import ToolkitError
from ..store.images import Values
from ..store.pixels import Picture, values_of

if TYPE_CHECKING:  # processes that only decode do without torch
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; what DINOv2 normalises by
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ASPECT = 4  # chosen: of a longer image the middle part is resized, for the rest would be cropped away
MAX_IMAGE_SIZE = 16_384  # chosen: pixels a side, as far as a model's description is believed
THIN = 100  # chosen: an image so many times as long as wide is averaged to a few pixels before it is squeezed


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images; model.json holds these fields."""

    image_size: int  # pixels a side
    crop_ratio: float | None  # image_size / short side before the crop; None: the whole image, squeezed into the square
    mean: tuple[float, ...]  # a number a channel, of pixels in [0, 1]
    std: tuple[float, ...]
    bit_depth: int = 8  # or 16, of the pixels that are read; older descriptions do not say it

    def __post_init__(self) -> None:
        """Raise ToolkitError when no picture can be brought into this form."""
        if type(self.image_size) is not int or not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ToolkitError(f"image_size {self.image_size!r} is not in 1 to {MAX_IMAGE_SIZE}; 224 is usual")
        if self.crop_ratio is not None and not 0 < self.crop_ratio <= 1:
            raise ToolkitError(f"crop_ratio {self.crop_ratio} is not in (0, 1]; 0.875 is usual")
        if len(self.mean) != len(self.std):
            raise ToolkitError(f"mean is of {len(self.mean)} channels, but std of {len(self.std)}; give one a channel")
        if self.bit_depth not in (8, 16):
            raise ToolkitError(f"bit_depth {self.bit_depth} is neither 8 nor 16; give one of these")

    @property
    def in_chans(self) -> int:
        """Return the number of channels: 3 is RGB, 1 is grey, others are taken as they are stored."""
        return len(self.mean)

    @property
    def short_side(self) -> int:
        """Return the length in pixels that the short side is resized to before the crop."""
        return round(self.image_size / (self.crop_ratio or 1.0))

    @property
    def min_side(self) -> int:
        """Return how long both sides must be for the resize to lose nothing: a JPEG may be decoded at that size."""
        return 2 * self.short_side  # chosen: twice, so that the reduced decoding does not show in the result


def crop_picture(picture: Picture, preprocess: Preprocess) -> "Tensor":
    """Return a picture as pixels, (C, S, S) uint8 or uint16; see `cropped_values`."""
    import torch

    return torch.from_numpy(cropped_values(picture, preprocess))


def cropped_values(picture: Picture, preprocess: Preprocess) -> Values:
    """Return a picture as pixels, (C, S, S) uint8 or uint16.

    The short side is resized to `short_side`, bicubic with antialiasing, and the central square is cut out.
    Source: the evaluation transform of github.com/facebookresearch/dinov2 (dinov2/data/transforms.py).
    """
    side = preprocess.image_size
    if isinstance(picture, Image.Image):
        picture = picture.convert("RGB" if preprocess.in_chans == 3 else "L")
    if preprocess.crop_ratio is None:
        is_thin = max(picture.size) > THIN * min(picture.size)
        picture = picture.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0 if is_thin else None)
    else:
        picture = _resize_short_side(_middle(picture), preprocess.short_side)
        left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
        picture = picture.crop((left, top, left + side, top + side))
    return np.array(values_of(picture).transpose(2, 0, 1), order="C")  # (S, S, C) -> (C, S, S)


def _middle(picture: Picture) -> Picture:
    """Cut a very long picture, which resizing would blow up beyond the memory, to its middle."""
    width, height = picture.size
    keep_width, keep_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - keep_width) // 2, (height - keep_height) // 2
    return picture.crop((left, top, left + keep_width, top + keep_height))


def _resize_short_side(picture: Picture, short_side: int) -> Picture:
    width, height = (int(short_side * side / min(picture.size)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def normalise(pixels: "Tensor", preprocess: Preprocess) -> "Tensor":
    """Return pixels (B, C, S, S) uint8 or uint16 as float32, each channel less its mean and divided by its std."""
    import torch

    mean, std = (torch.tensor(each, device=pixels.device).view(-1, 1, 1) for each in (preprocess.mean, preprocess.std))
    return (pixels.float() / torch.iinfo(pixels.dtype).max - mean) / std
