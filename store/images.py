"""Reads the bytes behind a uri, and decodes them.

A bad image is data, not an error: whatever is wrong raises UnreadableImage with a short reason, and nothing else.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import Any, Literal
from urllib.parse import parse_qs, unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from .files import NotRegularError, open_regular
from .limits import (
    BYTES_PER_PIXEL,
    COEFFICIENT_BYTES,
    DEFAULT_LIMITS,
    Limits,
    check_bytes,
    check_pixels,
    check_scans,
    claim_memory,
    webp_size,
)
from .limits import UnreadableImage as UnreadableImage

ColourMode = Literal["RGB", "L"]
Values = NDArray[np.unsignedinteger[Any]]  # (H, W, C) uint8 or uint16: pixels down and across, channels

ARRAY_START = b"\x93NUMPY"  # of a .npy file
TRANSPOSES = {  # by EXIF orientation: what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's warnings about files that it can read are of no use; the reason for others is in the removed rows.
warnings.filterwarnings("ignore", module=r"PIL\.")


@contextmanager
def guarded(doing: str = "cannot be decoded") -> Iterator[None]:
    """Whatever the block raises becomes UnreadableImage: no image may end a run over a million of them."""
    try:
        yield
    except UnreadableImage:
        raise
    except MemoryError:
        raise UnreadableImage("not enough memory to decode it") from None
    except Exception as problem:  # Pillow's and NumPy's readers raise anything
        raise UnreadableImage(f"{doing}: {problem or type(problem).__name__}") from None


def image_id(data: bytes) -> str:
    """Return the id of an image: BLAKE2b-128 of its encoded bytes, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_bytes(uri: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """Return the bytes behind a path, file:// or parquet://FILE?row=N[&column=NAME]; UnreadableImage if none."""
    scheme, separator, rest = uri.partition("://")
    with guarded("cannot be read"):
        if not separator or "/" in scheme:
            return _read_file(uri, limits)
        if scheme == "file":
            return _read_file(os.fsdecode(unquote_to_bytes(rest)), limits)
        if scheme == "parquet":
            return _read_row(rest, limits)
        raise UnreadableImage("URLs are not fetched" if scheme in ("http", "https") else f"{scheme}:// is not read")


def _read_file(path: str, limits: Limits) -> bytes:
    try:
        with open_regular(path) as file:
            check_bytes(os.fstat(file.fileno()).st_size, limits)
            return file.read(limits.max_image_bytes)  # no more, should it grow meanwhile
    except FileNotFoundError:
        raise UnreadableImage("a broken link" if os.path.islink(path) else "no such file") from None
    except NotRegularError:
        raise UnreadableImage("a folder, not a file" if os.path.isdir(path) else "not a regular file") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise UnreadableImage(f"cannot be read: {getattr(problem, 'strerror', None) or problem}") from None


def _read_row(place: str, limits: Limits) -> bytes:
    from .parquet_rows import rows  # here: processes that only decode do without Arrow

    path, _, query = place.partition("?")
    fields = parse_qs(query)
    row, column = fields.get("row", [""])[0], fields.get("column", ["image"])[0]
    if not (row.isascii() and row.isdigit()):
        raise UnreadableImage("a parquet:// name without ?row=N")
    try:
        data = rows.read(os.fsdecode(unquote_to_bytes(path)), column, int(row), limits)
    except FileNotFoundError:
        raise UnreadableImage("no such Parquet file") from None
    except LookupError as problem:
        raise UnreadableImage(f"cannot be read: {problem.args[0] if problem.args else problem}") from None
    if data is None:
        raise UnreadableImage("the row holds no image")
    return data


def decode(data: bytes, mode: ColourMode = "RGB", limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """Return the picture that `data` encodes, upright, in `mode`; see `decode_sized`."""
    return decode_sized(data, mode, limits=limits)[0]


def decode_sized(
    data: bytes, mode: ColourMode = "RGB", min_side: int | None = None, limits: Limits = DEFAULT_LIMITS
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
        picture = shown(read_array(data, limits))
        return picture.convert(mode), picture.size
    with opened(data, limits) as image:
        full_size = image.size
        if min_side is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (min_side, min_side))
        is_reduced = image.size != full_size
        claim_memory(_decoding_bytes(image, full_size))
        image.load()
        turned, is_swapped = upright(image)
        if not is_reduced:
            full_size = turned.size  # some formats know their size only after loading
        elif is_swapped:
            full_size = full_size[::-1]
        return _flatten(turned, mode), full_size


@contextmanager
def opened(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Iterator[Image.Image]:
    """Open an encoded image; whatever is wrong with it, also in the block, raises UnreadableImage."""
    if not data:
        raise UnreadableImage("empty file")
    with guarded():
        check_bytes(len(data), limits)
        if (size := webp_size(data)) is not None:
            check_pixels(*size, len(data), limits)
            claim_memory(2 * BYTES_PER_PIXEL * size[0] * size[1])
        try:
            image = Image.open(BytesIO(data), formats=formats())
        except UnidentifiedImageError:
            raise UnreadableImage("not an image of a known format") from None
        except Image.DecompressionBombError:
            raise UnreadableImage(f"more than --max-pixels {limits.max_pixels}") from None
        with image:
            check_pixels(*image.size, len(data), limits)
            if image.info.get("progressive"):
                check_scans(data)
            yield image


def _decoding_bytes(image: Image.Image, full_size: tuple[int, int]) -> int:
    """Return about how many bytes an opened image takes while it is decoded."""
    num_bytes = BYTES_PER_PIXEL * image.width * image.height
    if image.info.get("progressive"):
        num_bytes += COEFFICIENT_BYTES * full_size[0] * full_size[1]
    return num_bytes


def read_array(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Values:
    """Return the pixels (H, W, C) of a .npy file of uint8 or uint16, (H, W) as one channel; else UnreadableImage."""
    with guarded():
        check_bytes(len(data), limits)
        file = BytesIO(data)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
        if dtype.kind != "u" or dtype.itemsize > 2:
            raise UnreadableImage(f"an array of {dtype}; only uint8 and uint16 are read")
        if len(shape) not in (2, 3) or min(shape) <= 0:
            raise UnreadableImage(f"an array of shape {shape}; it must be (height, width, channels)")
        if math.prod(shape) * dtype.itemsize > len(data) - file.tell():
            raise UnreadableImage(f"an array of shape {shape} that is cut off")
        check_pixels(shape[1], shape[0], len(data), limits)
        claim_memory(2 * len(data) + BYTES_PER_PIXEL * shape[0] * shape[1])
        values = np.frombuffer(data, dtype, math.prod(shape), file.tell())
        values = values.reshape(shape, order="F" if is_fortran else "C")
        pixels: Values = values.reshape(*shape[:2], -1).astype(dtype.newbyteorder("="), copy=False)
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


@cache
def formats() -> list[str]:
    """Return the formats that are tried: all of Pillow's but PostScript, which would start another program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image turned as its EXIF orientation says, and whether width and height changed places."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels may be good all the same
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
