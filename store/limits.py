"""What an image may cost, checked by its header before it is decoded."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ToolkitError

MEGAPIXEL = 1_000_000
BYTES_PER_PIXEL = 8  # while an image is decoded: two copies of four bytes each
COEFFICIENT_BYTES = 6  # a pixel, more: a progressive JPEG is held whole, two bytes for each of three channels
MOST_BYTES_PER_PIXEL = 16  # a process that decodes may take; deep pixels have copies of floats
PROCESS_BYTES = 512 << 20  # chosen: what such a process takes besides
SMALL_BYTES = 32 << 20  # chosen: images that take less are decoded without asking
SPARSE_PIXELS, MOST_PIXELS_PER_BYTE = 32 * MEGAPIXEL, 10_000  # chosen: of a PNG, 8,256 pixels a byte are possible
MOST_SCANS = 100  # chosen: a progressive JPEG has about ten, and each costs as much as an image


@dataclass(frozen=True)
class Limits:
    """What one image may cost; one that takes more counts as unreadable."""

    max_pixels: int = 178_956_970  # Pillow's own limit
    max_image_bytes: int = 256 << 20  # encoded
    image_timeout: float = 30.0  # seconds to read and decode it

    @property
    def process_bytes(self) -> int:
        """Return what a process that decodes may allocate."""
        return PROCESS_BYTES + 2 * self.max_image_bytes + MOST_BYTES_PER_PIXEL * self.max_pixels


def limits_of(environment: Mapping[str, str]) -> Limits:
    """Return the limits of commands without options for them, and the defaults of the others.

    DINOV2_MAX_PIXELS, DINOV2_MAX_IMAGE_BYTES and DINOV2_IMAGE_TIMEOUT set them. Raises ToolkitError for what is no
    number above 0.
    """
    values: dict[str, Any] = {}
    for each in fields(Limits):
        name = f"DINOV2_{each.name.upper()}"
        if text := environment.get(name):
            try:
                values[each.name] = (float if each.name == "image_timeout" else int)(text)
            except ValueError:
                values[each.name] = 0
            if not 0 < values[each.name] < math.inf:
                raise ToolkitError(f"{name} is {text!r}, no number above 0; give one, or unset it")
    return Limits(**values)


DEFAULT_LIMITS = limits_of(os.environ)


class UnreadableImage(Exception):
    """A file or row that cannot be decoded; `reason` says why in one short line."""

    def __init__(self, reason: str) -> None:
        self.reason = " ".join(reason.split())[:200]
        super().__init__(self.reason)


def check_bytes(num_bytes: int, limits: Limits) -> None:
    """Raise UnreadableImage when an encoded image is too large."""
    if num_bytes > limits.max_image_bytes:
        raise UnreadableImage(f"{num_bytes} bytes, more than --max-image-bytes {limits.max_image_bytes}")


def check_pixels(width: int, height: int, num_bytes: int, limits: Limits) -> None:
    """Raise UnreadableImage when an image of so many encoded bytes has too many pixels, or more than they can hold."""
    num_pixels = width * height
    if num_pixels > limits.max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than --max-pixels {limits.max_pixels}")
    if num_pixels > SPARSE_PIXELS and num_pixels > MOST_PIXELS_PER_BYTE * num_bytes:
        raise UnreadableImage(f"{width} x {height} pixels in {num_bytes} bytes, as no image has")


def check_scans(data: bytes) -> None:
    """Raise UnreadableImage when a progressive JPEG has so many scans that it takes minutes."""
    num_scans = data.count(b"\xff\xda")  # which appears nowhere else: 0xFF among the pixels has a 0 behind it
    if num_scans > MOST_SCANS:
        raise UnreadableImage(f"a JPEG of {num_scans} scans; at most {MOST_SCANS} are decoded")


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Return the (width, height) that a WebP file declares, None of other files; Pillow allocates it when it opens it.

    Source: RFC 9649, sections 2.5 to 2.7.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    match data[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            sides = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
            return sides[0] & 0x3FFF, sides[1] & 0x3FFF
        case _:
            return None


ask_for_memory: Callable[[int], None] | None = None  # set in a process that decodes while others do


def claim_memory(num_bytes: int) -> None:
    """Wait until an image may take so many bytes, so that those decoded at the same time fit into the memory."""
    if ask_for_memory is not None and num_bytes > SMALL_BYTES:
        ask_for_memory(num_bytes)
