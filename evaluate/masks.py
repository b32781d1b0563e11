"""Images with a segmentation mask each: where a probe finds them, and what a mask says.

M images.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError, nearest
from ..features.image_workers import Read
from ..store.image_columns import absolute_uris, column_uris, read_images, row_uris
from ..store.images import UnreadableImage, opened
from ..store.limits import BYTES_PER_PIXEL, claim_memory
from ..store.manifest import Manifest, Source, is_manifest_name, open_manifest

IGNORE = 255  # the value of pixels that count for nothing

Mask = npt.NDArray[np.uint8]  # (height, width), a class each pixel


@dataclass(frozen=True)
class MaskedSplit:
    """The images of --train or --test and their masks."""

    source: Source  # its role is train or test
    uris: list[str]  # (M,)
    mask_uris: list[str]  # (M,)


def open_masked_split(role: str, name: str, column: str, limit: int | None) -> MaskedSplit:
    """Open --train or --test and leave out rows without a mask, saying how many.

    `column` holds paths or uris of masks (relative ones count from the manifest's folder), or encoded masks.
    Raises ToolkitError when it is no manifest with such a column, or nothing is left.
    """
    if not is_manifest_name(name):
        raise ToolkitError(f"--{role} {name} is no Parquet file; segment takes a manifest with a column {column!r}")
    manifest = open_manifest(Path(name))
    if column not in manifest.names():
        present = ", ".join(manifest.names())
        what = f"{name} has no column {column!r} with masks{nearest(column, manifest.names())}"
        raise ToolkitError(f"{what}; it has {present}; name another by --masks")
    images = read_images(manifest, limit).column("uri").to_pylist()
    rows = zip(images, _mask_uris(manifest, column, limit), strict=True)
    pairs = [(image, mask) for image, mask in rows if image is not None and mask is not None]
    if not pairs:
        raise ToolkitError(f"no row of {len(images):,} of {name} has an image and a mask; fill its column {column!r}")
    if len(pairs) < len(images):
        console.say(f"{role}: {len(images) - len(pairs):,} of {len(images):,} rows have no mask and are left out")
    return MaskedSplit(manifest.source(role), [image for image, _ in pairs], [mask for _, mask in pairs])


def _mask_uris(manifest: Manifest, column: str, limit: int | None) -> list[str | None]:
    """Return the name of each row's mask: as it is written, or by row where the file holds the mask itself."""
    uris: list[str | None] = []
    for piece in manifest.pieces([column], limit):
        held = piece.batch.column(column)
        if pa.types.is_binary(held.type) or pa.types.is_large_binary(held.type):
            names = pc.if_else(pc.is_valid(held), row_uris(piece, column), None)
        else:
            names = absolute_uris(column_uris(manifest, column, piece), manifest.path)
        uris += names.to_pylist()
    return uris


def decode_mask(data: bytes) -> Mask:
    """Return the class of every pixel of an encoded mask: grey values, or the numbers of palette colours.

    Raises UnreadableImage when it cannot be read, has colours, or values above 255.
    """
    with opened(data) as picture:
        if picture.mode not in ("L", "P", "1", "I", "I;16"):
            raise UnreadableImage(f"it is of mode {picture.mode}, and a mask is a picture of one channel")
        claim_memory(BYTES_PER_PIXEL * picture.width * picture.height)
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > IGNORE:
            raise UnreadableImage(f"it holds the value {values.max()}; classes are 0 to 254, and 255 is ignored")
        return values.astype(np.uint8)


def read_mask(read: Read[Mask], uri: str, width: int, height: int) -> Mask | UnreadableImage:
    """Return what `read`, workers of `decode_mask`, makes of an image's mask; one of another size is unreadable."""
    (mask,) = read([uri])
    if isinstance(mask, UnreadableImage):
        return UnreadableImage(f"the mask {uri} cannot be read: {mask.reason}")
    if mask.shape != (height, width):
        sizes = f"{mask.shape[1]} x {mask.shape[0]} pixels, but its image {width} x {height}"
        return UnreadableImage(f"the mask {uri} is {sizes}")
    return mask
