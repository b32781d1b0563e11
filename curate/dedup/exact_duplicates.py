"""Exact duplicates, found without a model: images with the same bytes, or with the same pixels in whatever file.

N images of the pool, U of them with different bytes.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...store.pixels import pixel_id
from ...store.vectors import Int64
from ..inputs import Input, read_unembedded
from .decisions import KEPT, RESEMBLES_EVALUATION, SAME_BYTES, SAME_PIXELS, Decisions
from .image_keys import byte_ids, first_with_same_key, read_keys, without_byte_id
from .reference_sets import ImageSets
from .representative import Keep, preference, preferred
from .settings import Exact


def describe_exact(exact: Exact, inputs: list[Input], limit: int | None) -> str:
    """Say what comparing the images of some manifests would take."""
    sets = _read_sets(inputs, limit)
    if exact == "bytes":
        num_read = sum(len(without_byte_id(images)) for images in sets.sets)
        return f"compare the bytes of {len(sets):,} images, {num_read:,} of which are read for it"
    return f"decode {len(of_shared_size(_sizes(sets))):,} of {len(sets):,} images, those whose size another has too"


def find_exact_duplicates(
    exact: Exact, inputs: list[Input], num_known: int, keep: Keep, limit: int | None, memory: int | None
) -> Decisions:
    """Decide on a pool's images: of those with the same bytes or pixels the preferred one is kept.

    None is kept that another set has too. Images that cannot be read are kept.
    Raises ToolkitError when a manifest names no images, or none of them can be read.

    Args:
        inputs: the pool, then `num_known` sets of images kept earlier, then evaluation sets.
        limit: only the first so many images of the pool.
    """
    sets = _read_sets(inputs, limit)
    images, everyone = sets.sets[0], np.arange(len(sets.sets[0]))
    ids = [byte_ids(each) for each in sets.sets]
    rank = preference(keep, images)
    represented_by = preferred(first_with_same_key([ids[0]], len(images), memory), rank)  # (N,)
    labels = represented_by
    match = first_with_same_key([ids[0]], len(images), memory, [[each] for each in ids[1:]])
    same_bytes = match >= 0
    figures: dict[str, object] = {}

    if exact == "pixels":
        distinct = np.flatnonzero(represented_by == everyone)  # (U,)
        place = np.searchsorted(distinct, represented_by)  # (N,)
        pixel_ids, figures["unreadable"] = _pixel_ids(ImageSets([images.take(distinct), *sets.sets[1:]]))
        mine, theirs = pixel_ids.slice(0, len(distinct)), pixel_ids.slice(len(distinct))
        labels = distinct[first_with_same_key([mine], len(distinct), memory)][place]
        by_pixels = first_with_same_key([mine], len(distinct), memory, [[theirs]])
        match = np.where(same_bytes, match, by_pixels[place])

    duplicate_of = preferred(labels, rank)
    same_bytes = np.where(match >= 0, same_bytes, represented_by == represented_by[duplicate_of])
    reason = np.where(same_bytes, SAME_BYTES, SAME_PIXELS)
    reason[(match < 0) & (duplicate_of == everyone)] = KEPT
    duplicate_of = np.where(match >= 0, len(images) + match, duplicate_of)
    reason[sets.set_of(duplicate_of) > num_known] = RESEMBLES_EVALUATION
    ones = np.ones(len(images))
    return Decisions(sets, reason, duplicate_of, ones, labels, ones, figures)


def _read_sets(inputs: list[Input], limit: int | None) -> ImageSets:
    return ImageSets([read_unembedded(each, None if number else limit) for number, each in enumerate(inputs)])


def _pixel_ids(sets: ImageSets) -> tuple[pa.ChunkedArray, int]:
    """Return the ids of the images' pixels, through all sets, and how many images cannot be read.

    An id is null where no other image has the same size, or it cannot be read.
    """
    shared = of_shared_size(_sizes(sets))
    uris = (table.column(0) for images, _, mine in sets.split(shared) for table in images.batches(["uri"], mine))
    read = read_keys(uris, len(shared), pixel_id, "decoding images")
    place = np.full(len(sets), -1)
    place[shared] = np.arange(len(shared))
    return read.take(pa.array(place, mask=place < 0)), read.null_count


def _sizes(sets: ImageSets) -> Int64:
    """Return the width and height of every image in one number; -1 where one is unknown.

    Sizes in manifests of other tools may be those before the image was turned upright: they do not count.
    """
    if any(images.source.manifest.provenance is None for images in sets.sets):
        return np.full(len(sets), -1)
    width, height = (
        pa.concat_tables(pa.table({name: images.image_column(name)}) for images in sets.sets).column(0)
        for name in ("width", "height")
    )
    sizes = pc.add(pc.multiply(pc.cast(width, pa.int64()), 1 << 31), height)
    return np.asarray(pc.fill_null(sizes, -1), np.int64)


def of_shared_size(sizes: Int64) -> Int64:
    """Return the images whose size (N,), negative where unknown, another has too: only these can have its pixels."""
    if (sizes < 0).any():
        return np.arange(len(sizes))
    _, place, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[place] > 1)
