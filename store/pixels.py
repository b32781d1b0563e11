"""Images of any number of channels, of 8 or 16 bits, most of which Pillow cannot represent.

Shapes: H, W pixels down and across, C channels.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .images import (
    ARRAY_START,
    UnreadableImage,
    Values,
    decode,
    decode_sized,
    eight_bits,
    guarded,
    opened,
    read_array,
    shown,
    upright,
)
from .limits import BYTES_PER_PIXEL, DEFAULT_LIMITS, Limits, claim_memory

MAX_16_BITS = 65535


@dataclass(frozen=True)
class Bands:
    """An image of any number of channels, with the names of Pillow's methods."""

    values: Values  # (H, W, C)

    @property
    def size(self) -> tuple[int, int]:
        """Return (W, H)."""
        return self.values.shape[1], self.values.shape[0]

    @property
    def width(self) -> int:
        """Return W."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Return H."""
        return self.size[1]

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """Return the part within (left, top, right, bottom), which lies inside."""
        left, top, right, bottom = box
        return Bands(self.values[top:bottom, left:right])

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, *, reducing_gap: float | None = None
    ) -> "Bands":
        """Return the picture at another (width, height), channel by channel in float32, which holds all 16 bits."""
        if size == self.size:
            return self
        channels = [
            Image.fromarray(channel.astype(np.float32, order="C")).resize(size, resample, reducing_gap=reducing_gap)
            for channel in np.moveaxis(self.values, 2, 0)
        ]
        values = np.stack([np.asarray(channel, np.float32) for channel in channels], axis=-1)
        return Bands(values.round().clip(0, np.iinfo(self.values.dtype).max).astype(self.values.dtype))


Picture = Image.Image | Bands


def decode_picture(
    data: bytes, in_chans: int, bit_depth: int, min_side: int | None = None, limits: Limits = DEFAULT_LIMITS
) -> tuple[Picture, tuple[int, int]]:
    """Return the picture that `data` encodes, as a model takes it, and its full (width, height).

    With 8 bits and three channels or one, any image is converted to RGB or grey, by `decode_sized`. With other numbers
    of channels or 16 bits the image must have just these channels, and only its depth changes: 8 bits become 16 and 16
    become 8 by scaling the whole range. Floats lie in 0 to 1. The pages of a TIFF file are channels.

    Args:
        data: what Pillow reads, or a .npy file of uint8 or uint16, (H, W, C) or (H, W).
        in_chans, bit_depth: the model's; 8 or 16 bits.
        min_side: as in `decode_sized`; it has no effect on other images.

    Raises UnreadableImage for other channels, for values that 16 bits do not hold, and whatever else is wrong.
    """
    if bit_depth == 8 and in_chans in (1, 3):
        return decode_sized(data, "RGB" if in_chans == 3 else "L", min_side, limits)
    if data.startswith(ARRAY_START):
        values = read_array(data, limits)
    else:
        values = _read_pages(data, in_chans, bit_depth, limits)
    _check_channels(values.shape[2], in_chans)
    with guarded():
        if values.dtype == np.uint8 and bit_depth == 16:
            values = values.astype(np.uint16) * np.uint16(MAX_16_BITS // 255)
        elif values.dtype == np.uint16 and bit_depth == 8:
            values = eight_bits(values)
    bands = Bands(values)
    return bands, bands.size


def pixel_id(data: bytes) -> str:
    """Return BLAKE2b-128, in hex, of an image's size and its upright 8-bit RGB pixels.

    Transparency is put on white, so files differ where people would see a difference. Of a .npy array all values count,
    not only the three channels that an image of it would show.
    Raises UnreadableImage as `store.images.decode` does.
    """
    if data.startswith(ARRAY_START):
        values = read_array(data)
        head, pixels = f"{values.shape} {values.dtype} ", values.tobytes()
    else:
        image = decode(data)
        head, pixels = f"{image.width} x {image.height} ", image.tobytes()
    return hashlib.blake2b(head.encode() + pixels, digest_size=16).hexdigest()


def values_of(picture: Picture) -> Values:
    """Return the pixels (H, W, C) of a picture, not to be written to."""
    if isinstance(picture, Bands):
        return picture.values
    return np.asarray(picture).reshape(picture.height, picture.width, -1)


def as_image(picture: Picture) -> Image.Image:
    """Return a picture as one to look at."""
    return shown(picture.values) if isinstance(picture, Bands) else picture


def _read_pages(data: bytes, in_chans: int, bit_depth: int, limits: Limits) -> Values:
    """Return the pixels (H, W, C) of an encoded image, those of a TIFF file's pages one after another."""
    with opened(data, limits) as image:
        claim_memory((BYTES_PER_PIXEL + 4 * in_chans) * image.width * image.height)
        num_pages: int = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        pages: list[Values] = []
        for number in range(num_pages):
            if number:
                image.seek(number)
            # Pillow reduces 16-bit colours to 8 bits as it decodes them.
            is_reduced = any(";16" in str(tile) for tile in getattr(image, "tile", ()))
            page = _page(image)
            if bit_depth == 16 and is_reduced and page.dtype == np.uint8:
                raise UnreadableImage("16-bit colours, of which Pillow reads 8; save them as .npy")
            _check_channels(page.shape[2] * num_pages, in_chans)
            pages.append(page)
        if len({(page.shape, page.dtype) for page in pages}) > 1:
            raise UnreadableImage("pages of different sizes or depths")
        return np.concatenate(pages, axis=2)


def _page(image: Image.Image) -> Values:
    """Return the pixels (H, W, C) of the page that an image stands at, upright."""
    image.load()
    page, _ = upright(image)
    if page.mode == "1":
        page = page.convert("L")
    elif page.mode in ("P", "PA"):
        page = page.convert("RGBA" if page.has_transparency_data else "RGB")
    values: Values = _sixteen_bits(page) if page.mode.startswith(("I", "F")) else np.asarray(page)
    return values.reshape(page.height, page.width, -1)


def _sixteen_bits(page: Image.Image) -> Values:
    """Return integers from 0 to 65535, or floats from 0 to 1, as 16 bits."""
    most = 1 if page.mode == "F" else MAX_16_BITS
    values = np.asarray(page)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # NaN is not
        raise UnreadableImage(f"values from {low} to {high}, outside 0 to {most}")
    if page.mode == "F":
        values = np.round(values * np.float32(MAX_16_BITS))
    return values.astype(np.uint16)


def _check_channels(number: int, in_chans: int) -> None:
    if number != in_chans:
        raise UnreadableImage(f"{number} channel{'' if number == 1 else 's'} where the model takes {in_chans}")
