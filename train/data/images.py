"""The images of a manifest in the order that training sees them, decoded ahead of time.

Sample s of a run is always the same image: pass s // n over the data, position s % n of that pass's permutation. So
batches depend neither on the number of workers nor on that of processes, and going on means starting at another sample.
"""

import math
import mmap
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ... import console
from ...errors import ToolkitError
from ...store.images import UnreadableImage, Values, read_bytes
from ...store.pixels import decode_picture, values_of
from .. import counter_rng

LOOK_AHEAD_BATCHES = 2  # being decoded while one is trained on; chosen
SLAB_BYTES = 8 << 20  # chosen: decoded images that are kept share pieces of memory so large
MAX_ASPECT = 4  # chosen: every image of a batch takes as much memory as the longest
SAMPLED_IMAGES = 32  # chosen: are read to foretell what decoded images take
MAX_UNREADABLE = 1000  # images in a row that cannot be read before the run gives up; chosen


@dataclass(frozen=True)
class ImageSet:
    """What training draws from: where the images are, and how often each is drawn."""

    uris: pa.ChunkedArray  # (n,) strings
    cumulative_weights: NDArray[np.float64] | None  # (n,) running sum, or None for equal weights

    def __len__(self) -> int:
        return len(self.uris)


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch: B images in the top left corners of one canvas."""

    images: Tensor  # (B, H, W, C) uint8 or uint16
    sizes: NDArray[np.int64]  # (B, 2): height and width of each in pixels
    samples: NDArray[np.int64]  # (B,): index of each in the run
    num_replaced: int  # images that could not be read, so that the next sample's stands in


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
    if (weights == weights[0]).all():
        return ImageSet(uris, None)
    return ImageSet(uris, weights.cumsum())


def drawn_rows(images: ImageSet, seed: int, samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row of the manifest that each sample of a run is.

    With equal weights every pass visits each image once. Otherwise position p of a pass, permuted, is a quantile of the
    weights: each image is drawn as often as its share of the pass says, rounded down or up.
    """
    num_images = len(images)
    passes, positions = np.divmod(samples, num_images)
    rows = counter_rng.permuted(seed, "order", passes, positions, num_images)
    if images.cumulative_weights is None:
        return rows
    quantiles = (rows + counter_rng.uniform(seed, "weighted order", samples, 1)[..., 0]) / num_images
    total = images.cumulative_weights[-1]
    drawn: NDArray[np.int64] = np.searchsorted(images.cumulative_weights, quantiles * total, side="right")
    return drawn


class PixelCache:
    """Decoded images by row, until so many bytes are full.

    They lie in memory of their own, and what says where holds no arrays: of hundreds of thousands of small pieces
    among a step's tensors the heap would be scattered, and grow.
    """

    def __init__(self, num_bytes: int) -> None:
        self._room = num_bytes
        self._slabs: list[mmap.mmap] = []
        self._used = SLAB_BYTES  # of the last slab
        self._places: dict[int, tuple[int, int, tuple[int, ...], str]] = {}  # slab, where in it, shape, dtype

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def add(self, row: int, pixels: Values) -> None:
        """Keep an image (H, W, C), where there is room."""
        if row in self._places or pixels.nbytes > self._room:
            return
        if self._used + pixels.nbytes > SLAB_BYTES:
            size = max(SLAB_BYTES, pixels.nbytes)
            self._slabs.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            self._used = 0
        self._places[row] = len(self._slabs) - 1, self._used, pixels.shape, pixels.dtype.str
        self._used += pixels.nbytes
        self._room -= pixels.nbytes
        self.pixels(row)[...] = pixels

    def pixels(self, row: int) -> Values:
        """Return a kept image, in place."""
        slab, start, shape, dtype = self._places[row]
        pixels: Values = np.frombuffer(self._slabs[slab], dtype, math.prod(shape), start).reshape(shape)
        return pixels


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
) -> Iterator[Batch]:
    """Yield batches, the next ones being decoded meanwhile.

    Args:
        seed: the run's.
        batches: the samples of each, all processes together; this one reads every `num_processes`-th.
        short_side_px: larger images are shrunk to this short side when decoded.
        num_workers: threads that decode; 0 decodes when asked.
        cache_bytes: decoded images kept in memory, until that many bytes are full.
        in_chans, bit_depth: of the pixels, 8 or 16 bits.

    Raises:
        ToolkitError: if a thousand images in a row cannot be read.
    """
    cache = PixelCache(cache_bytes)
    known_unreadable: dict[int, str] = {}

    def load(sample: int, row: int) -> tuple[int, Values, int]:
        """Return row, pixels (H, W, C) and how many samples were passed over because they cannot be read."""
        for passed_over in range(MAX_UNREADABLE):
            if passed_over:
                row = int(drawn_rows(images, seed, np.array([sample + passed_over]))[0])
            if row in cache:
                return row, cache.pixels(row), passed_over
            if row in known_unreadable:
                continue
            uri = images.uris[row].as_py()
            try:
                return row, read_pixels(uri, short_side_px, in_chans, bit_depth), passed_over
            except UnreadableImage as problem:
                if row not in known_unreadable:
                    console.warn(f"{uri}: {problem.reason}; training goes on with the next image")
                known_unreadable[row] = problem.reason
        raise ToolkitError(f"{MAX_UNREADABLE} images in a row cannot be read, the last one {uri}; check the manifest")

    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode") if num_workers else None
    pending: deque[tuple[NDArray[np.int64], list[int], list[Future[tuple[int, Values, int]]]]] = deque()

    def finished() -> Batch:
        numbers, rows, futures = pending.popleft()
        loaded = [future.result() for future in futures] or [
            load(*pair) for pair in zip(numbers.tolist(), rows, strict=True)
        ]
        for row, pixels, _ in loaded:
            cache.add(row, pixels)
        return _batch(numbers, [pixels for _, pixels, _ in loaded], sum(bool(passed) for _, _, passed in loaded))

    try:
        for samples in batches:
            numbers = np.array(samples[process::num_processes])
            rows = drawn_rows(images, seed, numbers).tolist()
            futures = []
            if pool is not None and not all(row in cache for row in rows):
                futures = [pool.submit(load, *pair) for pair in zip(numbers.tolist(), rows, strict=True)]
            pending.append((numbers, rows, futures))
            if pool is None or len(pending) > LOOK_AHEAD_BATCHES:
                yield finished()
        while pending:
            yield finished()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def read_pixels(uri: str, short_side_px: int, in_chans: int = 3, bit_depth: int = 8) -> Values:
    """Return an image as (H, W, C), shrunk to the short side where it is larger; a very long one loses its ends.

    Raises:
        UnreadableImage: if there is none, or none of so many channels.
    """
    image, _ = decode_picture(read_bytes(uri), in_chans, bit_depth, short_side_px)
    width, height = (min(side, MAX_ASPECT * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    scale = short_side_px / min(image.size)
    if scale < 1:
        image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.ascontiguousarray(values_of(image))


def decoded_bytes(images: ImageSet, short_side_px: int, in_chans: int = 3, bit_depth: int = 8) -> float:
    """Return what an image takes once read as above: the mean of some that are read for it; 0 if none can be."""
    taken = []
    for row in np.linspace(0, len(images) - 1, min(SAMPLED_IMAGES, len(images))).astype(int).tolist():
        with suppress(UnreadableImage):
            taken.append(read_pixels(images.uris[row].as_py(), short_side_px, in_chans, bit_depth).nbytes)
    return sum(taken) / max(len(taken), 1)


def _batch(samples: NDArray[np.int64], pixels: list[Values], num_replaced: int) -> Batch:
    sizes = np.array([image.shape[:2] for image in pixels], dtype=np.int64)
    canvas = np.zeros((len(pixels), *sizes.max(axis=0), pixels[0].shape[2]), dtype=pixels[0].dtype)
    for place, image in zip(canvas, pixels, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return Batch(torch.from_numpy(canvas), sizes, samples, num_replaced)
