"""Reads the bytes behind a uri, and decodes them.

A bad image is data, not an error: whatever is wrong raises UnreadableImage with a short reason, and nothing else.
"""

import hashlib
import math
import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from . import parquet_rows

ColourMode = Literal["RGB", "L"]
Values = NDArray[np.unsignedinteger[Any]]  # (H, W, C) uint8 or uint16: pixels down and across, channels

ARRAY_START = b"\x93NUMPY"  # of a .npy file
MAX_FILE_BYTES = 1 << 30  # chosen: a larger file is hardly an image, and would be read into memory
TRANSPOSES = {  # by EXIF orientation: what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGE_PIXELS = 32_000_000  # chosen: images above it are decoded one at a time, whatever the number of threads

# What Pillow's readers raise for broken files; none of it may end a run over a million images.
PYTHON_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError)
DECODE_ERRORS = (*PYTHON_ERRORS, MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)

# Pillow's warnings about files that it can read are of no use; the reason for others is in the removed rows.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(Exception):
    """A file or row that cannot be decoded; `reason` says why in one short line."""

    def __init__(self, reason: str) -> None:
        self.reason = " ".join(reason.split())[:200]
        super().__init__(self.reason)


def image_id(data: bytes) -> str:
    """Return the id of an image: BLAKE2b-128 of its encoded bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_bytes(uri: str) -> bytes:
    """Return the bytes behind a path, file:// or parquet://FILE?row=N[&column=NAME]; UnreadableImage if none."""
    scheme, separator, rest = uri.partition("://")
    if not separator or "/" in scheme:
        return _read_file(uri)
    if scheme == "file":
        return _read_file(os.fsdecode(unquote_to_bytes(rest)))
    if scheme == "parquet":
        return _read_row(rest)
    raise UnreadableImage("URLs are not fetched" if scheme in ("http", "https") else f"{scheme}:// is not read")


def _read_file(path: str) -> bytes:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait forever
            raise UnreadableImage("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise UnreadableImage(f"{status.st_size / 1e9:.1f} GB, too large for an image")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UnreadableImage("a broken link" if os.path.islink(path) else "no such file") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise UnreadableImage(f"cannot be read: {getattr(problem, 'strerror', None) or problem}") from None


def _read_row(place: str) -> bytes:
    path, _, query = place.partition("?")
    fields = parse_qs(query)
    row, column = fields.get("row", [""])[0], fields.get("column", ["image"])[0]
    if not (row.isascii() and row.isdigit()):
        raise UnreadableImage("a parquet:// name without ?row=N")
    try:
        data = parquet_rows.rows.read(os.fsdecode(unquote_to_bytes(path)), column, int(row))
    except FileNotFoundError:
        raise UnreadableImage("no such Parquet file") from None
    except (OSError, LookupError, TypeError, ValueError) as problem:  # ArrowInvalid is a ValueError
        raise UnreadableImage(f"cannot be read: {problem.args[0] if problem.args else problem}") from None
    if data is None:
        raise UnreadableImage("the row holds no image")
    return data


def decode(data: bytes, mode: ColourMode = "RGB", min_side: int | None = None) -> Image.Image:
    """Return the picture that `data` encodes, upright, in `mode`; see `decode_sized`."""
    return decode_sized(data, mode, min_side)[0]


def decode_sized(
    data: bytes, mode: ColourMode = "RGB", min_side: int | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Return the picture that `data` encodes, in 8-bit `mode`, and its full (width, height).

    EXIF orientation is applied, to the size as well; transparency is laid on white; of an animation the first frame
    counts; colour profiles are ignored. Deeper pixels become 8 bits by `to_8_bits`. A .npy array is shown by its first
    three channels, or by the first.

    Args:
        data: an encoded image of any format that Pillow reads, PostScript apart, or a .npy file.
        mode: "RGB", or "L" for grey.
        min_side: decode a JPEG at a half, a quarter or an eighth, much faster, while both sides stay this long.

    Raises UnreadableImage whatever is wrong with the data.
    """
    if data.startswith(ARRAY_START):
        picture = shown(read_array(data))
        return picture.convert(mode), picture.size
    with opened(data) as image:
        full_size = image.size
        if min_side is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (min_side, min_side))
        is_reduced = image.size != full_size
        image.load()
        turned, is_swapped = upright(image)
        if not is_reduced:
            full_size = turned.size  # some formats know their size only after loading
        elif is_swapped:
            full_size = full_size[::-1]
        if 0 in full_size:
            raise UnreadableImage("no pixels")
        return _flatten(turned, mode), full_size


@contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open an encoded image; whatever is wrong with it, also in the block, raises UnreadableImage."""
    if not data:
        raise UnreadableImage("empty file")
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            num_pixels = image.width * image.height
            with _large_images if num_pixels > LARGE_PIXELS else nullcontext():
                yield image
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known format") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels") from None
    except MemoryError:
        raise UnreadableImage("not enough memory to decode it") from None
    except DECODE_ERRORS as problem:
        raise UnreadableImage(f"cannot be decoded: {problem or type(problem).__name__}") from None


def read_array(data: bytes) -> Values:
    """Return the pixels (H, W, C) of a .npy file of uint8 or uint16, (H, W) as one channel; else UnreadableImage."""
    try:
        values = np.load(BytesIO(data), allow_pickle=False)
    except DECODE_ERRORS as problem:
        raise UnreadableImage(f"cannot be decoded: {problem or type(problem).__name__}") from None
    if values.dtype.kind != "u" or values.dtype.itemsize > 2:
        raise UnreadableImage(f"an array of {values.dtype}; only uint8 and uint16 are read")
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise UnreadableImage(f"an array of shape {values.shape}; it must be (height, width, channels)")
    pixels: Values = values.reshape(*values.shape[:2], -1).astype(values.dtype.newbyteorder("="), copy=False)
    return pixels


def shown(values: Values) -> Image.Image:
    """Return pixels as an image to look at: the first three channels as RGB, or the first in grey, in 8 bits."""
    channels = values[..., :3] if values.shape[2] >= 3 else values[..., 0]
    if channels.dtype == np.uint16:
        channels = eight_bits(channels)
    return Image.fromarray(np.ascontiguousarray(channels))


def eight_bits(values: Values) -> Values:
    """Return 16-bit values as 8-bit ones: the whole range counts, 65535 becomes 255."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # values / 257, rounded


_large_images = threading.Lock()


@cache
def _formats() -> list[str]:
    """Return the formats that are tried: all of Pillow's but PostScript, which would start another program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image turned as its EXIF orientation says, and whether width and height changed places."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:  # the pixels may be good all the same
        orientation = 1
    if not isinstance(orientation, int) or orientation not in TRANSPOSES:
        return image, False
    return image.transpose(TRANSPOSES[orientation]), orientation >= 5


def _flatten(image: Image.Image, mode: ColourMode) -> Image.Image:
    """Return an image of any Pillow mode as 8-bit `mode`, transparency laid on white."""
    if image.mode.startswith(("I", "F")):
        return to_8_bits(image).convert(mode)
    if not image.has_transparency_data:
        return image.convert(mode)
    rgba = image.convert("RGBA")
    on_white = Image.new("RGB", image.size, "white")
    on_white.paste(rgba, mask=rgba.getchannel("A"))
    return on_white.convert(mode)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return a grey image deeper than 8 bits as mode L.

    Of 16 bits the whole range counts, 65535 becomes 255, so that images stay comparable. The range of 32-bit numbers is
    unknown: it is 0..65535 (integers) or 0..1 (floats) where all lie in it; floats in 0..255 stay as they are; else the
    image's own least and greatest value become 0 and 255.

    Raises UnreadableImage when values are not finite.
    """
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise UnreadableImage("pixel values that are not finite")
    lower, upper = 0.0, 65535.0
    if image.mode == "F":
        upper = 1.0 if high <= 1 else 255.0
    if low < lower or high > upper:
        lower, upper = low, high
    scale = 255 / max(upper - lower, 1e-30)  # a constant image becomes black
    grey = np.round((values.astype(np.float32) - np.float32(lower)) * np.float32(scale)).clip(0, 255).astype(np.uint8)
    if image.mode.startswith("I;16") and isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
