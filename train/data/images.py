"""The images of a manifest in the order that training sees them, decoded ahead of time.

Processes decode; threads of this one copy what they decoded into the batch's memory, which a later batch takes again.

Sample s of a run is always the same image: pass s // n over the data, position s % n of that pass's permutation. So
batches depend neither on the number of workers nor on that of processes, and a run resumes at any sample.
"""

import math
import mmap
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ... import console
from ...errors import ToolkitError
from ...features.image_server import SHARED_BYTES
from ...features.image_workers import image_workers
from ...features.threads import map_in_order
from ...store.images import UnreadableImage, Values
from ...store.limits import DEFAULT_LIMITS, Limits
from ...store.memory import machine_memory
from .. import counter_rng
from .packed import Buffer, PackedImages, Place
from .pixels import decode_pixels

LOOK_AHEAD_BATCHES = 2  # chosen: decoded while one is trained on
MOST_READ = 16  # chosen: images that a process is asked for at a time
SAMPLED_IMAGES = 32  # chosen: read to estimate the memory of decoded images
MAX_UNREADABLE = 1000  # images in a row that cannot be read before the run gives up; chosen


@dataclass(frozen=True)
class ImageSet:
    """The images to train on, and how often each is drawn."""

    uris: pa.ChunkedArray  # (n,) strings
    cumulative_weights: NDArray[np.float64] | None  # (n,) running sum, or None for equal weights

    def __len__(self) -> int:
        return len(self.uris)


@dataclass(frozen=True)
class Batch:
    """This process's part of a batch: B images, in memory that is a later batch's when the next one is asked for."""

    images: PackedImages
    samples: NDArray[np.int64]  # (B,): index of each in the run
    num_replaced: int  # images that could not be read, each replaced by the next sample's


def image_set(images: pa.Table) -> ImageSet:
    """Return the images of a manifest's rows (columns `uri` and perhaps `weight`).

    Raises:
        ToolkitError: if there are none, a uri is missing, or weights are negative or all zero.
    """
    if not images.num_rows:
        raise ToolkitError("the manifest has no rows; training needs images")
    uris = images.column("uri")
    if uris.null_count:
        raise ToolkitError(f"{uris.null_count} of {len(uris)} rows have no uri; training needs the images themselves")
    if "weight" not in images.column_names:
        return ImageSet(uris, None)
    weights = images.column("weight").fill_null(1.0).to_numpy().astype(np.float64)
    if not (np.isfinite(weights).all() and weights.min() >= 0 and weights.sum() > 0):
        raise ToolkitError("the weight column has negative values, or nothing above 0; weights say how often to draw")
    return ImageSet(uris, None if (weights == weights[0]).all() else weights.cumsum())


def drawn_rows(images: ImageSet, seed: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the manifest's row of each sample of a run.

    With equal weights every pass visits each image once. Otherwise position p of a pass, permuted, is a quantile of the
    weights: an image is drawn n times its share of the weights, rounded down or up.
    """
    num_images, weights = len(images), images.cumulative_weights
    passes, positions = np.divmod(samples, num_images)
    rows = counter_rng.permuted(seed, "order", passes, positions, num_images)
    if weights is None:
        return rows
    quantiles = (rows + counter_rng.uniform(seed, "weighted order", samples, 1)[..., 0]) / num_images
    drawn: NDArray[np.int64] = np.searchsorted(weights, quantiles * weights[-1], side="right")
    return drawn


class PixelCache:
    """Decoded images by row, until so many bytes are full.

    They have a mapping of their own, whose pages count once written: hundreds of thousands of small arrays among a
    step's tensors would fragment the heap, and it would grow.
    """

    def __init__(self, num_bytes: int) -> None:
        self._room, self._used, self._lock = min(num_bytes, machine_memory()), 0, Lock()
        self._memory = mmap.mmap(-1, max(self._room, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._places: dict[int, tuple[int, tuple[int, ...], str]] = {}  # start, shape, dtype

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def add(self, row: int, pixels: Values) -> None:
        """Keep an image (H, W, C), where there is room."""
        with self._lock:
            if row in self._places or pixels.nbytes > self._room - self._used:
                return
            place = self._used, pixels.shape, pixels.dtype.str
            self._used += pixels.nbytes
        self._at(place)[...] = pixels
        self._places[row] = place  # last, since other threads read what has a place

    def pixels(self, row: int) -> Values:
        """Return a kept image, in place."""
        return self._at(self._places[row])

    def _at(self, place: tuple[int, tuple[int, ...], str]) -> Values:
        start, shape, dtype = place
        values: Values = np.frombuffer(self._memory, dtype, math.prod(shape), start).reshape(shape)
        return values


@dataclass(frozen=True)
class Part:
    """Some samples of a batch, and the buffer that their images go to."""

    buffer: Buffer
    samples: NDArray[np.int64]
    rows: NDArray[np.int64]  # of the manifest
    is_last: bool  # of its batch


def read_batches(
    images: ImageSet,
    *,
    seed: int,
    batches: Iterable[range],
    short_side_px: int,
    process: int = 0,
    num_processes: int = 1,
    num_workers: int = 0,
    cache_bytes: int = 0,
    in_chans: int = 3,
    bit_depth: int = 8,
    limits: Limits = DEFAULT_LIMITS,
    is_pinned: bool = False,
) -> Generator[Batch, None, None]:
    """Yield batches, the next ones being decoded meanwhile.

    Args:
        batches: the samples of each, all processes together; this one reads every `num_processes`-th.
        short_side_px: larger images are shrunk to this short side when decoded.
        num_workers: processes that decode ahead, each its part of every batch; 0 decodes a batch when asked for it.
        cache_bytes: decoded images kept in memory, until that many bytes are full.
        limits: what an image may cost; one that takes more cannot be read.
        is_pinned: whether a GPU copies the images.

    Raises:
        ToolkitError: if a thousand images in a row cannot be read.
    """
    cache, unreadable = PixelCache(cache_bytes), set[int]()
    decode = partial(decode_pixels, short_side_px=short_side_px, in_chans=in_chans, bit_depth=bit_depth, limits=limits)
    dtype = torch.uint16 if bit_depth == 16 else torch.uint8
    # What a process decodes at a time fits into the memory that it shares, if its images are no longer than 2:1.
    most_read = min(max(SHARED_BYTES // (2 * short_side_px**2 * in_chans * dtype.itemsize), 1), MOST_READ)
    num_parts = max(num_workers, 1)
    free: list[Buffer] = []

    def parts() -> Iterator[Part]:
        for batch in batches:
            samples = np.array(batch[process::num_processes])
            rows = drawn_rows(images, seed, samples)
            buffer = free.pop() if free else Buffer(is_pinned=is_pinned)
            split = zip(np.array_split(samples, num_parts), np.array_split(rows, num_parts), strict=True)
            for number, (some, rows_of_some) in enumerate(split):
                yield Part(buffer, some, rows_of_some, number == num_parts - 1)

    def load(part: Part) -> tuple[Part, list[Place], int]:
        """Copy the images of a part into its buffer; return their places, and how many are replaced."""
        places: dict[int, Place] = {}  # by row

        def add(rows: list[int]) -> None:
            """Copy those of these images that can be read."""
            places.update({row: part.buffer.add(cache.pixels(row)) for row in rows if row in cache})
            rows = [row for row in rows if row not in places and row not in unreadable]
            uris = [images.uris[row].as_py() for row in rows]

            def take(number: int, pixels: Values) -> None:
                places[rows[number]] = part.buffer.add(pixels)
                cache.add(rows[number], pixels)

            for row, uri, found in zip(rows, uris, read(uris, take), strict=True):
                if isinstance(found, UnreadableImage) and row not in unreadable:
                    unreadable.add(row)
                    console.warn(f"{uri}: {found.reason}; training goes on with the next image")

        def found(sample: int, row: int) -> tuple[Place, bool]:
            """Return a sample's place, and whether it is a later one's because its own cannot be read."""
            for skipped in range(MAX_UNREADABLE):
                if skipped:
                    row = int(drawn_rows(images, seed, np.array([sample + skipped]))[0])
                if row not in places:
                    add([row])
                if row in places:
                    return places[row], skipped > 0
            problem = f"{MAX_UNREADABLE} images in a row cannot be read, the last one {images.uris[row].as_py()}"
            raise ToolkitError(f"{problem}; check the manifest")

        rows = list(dict.fromkeys(part.rows.tolist()))
        for start in range(0, len(rows), most_read):
            add(rows[start : start + most_read])
        all_found = [found(sample, row) for sample, row in zip(part.samples.tolist(), part.rows.tolist(), strict=True)]
        return part, [place for place, _ in all_found], sum(is_later for _, is_later in all_found)

    with (
        ThreadPoolExecutor(num_parts, thread_name_prefix="decode") as pool,
        image_workers(decode, num_parts, limits) as read,
        closing(map_in_order(load, parts(), pool, LOOK_AHEAD_BATCHES * num_workers)) as loaded,
    ):
        samples, places, num_replaced = list[NDArray[np.int64]](), list[Place](), 0
        for part, places_of_part, num_replaced_of_part in loaded:
            samples.append(part.samples)
            places += places_of_part
            num_replaced += num_replaced_of_part
            if part.is_last:
                yield Batch(part.buffer.packed(places, in_chans, dtype), np.concatenate(samples), num_replaced)
                part.buffer.clear()
                free.append(part.buffer)
                samples, places, num_replaced = [], [], 0


def decoded_bytes(
    images: ImageSet, short_side_px: int, in_chans: int = 3, bit_depth: int = 8, limits: Limits = DEFAULT_LIMITS
) -> float:
    """Return the mean bytes of a decoded image, measured on a few; 0 if none can be read."""
    rows = np.linspace(0, len(images) - 1, min(SAMPLED_IMAGES, len(images))).astype(int)
    decode = partial(decode_pixels, short_side_px=short_side_px, in_chans=in_chans, bit_depth=bit_depth, limits=limits)
    with image_workers(decode, 1, limits) as read:
        found = read(images.uris.take(pa.array(rows)).to_pylist())
    taken = [pixels.nbytes for pixels in found if not isinstance(pixels, UnreadableImage)]
    return sum(taken) / max(len(taken), 1)
