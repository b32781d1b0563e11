"""One image of a training set, from its encoded bytes to pixels; runs in a process of its own, without torch."""

import numpy as np
from PIL import Image

from ...store.images import Values
from ...store.limits import DEFAULT_LIMITS, Limits
from ...store.pixels import decode_picture, values_of

MAX_ASPECT = 4  # chosen: images of like shape are resized together, and crops of longer ones would show little


def decode_pixels(
    data: bytes, short_side_px: int, in_chans: int = 3, bit_depth: int = 8, limits: Limits = DEFAULT_LIMITS
) -> Values:
    """Return an image as (H, W, C), shrunk to the short side where it is larger, its ends cut off beyond MAX_ASPECT.

    Raises:
        UnreadableImage: if there is none, or none of so many channels.
    """
    image, _ = decode_picture(data, in_chans, bit_depth, short_side_px, limits)
    width, height = (min(side, MAX_ASPECT * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    scale = short_side_px / min(image.size)
    if scale < 1:
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.ascontiguousarray(values_of(image))
