"""One image, from its encoded bytes to what a model takes; runs in a process of its own, without torch.

Shapes: C channels, S side in pixels, T tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ...models.preprocess import Preprocess, cropped_values
from ...store.images import UnreadableImage, Values, image_id
from ...store.limits import DEFAULT_LIMITS, Limits
from ...store.pixels import Picture, as_image, decode_picture
from .windows import Layout


@dataclass(frozen=True)
class Reading:
    """What else is asked of an image while it is read; all of it can be pickled."""

    known: Callable[[str], int | None] | None = None  # by image_id: a number, if it need not be decoded
    reject: Callable[[Image.Image, tuple[int, int]], str | None] | None = None  # picture and full size -> reason
    decode_side: int = 0  # pixels that `reject` needs of the shorter side
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut into tiles."""

    cut: Callable[[Picture], tuple[Values, Layout]]
    decode_side: int  # pixels that it needs of the shorter side


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a decoded image."""

    image_id: str
    width: int  # pixels, upright and in full
    height: int


@dataclass(frozen=True)
class Loaded:
    """An image on its way into a batch."""

    facts: ImageFacts
    pixels: Values  # (C, S, S) uint8 or uint16, or its tiles (T, C, S, S)
    layout: Layout | None = None  # of the tiles


def load(data: bytes, preprocess: Preprocess, reading: Reading, tiling: Tiling | None) -> Loaded | int:
    """Return an image ready for the model, or its number if known; raise UnreadableImage where there is none."""
    side = preprocess.min_side if tiling is None else tiling.decode_side
    identity = image_id(data)
    if reading.known is not None and (number := reading.known(identity)) is not None:
        return number
    side = max(side, reading.decode_side)
    picture, size = decode_picture(data, preprocess.in_chans, preprocess.bit_depth, side, reading.limits)
    if reading.reject is not None and (reason := reading.reject(as_image(picture), size)) is not None:
        raise UnreadableImage(reason)
    facts = ImageFacts(identity, *size)
    if tiling is None:
        return Loaded(facts, cropped_values(picture, preprocess))
    return Loaded(facts, *tiling.cut(picture))


def load_whole(data: bytes, preprocess: Preprocess, patch_size: int, short_side_px: int, max_aspect: int) -> Picture:
    """Return an image as a model takes it: its short side of so many pixels, the other a multiple of the patch.

    Of an image more elongated than `max_aspect` the middle is taken.
    """
    picture, (width, height) = decode_picture(data, preprocess.in_chans, preprocess.bit_depth)
    scale = short_side_px / min(width, height)
    longest = max_aspect * min(width, height)
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    picture = picture.crop((left, top, width - left, height - top))
    width, height = (max(1, round(side * scale / patch_size)) * patch_size for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
