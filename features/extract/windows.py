"""Sliding windows over large images: overlapping tiles of the size a model takes.

Shapes: C channels, S side of a tile in pixels, T tiles of an image, rows x columns patches of an image.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from ...models.preprocess import Preprocess
from ...store.images import Values
from ...store.pixels import Picture, values_of

MAX_ASPECT = 8  # chosen: of a longer image only the middle is seen, or one image could cost a million tiles


@dataclass(frozen=True)
class Layout:
    """Where the tiles of an image lie, in patches."""

    rows: int  # of the whole image
    columns: int
    tops: tuple[int, ...]  # of the tiles: every top with every left, row by row
    lefts: tuple[int, ...]

    @property
    def num_tiles(self) -> int:
        """Return T."""
        return len(self.tops) * len(self.lefts)


def cut(picture: Picture, preprocess: Preprocess, patch_size: int, short_side: int) -> tuple[Values, Layout]:
    """Return the tiles of a picture, (T, C, S, S) uint8 or uint16, and their layout.

    The picture is resized so that its short side is `short_side` pixels where it is longer, and S where it is shorter
    than that; both sides are then rounded down to whole patches. The tiles cover all of it, evenly spaced, and
    overlap by as little as that allows.
    """
    side = preprocess.image_size
    if isinstance(picture, Image.Image):
        picture = picture.convert("RGB" if preprocess.in_chans == 3 else "L")
    picture = _middle(picture)
    wanted = min(max(min(picture.size), side), short_side)
    scale = wanted / min(picture.size)
    width, height = (max(int(length * scale + 1e-6) // patch_size * patch_size, side) for length in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    rows, columns, window = height // patch_size, width // patch_size, side // patch_size
    layout = Layout(rows, columns, _offsets(rows, window), _offsets(columns, window))
    pixels = values_of(picture).transpose(2, 0, 1)  # (H, W, C) -> (C, H, W)
    tiles = [
        pixels[:, top * patch_size : top * patch_size + side, left * patch_size : left * patch_size + side]
        for top, left in product(layout.tops, layout.lefts)
    ]
    return np.stack(tiles), layout


def _offsets(length: int, window: int) -> tuple[int, ...]:
    """Return where windows begin that cover a length, all in patches."""
    count = -(-length // window)  # rounded up
    if count == 1:
        return (0,)
    return tuple(round(number * (length - window) / (count - 1)) for number in range(count))


def _middle(picture: Picture) -> Picture:
    width, height = picture.size
    keep_width, keep_height = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    left, top = (width - keep_width) // 2, (height - keep_height) // 2
    return picture.crop((left, top, left + keep_width, top + keep_height))
