"""Images with a mask each: where a segmentation probe finds them, and what a mask says.

M images.
"""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from .. import console
from ..errors import ToolkitError
from ..store.image_columns import read_images
from ..store.images import DECODE_ERRORS, UnreadableImage, read_bytes
from ..store.manifest import Manifest, Source, open_manifest

IGNORE = 255  # the value of pixels that count for nothing

Mask = npt.NDArray[np.uint8]  # (height, width), a class each pixel


@dataclass(frozen=True)
class MaskedSide:
    """The images of --train or --test and their masks."""

    source: Source  # its role is train or test
    uris: list[str]  # (M,)
    mask_uris: list[str]  # (M,)


def open_masked_side(role: str, name: str, column: str, limit: int | None) -> MaskedSide:
    """Open --train or --test and leave out rows without a mask, saying how many.

    `column` holds paths or uris of masks (relative ones count from the manifest's folder), or encoded masks.
    Raises ToolkitError when it is no manifest with such a column, or nothing is left.
    """
    if not (name.endswith(".parquet") or Path(name, "_manifest.json").exists()):
        raise ToolkitError(
            f"--{role} {name} is no Parquet file; segmentation takes a manifest with masks in its column {column!r}"
        )
    manifest = open_manifest(Path(name))
    if column not in manifest.names():
        raise ToolkitError(
            f"{name} has no column {column!r} with masks (columns: {', '.join(manifest.names())});"
            " name another by --masks"
        )
    images = read_images(manifest, limit).column("uri").to_pylist()
    both = zip(images, _mask_uris(manifest, column)[: len(images)], strict=True)
    pairs = [(image, mask) for image, mask in both if image is not None and mask is not None]
    if not pairs:
        raise ToolkitError(
            f"none of the {len(images):,} rows of {name} has an image and a mask; fill its column {column!r}"
        )
    if len(pairs) < len(images):
        console.say(f"{role}: {len(images) - len(pairs):,} of {len(images):,} rows have no mask and are left out")
    return MaskedSide(manifest.source(role), [image for image, _ in pairs], [mask for _, mask in pairs])


def _mask_uris(manifest: Manifest, column: str) -> list[str | None]:
    """Return the name of each row's mask: as it is written, or by row where the file holds the mask itself."""
    uris: list[str | None] = []
    for part in manifest.parts:
        for batch in pq.ParquetFile(part, pre_buffer=False).iter_batches(columns=[column]):
            values, first = batch.column(0), len(uris)
            paths: list[str | None] = [None] * len(values)
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                uris += [None if path is None else _absolute(path, manifest) for path in values.to_pylist()]
                continue
            if pa.types.is_struct(values.type):
                if values.type.get_field_index("path") >= 0:
                    paths = pc.struct_field(values, "path").to_pylist()
                values = pc.struct_field(values, "bytes")
            if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
                raise ToolkitError(
                    f"the `{column}` column of {manifest.path} is {values.type}; it must hold names or encoded masks"
                )
            place = f"parquet://{quote(str(part.absolute()))}?column={quote(column)}&row="
            for number, (held, path) in enumerate(zip(pc.is_valid(values).to_pylist(), paths, strict=True)):
                uris.append(f"{place}{first + number}" if held else path and _absolute(path, manifest))
    return uris


def _absolute(uri: str, manifest: Manifest) -> str:
    return uri if "://" in uri else str(manifest.path.absolute().parent / uri)


def read_mask(uri: str, image_uri: str, width: int, height: int) -> Mask:
    """Return the class of every pixel of the mask behind a uri: grey values, or the numbers of palette colours.

    Raises ToolkitError when it cannot be read, has colours, values above 255, or another size than its image.
    """
    try:
        with Image.open(BytesIO(read_bytes(uri))) as picture:
            if picture.mode not in ("L", "P", "1", "I", "I;16"):
                raise ToolkitError(
                    f"the mask {uri} is of mode {picture.mode}; a mask is a picture of one channel, its values classes"
                )
            values = np.asarray(picture)
    except UnreadableImage as problem:
        raise ToolkitError(f"the mask {uri} of {image_uri} cannot be read: {problem.reason}; correct the row") from None
    except DECODE_ERRORS as problem:
        raise ToolkitError(f"the mask {uri} of {image_uri} cannot be read: {problem}; correct the row") from None
    if values.shape != (height, width):
        raise ToolkitError(
            f"the mask {uri} is {values.shape[1]} x {values.shape[0]} pixels, but its image {image_uri}"
            f" {width} x {height}; make masks of their image's size"
        )
    if values.min() < 0 or values.max() > IGNORE:
        raise ToolkitError(f"the mask {uri} holds the value {values.max()}; classes are 0 to 254, and 255 is ignored")
    return values.astype(np.uint8)
