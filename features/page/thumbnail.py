"""Images as they stand in a page: small, inside the file itself."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from ...store.images import UnreadableImage
from ..image_workers import read_in_order
from ..small import TINY_PX, as_webp, small_webp

SIDE_PX = 128  # twice what `.gallery img` shows, for sharp screens


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


def thumbnail(image: Image.Image, *, alt: str, caption: str = "", mark: str = "", side_px: int = SIDE_PX) -> Thumbnail:
    """Return an image scaled down to fit a square of `side_px`."""
    encoded, (width, height) = as_webp(image, side_px)
    return Thumbnail(_data_uri(encoded), width, height, alt, caption, mark)


def thumbnails(images: Sequence[tuple[str | None, str, str]]) -> list[Thumbnail]:
    """Return the images at (uri, alt, caption), in order; what cannot be read has the reason instead."""
    made = []
    found = read_in_order(partial(small_webp, side_px=SIDE_PX), (uri for uri, _, _ in images))
    for (_, alt, caption), small in zip(images, found, strict=True):
        if isinstance(small, UnreadableImage):
            made.append(Thumbnail(None, SIDE_PX, SIDE_PX, alt, caption, reason=small.reason))
        else:
            made.append(Thumbnail(_data_uri(small[0]), *small[1], alt, caption))
    return made


def _data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode()}"
