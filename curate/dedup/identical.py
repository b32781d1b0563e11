"""Copies found without a model: the very same bytes, or the very same pixels in whatever file.

N images.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import pyarrow as pa

from ... import console
from ...store import tables
from ...store.images import ARRAY_START, UnreadableImage, decode, read_array, read_bytes
from ...store.vectors import Int64

TASK_IMAGES = 8  # chosen: images a thread reads at a time, so that small ones do not drown in hand-overs

Key = Callable[[bytes], str]


def pixel_id(data: bytes) -> str:
    """Return the identity of a picture: BLAKE2b-128, in hex, of its size and its upright 8-bit RGB pixels.

    What is transparent lies on white, so files differ where people would see a difference. Of a .npy array all values
    count, since a picture would show three channels of it.
    Raises UnreadableImage as `store.images.decode` does.
    """
    if data.startswith(ARRAY_START):
        values = read_array(data)
        digest = hashlib.blake2b(f"{values.shape} {values.dtype} ".encode(), digest_size=16)
        digest.update(values.tobytes())
        return digest.hexdigest()
    picture = decode(data)
    digest = hashlib.blake2b(f"{picture.width} x {picture.height} ".encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def read_ids(uris: Iterable[pa.ChunkedArray], num: int, key: Key, progress: str) -> tuple[pa.ChunkedArray, str]:
    """Read `num` images in threads and return their ids, (num,), null where one cannot be read, and one such reason.

    Args:
        uris: their names, in pieces.
        key: `pixel_id`, or `store.images.image_id` for the bytes.
    """
    chunks, reason = [], ""
    with ThreadPoolExecutor(os.cpu_count(), "read") as pool, console.progress(progress, num, "images") as advance:
        for piece in uris:
            ids: list[str | None] = []
            for found, problem in _in_order(pool, piece.to_pylist(), key):
                ids.extend(found)
                reason = reason or problem
                advance(len(found))
            chunks.append(pa.array(ids, pa.string()))
    return pa.chunked_array(chunks, pa.string()), reason


def _in_order(pool: ThreadPoolExecutor, uris: list[str | None], key: Key) -> Iterator[tuple[list[str | None], str]]:
    names = iter(uris)
    running: deque[Future[tuple[list[str | None], str]]] = deque()
    while True:
        while len(running) < 4 * (os.cpu_count() or 1) and (task := list(islice(names, TASK_IMAGES))):
            running.append(pool.submit(_ids_of, task, key))
        if not running:
            return
        yield running.popleft().result()


def _ids_of(uris: list[str | None], key: Key) -> tuple[list[str | None], str]:
    ids: list[str | None] = []
    reason = ""
    for uri in uris:
        try:
            if uri is None:
                raise UnreadableImage("no uri")
            ids.append(key(read_bytes(uri)))
        except UnreadableImage as problem:
            ids.append(None)
            reason = reason or f"{uri}: {problem.reason}"
    return ids, reason


def same_key(keys: Iterable[pa.ChunkedArray], num: int, memory: int | None) -> Int64:
    """Return for every one of `num` images the first one with the same key, (N,); a null key is like no other.

    The keys come in pieces, and are compared within `memory` bytes, and on disk beyond.
    """
    result = np.arange(num)
    with tables.connect(memory) as connection:
        connection.register("given", _numbered(keys))
        connection.execute("create table images as select * from given where key is not null")
        copies = connection.sql("""
            with several as (select key, min(row) as first from images group by key having count(*) > 1)
            select row, first from images join several using (key) where row > first
        """)
        for batch in copies.to_arrow_reader(tables.BATCH_ROWS):
            result[batch.column("row").to_numpy()] = batch.column("first").to_numpy()
    return result


def first_in(keys: Iterable[pa.ChunkedArray], num: int, others: Iterable[pa.ChunkedArray], memory: int | None) -> Int64:
    """Return for every one of `num` images the first of the others with the same key, (N,); -1: there is none."""
    result = np.full(num, -1)
    with tables.connect(memory) as connection:
        connection.register("given", _numbered(keys))
        connection.execute("create table images as select * from given where key is not null")
        connection.register("others", _numbered(others))
        found = connection.sql("""
            select images.row as row, min(others.row) as first from others join images using (key) group by images.row
        """)
        for batch in found.to_arrow_reader(tables.BATCH_ROWS):
            result[batch.column("row").to_numpy()] = batch.column("first").to_numpy()
    return result


def _numbered(keys: Iterable[pa.ChunkedArray]) -> pa.RecordBatchReader:
    """Return the keys with their rows as one stream."""
    schema = pa.schema([pa.field("key", pa.string()), pa.field("row", pa.int64())])

    def numbered() -> Iterator[pa.Table]:
        start = 0
        for piece in keys:
            yield pa.table([piece, pa.array(np.arange(start, start + len(piece)))], schema=schema)
            start += len(piece)

    return tables.stream(schema, numbered())


def of_shared_size(sizes: Int64) -> Int64:
    """Return the images whose size (N,), negative where unknown, another has too: only these can have its pixels."""
    if (sizes < 0).any():
        return np.arange(len(sizes))
    _, place, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[place] > 1)
