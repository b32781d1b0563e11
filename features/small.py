"""Images scaled down and encoded, as pages and maps store them; made where images are decoded, without torch."""

import io

from PIL import Image

from ..store.images import decode_sized

JPEG_QUALITY = 80
WEBP_QUALITY = 70  # chosen: some 3 kB for a photograph
TINY_PX = 64  # smaller images are kept pixel by pixel in a page


def small_picture(data: bytes, side_px: int) -> bytes:
    """Return the image that `data` encodes, to fit a square: as JPEG, or as PNG where it is as small already."""
    picture, _ = decode_sized(data, "RGB", side_px)
    is_small = max(picture.size) <= side_px
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG" if is_small else "JPEG", quality=JPEG_QUALITY)
    return encoded.getvalue()


def small_webp(data: bytes, side_px: int) -> tuple[bytes, tuple[int, int]]:
    """Return the image that `data` encodes as WebP to fit a square, and its size."""
    return as_webp(decode_sized(data, "RGB", side_px)[0], side_px)


def as_webp(image: Image.Image, side_px: int) -> tuple[bytes, tuple[int, int]]:
    """Return an image as WebP to fit a square, a tiny one lossless, and its size."""
    picture = image.convert("RGB")
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    is_tiny = max(picture.size) <= TINY_PX
    picture.save(encoded, "WEBP", lossless=is_tiny, quality=WEBP_QUALITY, method=4)
    return encoded.getvalue(), picture.size
