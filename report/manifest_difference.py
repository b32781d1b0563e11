"""What differs between an image and the one that stays for it, as a picture.

Shapes: H, W pixels.
"""

from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..features.image_workers import read_in_order
from ..store.images import UnreadableImage, decode_sized

SIDE_PX = 128  # of the longer side, at which images are compared
AMPLIFIED = 4  # times that differences are shown as strong as they are
MAX_ASPECT = 1.05  # chosen: images whose shapes differ by more are cropped, and lie not pixel on pixel
MAX_UNEXPLAINED = 0.2  # chosen: share of the variance beyond which one is moved against the other
GAINS = (0.5, 2.0)  # of brightness, that count as the same

Levels = npt.NDArray[np.float64]


def difference_picture(kept: str | None, removed: str | None) -> Image.Image | None:
    """Return where two images differ, dark on white, after a change of brightness is taken back.

    None where one cannot be read, or they do not lie pixel on pixel: cropped, turned, or framed.
    """
    found = list(read_in_order(partial(decode_sized, mode="RGB", min_side=SIDE_PX), (kept, removed)))
    pictures = [each[0] for each in found if not isinstance(each, UnreadableImage)]
    return None if len(pictures) < 2 else differing(*pictures)


def differing(one: Image.Image, other: Image.Image) -> Image.Image | None:
    """Return where an image differs from another, as `difference_picture` does."""
    shapes = [picture.width / picture.height for picture in (one, other)]
    if max(shapes) > MAX_ASPECT * min(shapes):
        return None
    scale = min(1.0, SIDE_PX / max(*one.size, *other.size))
    smaller = min(one.size, other.size)
    size = max(round(smaller[0] * scale), 1), max(round(smaller[1] * scale), 1)
    x, y = (np.asarray(picture.resize(size, Image.Resampling.BOX), np.float64) for picture in (other, one))
    # The brightness of the one that explains the other best: y = gain * x + offset.
    x, y = x - x.mean(), y - y.mean()
    gain = float(np.clip((x * y).mean() / max(x.var(), 1e-9), *GAINS))
    apart: Levels = np.abs(y - gain * x)
    if (apart**2).mean() > MAX_UNEXPLAINED * max(y.var(), 1.0):
        return None
    levels = 255 - np.minimum(AMPLIFIED * apart.mean(axis=2), 255)
    return Image.fromarray(levels.round().astype(np.uint8)).convert("RGB")
