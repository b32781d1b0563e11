"""Images as they stand in a page: small, inside the file itself."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass

from PIL import Image

from ...store.images import UnreadableImage, decode_sized, read_bytes
from ..threads import map_in_order, workers

SIDE_PX = 128  # twice what `.gallery img` shows, for sharp screens
QUALITY = 70  # of WebP, chosen: some 3 kB for a photograph
TINY_PX = 64  # smaller images are kept pixel by pixel


@dataclass(frozen=True)
class Thumbnail:
    """An image in a page, or the reason why it cannot be shown."""

    source: str | None  # a data URI
    width: int
    height: int
    alt: str  # what a screen reader says in its place
    caption: str = ""
    mark: str = ""  # a word that sets it apart from the others, such as "kept"
    reason: str = ""  # why there is no source

    @property
    def is_tiny(self) -> bool:
        """Tell whether its pixels should stay squares when enlarged."""
        return max(self.width, self.height) <= TINY_PX


def thumbnail(
    image: str | Image.Image | None, *, alt: str, caption: str = "", mark: str = "", side_px: int = SIDE_PX
) -> Thumbnail:
    """Return an image, or the one at a uri, scaled down to fit a square of `side_px`."""
    try:
        if image is None:
            raise UnreadableImage("no uri")
        picture = image if isinstance(image, Image.Image) else decode_sized(read_bytes(image), "RGB", side_px)[0]
    except UnreadableImage as problem:
        return Thumbnail(None, side_px, side_px, alt, caption, mark, problem.reason)
    source, (width, height) = data_uri(picture, side_px)
    return Thumbnail(source, width, height, alt, caption, mark)


def thumbnails(images: Iterable[tuple[str | None, str, str, str]], side_px: int = SIDE_PX) -> list[Thumbnail]:
    """Return the images at (uri, alt, caption, mark), read in threads, in order."""
    with workers() as threads:
        made = map_in_order(
            lambda each: thumbnail(each[0], alt=each[1], caption=each[2], mark=each[3], side_px=side_px),
            images,
            threads,
        )
        return list(made)


def data_uri(image: Image.Image, side_px: int) -> tuple[str, tuple[int, int]]:
    """Return an image as a data URI and its size, scaled down to fit a square; a tiny one is lossless."""
    picture = image.convert("RGB")
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    is_tiny = max(picture.size) <= TINY_PX
    picture.save(encoded, "WEBP", lossless=is_tiny, quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}", picture.size
