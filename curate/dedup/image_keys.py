"""Keys of images by which exact copies are found without a model: ids of their bytes, or of their pixels.

N images, R of a reference.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ... import console
from ...errors import ToolkitError
from ...features.image_workers import Read, image_workers
from ...features.threads import map_in_order, num_cores
from ...store import tables
from ...store.images import UnreadableImage, image_id
from ...store.vectors import Int64
from ..inputs import EmbeddedImages

ID_LENGTH = 32  # hex digits of BLAKE2b-128
TASK_IMAGES = 8  # chosen: images a thread reads at a time, so that small ones do not drown in hand-overs

Keys = Iterable[pa.ChunkedArray]  # of strings, null where unknown, in pieces


def image_ids(images: EmbeddedImages) -> Iterator[pa.ChunkedArray]:
    """Yield the `image_id` of all images, in pieces."""
    for table in images.batches(["image_id"]):
        yield table.column(0)


def without_byte_id(images: EmbeddedImages) -> Int64:
    """Return the images without an id of their bytes, rising: they have none, or one of another tool."""
    if images.source.manifest.provenance is None:
        return np.arange(len(images))
    is_ours = pc.equal(pc.utf8_length(images.image_column("image_id")), ID_LENGTH)
    return np.flatnonzero(~pc.fill_null(is_ours, False).to_numpy())


def byte_ids(images: EmbeddedImages) -> pa.ChunkedArray:
    """Return the ids of the images' bytes, (N,); images without one are read."""
    ids, unknown = images.image_column("image_id"), without_byte_id(images)
    if not len(unknown):
        return ids
    uris = (table.column(0) for table in images.batches(["uri"], unknown))
    place = np.full(len(ids), -1)
    place[unknown] = np.arange(len(unknown))
    read = read_keys(uris, len(unknown), image_id, "reading images").take(pa.array(place, mask=place < 0))
    return pc.if_else(pa.array(place < 0), ids, read)


def read_keys(uris: Keys, num: int, key: Callable[[bytes], str], progress: str) -> pa.ChunkedArray:
    """Read `num` images in processes and return `key` of their bytes, (num,), null where one cannot be read.

    Warns of images that cannot be read; raises ToolkitError when none can.
    """
    chunks, reason = [], ""
    with (
        ThreadPoolExecutor(num_cores()) as threads,
        image_workers(key, num_cores()) as read_images,
        console.progress(progress, num, "images") as advance,
    ):
        for piece in uris:
            tasks = (piece.slice(start, TASK_IMAGES).to_pylist() for start in range(0, len(piece), TASK_IMAGES))
            keys: list[str | None] = []
            for found, problem in map_in_order(partial(_keys_of, read_images), tasks, threads):
                keys.extend(found)
                reason = reason or problem
                advance(len(found))
            chunks.append(pa.array(keys, pa.string()))
    read = pa.chunked_array(chunks, pa.string())
    if num and read.null_count == num:
        raise ToolkitError(f"none of {num:,} images can be read ({reason}); correct their names first")
    if read.null_count:
        console.warn(f"{read.null_count:,} of {num:,} images cannot be read and count as unique: {reason}")
    return read


def _keys_of(read: Read[str], uris: list[str | None]) -> tuple[list[str | None], str]:
    """Return the keys of some images, null where there is none, and the first reason."""
    found = iter(read([uri for uri in uris if uri is not None]))
    keys: list[str | None] = []
    reason = ""
    for uri in uris:
        key = UnreadableImage("no uri") if uri is None else next(found)
        if isinstance(key, UnreadableImage):
            reason = reason or f"{uri}: {key.reason}"
        keys.append(None if isinstance(key, UnreadableImage) else key)
    return keys, reason


def first_with_same_key(keys: Keys, num: int, memory: int | None, reference: Sequence[Keys] | None = None) -> Int64:
    """Return for each of `num` images the first one with the same key, (N,); a null key equals no other.

    The keys are compared within `memory` bytes, and on disk beyond.

    Args:
        reference: keys of other images, set after set; then the first of these, (N,) counted through all sets, -1 where
            there is none.
    """
    result = np.arange(num) if reference is None else np.full(num, -1)
    if reference is not None and not reference:
        return result
    with tables.connect(memory) as connection:
        connection.register("given", _numbered(keys))
        connection.execute("create table images as select * from given where key is not null")
        others = "create temp view others as from images"
        if reference is not None:
            connection.register("reference", _numbered(chain.from_iterable(reference)))
            others = "create temp view others as from reference semi join images using (key)"
        connection.execute(others)
        found = connection.sql(
            "with firsts as (select key, min(row) as first from others group by key) "
            "select row, first from images join firsts using (key)"
        )
        for batch in found.to_arrow_reader(tables.BATCH_ROWS):
            result[batch.column("row").to_numpy()] = batch.column("first").to_numpy()
    return result


def _numbered(keys: Keys) -> pa.RecordBatchReader:
    """Return the keys with their rows as one stream."""
    schema = pa.schema([pa.field("key", pa.string()), pa.field("row", pa.int64())])

    def numbered() -> Iterator[pa.Table]:
        start = 0
        for piece in keys:
            yield pa.table([piece, pa.array(np.arange(start, start + len(piece)))], schema=schema)
            start += len(piece)

    return tables.stream(schema, numbered())
