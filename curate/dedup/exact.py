"""Exact copies, found without a model: images of the same bytes, or of the same pixels in whatever file.

N images, U of them with bytes of their own.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ... import console
from ...errors import ToolkitError
from ...store.images import image_id
from ...store.vectors import Int64
from ..inputs import EmbeddedImages, Input, read_unembedded
from .decisions import REASONS, RESEMBLES, SAME_BYTES, SAME_PIXELS, STAYS, Verdict
from .identical import of_shared_size, pixel_id, read_ids, same_key
from .reference_sets import image_ids, same_keys
from .representative import Keep, preference, preferred

ID_LENGTH = 32  # of the hex digits of BLAKE2b-128

Exact = Literal["bytes", "pixels"]


def exact_work(exact: Exact, inputs: list[Input], limit: int | None) -> str:
    """Say what comparing the images of some manifests would mean."""
    parts = [read_unembedded(part, limit if part is inputs[0] else None) for part in inputs]
    num_images = sum(len(part) for part in parts)
    if exact == "bytes":
        unknown = sum(ids.null_count for part in parts for ids in image_ids(part))
        return f"compare the ids of {num_images:,} images" + (
            f", reading {unknown:,} of them for it" if unknown else ""
        )
    num_decoded = len(of_shared_size(np.concatenate([_sizes(part) for part in parts])))
    return f"decode {num_decoded:,} of {num_images:,} images, those whose size another has too"


def exact_duplicates(
    exact: Exact,
    pool: Input,
    known: list[Input],
    evaluation: list[Input],
    keep: Keep,
    *,
    limit: int | None,
    memory: int | None,
) -> Verdict:
    """Return what becomes of the pool's images: of those with the same bytes or pixels the preferred one stays.

    None stays that a known or evaluation set holds too. What cannot be read is like no other, and stays.
    Raises ToolkitError when a manifest names no images, or none of them can be read.
    """
    images = read_unembedded(pool, limit)
    others = [read_unembedded(part, None) for part in (*known, *evaluation)]
    ids = [_byte_ids(part) for part in (images, *others)]
    rank = preference(keep, images)
    stands_for = preferred(same_key([ids[0]], len(images), memory), rank)  # (N,)
    labels = stands_for
    found = same_keys(lambda: [ids[0]], len(images), [[other] for other in ids[1:]], memory)
    figures: dict[str, object] = {}

    if exact == "pixels":
        # Of the same bytes one is decoded. What other sets hold is decoded as far as its size is in the pool.
        distinct = np.flatnonzero(stands_for == np.arange(len(images)))  # (U,)
        place = np.searchsorted(distinct, stands_for)  # (N,)
        pixel_ids, figures["unreadable"] = _pixel_ids(images, distinct, others)
        labels = distinct[same_key([pixel_ids[0]], len(distinct), memory)][place]
        by_pixels = same_keys(lambda: [pixel_ids[0]], len(distinct), [[other] for other in pixel_ids[1:]], memory)
        found = replace(
            found,
            part=np.where(found.identical, found.part, by_pixels.part[place]),
            index=np.where(found.identical, found.index, by_pixels.index[place]),
        )

    target = preferred(labels, rank)
    reason = np.where(stands_for == stands_for[target], REASONS.index(SAME_BYTES), REASONS.index(SAME_PIXELS))
    reason[target == np.arange(len(target))] = STAYS
    for number, other in enumerate(others):
        held = np.flatnonzero(found.part == number)
        same = np.where(found.identical[held], REASONS.index(SAME_BYTES), REASONS.index(SAME_PIXELS))
        reason[held] = same if other.source.role == "known" else REASONS.index(RESEMBLES)
        target[held] = found.index[held]
    ones = np.ones(len(labels))
    return Verdict(images, others, reason, found.part, target, ones, labels, ones, figures)


def _byte_ids(images: EmbeddedImages) -> pa.ChunkedArray:
    """Return the ids of the images' bytes, (N,), reading those images that have none, or one of another kind."""
    ids = images.image_column("image_id")
    is_unknown = pc.fill_null(pc.not_equal(pc.utf8_length(ids), ID_LENGTH), True)
    if images.source.manifest.provenance is None:
        is_unknown = pa.chunked_array([pa.repeat(True, len(ids))])
    unknown = np.flatnonzero(is_unknown.to_numpy())
    if not len(unknown):
        return ids
    read, reason = read_ids(_uris(images, unknown), len(unknown), image_id, "reading images")
    _check_readable(read, reason)
    place = np.zeros(len(ids), np.int64)
    place[unknown] = np.arange(len(unknown))
    return pc.if_else(is_unknown, read.take(pa.array(place)), ids)


def _pixel_ids(
    images: EmbeddedImages, distinct: Int64, others: list[EmbeddedImages]
) -> tuple[list[pa.ChunkedArray], int]:
    """Return the ids of the pixels of the images at `distinct` and of other sets, and how many cannot be read.

    An id is null where there is no image of the same size, or it cannot be read.
    """
    parts = [images, *others]
    indices = [distinct, *(np.arange(len(other)) for other in others)]
    starts = np.cumsum([0, *(len(of_part) for of_part in indices)])
    rows = of_shared_size(np.concatenate([_sizes(part)[mine] for part, mine in zip(parts, indices, strict=True)]))
    of_parts = np.split(rows, np.searchsorted(rows, starts[1:-1]))
    names = (
        uris
        for part, mine, start, wanted in zip(parts, indices, starts, of_parts, strict=False)
        for uris in _uris(part, mine[wanted - start])
    )
    read, reason = read_ids(names, len(rows), pixel_id, "decoding images")
    _check_readable(read, reason)
    place = np.full(starts[-1], -1)
    place[rows] = np.arange(len(rows))
    ids = read.take(pa.array(place, mask=place < 0))
    pieces = [ids.slice(start, len(mine)) for start, mine in zip(starts.tolist(), indices, strict=False)]
    return pieces, read.null_count


def _uris(images: EmbeddedImages, indices: Int64) -> Iterator[pa.ChunkedArray]:
    for table in images.batches(["uri"], indices):
        yield table.column(0)


def _sizes(images: EmbeddedImages) -> Int64:
    """Return the width and height of every image in one number, (N,); -1 where one is unknown.

    Sizes that another tool wrote may be those before the picture was turned upright: they do not count.
    """
    if images.source.manifest.provenance is None:
        return np.full(len(images), -1)
    sizes = [np.empty(0, np.int64)]
    for table in images.batches(["width", "height"]):
        width, height = (pc.cast(column, pa.int64()) for column in table.columns)
        sizes.append(pc.fill_null(pc.add(pc.multiply(width, 1 << 31), height), -1).to_numpy())
    return np.concatenate(sizes)


def _check_readable(ids: pa.ChunkedArray, reason: str) -> None:
    """Warn of images that could not be read; raise ToolkitError when none could."""
    if ids.null_count and ids.null_count == len(ids):
        raise ToolkitError(f"none of {len(ids):,} images can be read ({reason}); mend their names first")
    if ids.null_count:
        console.warn(f"{ids.null_count:,} of {len(ids):,} images cannot be read, so are like no other: {reason}")
