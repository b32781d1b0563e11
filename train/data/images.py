"""The images of a manifest in the order that training sees them, decoded ahead of time.

Sample s of a run is always the same image: pass s // n over the data, position s % n of that pass's permutation. So
batches depend neither on the number of workers nor on that of processes, and a run resumes at any sample.
"""

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ... import console
from ...errors import ToolkitError
from ...features.image_workers import image_workers
from ...features.threads import map_in_order
from ...store.images import UnreadableImage, Values
from ...store.limits import DEFAULT_LIMITS, Limits
from ...store.memory import machine_memory
from .. import counter_rng
from .pixels import decode_pixels

LOOK_AHEAD_BATCHES = 2  # chosen: decoded while one is trained on
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
    """This process's part of a batch: B images in the top left corners of one canvas."""

    images: Tensor  # (B, H, W, C) uint8 or uint16
    sizes: NDArray[np.int64]  # (B, 2): height and width of each in pixels
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
        self._room, self._used = min(num_bytes, machine_memory()), 0
        self._memory = mmap.mmap(-1, max(self._room, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._places: dict[int, tuple[int, tuple[int, ...], str]] = {}  # start, shape, dtype

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def add(self, row: int, pixels: Values) -> None:
        """Keep an image (H, W, C), where there is room."""
        if row in self._places or pixels.nbytes > self._room - self._used:
            return
        place = self._used, pixels.shape, pixels.dtype.str
        self._at(place)[...] = pixels
        self._places[row] = place  # last, since other threads read what has a place
        self._used += pixels.nbytes

    def pixels(self, row: int) -> Values:
        """Return a kept image, in place."""
        return self._at(self._places[row])

    def _at(self, place: tuple[int, tuple[int, ...], str]) -> Values:
        start, shape, dtype = place
        values: Values = np.frombuffer(self._memory, dtype, math.prod(shape), start).reshape(shape)
        return values


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
) -> Iterator[Batch]:
    """Yield batches, the next ones being decoded meanwhile.

    Args:
        batches: the samples of each, all processes together; this one reads every `num_processes`-th.
        short_side_px: larger images are shrunk to this short side when decoded.
        num_workers: processes that decode ahead, each its part of every batch; 0 decodes a batch when asked for it.
        cache_bytes: decoded images kept in memory, until that many bytes are full.
        limits: what an image may cost; one that takes more cannot be read.

    Raises:
        ToolkitError: if a thousand images in a row cannot be read.
    """
    cache = PixelCache(cache_bytes)
    unreadable: set[int] = set()
    decode = partial(decode_pixels, short_side_px=short_side_px, in_chans=in_chans, bit_depth=bit_depth, limits=limits)

    def load(sample: int, row: int, decoded: Mapping[int, Values | UnreadableImage]) -> tuple[int, Values, bool]:
        """Return row and pixels (H, W, C), and whether they are a later sample's because this one cannot be read."""
        for skipped in range(MAX_UNREADABLE):
            if skipped:
                row = int(drawn_rows(images, seed, np.array([sample + skipped]))[0])
            if row in cache:
                return row, cache.pixels(row), skipped > 0
            uri = images.uris[row].as_py()
            if row in unreadable:
                continue
            pixels = decoded[row] if row in decoded else read([uri])[0]
            if not isinstance(pixels, UnreadableImage):
                return row, pixels, skipped > 0
            if row not in unreadable:
                console.warn(f"{uri}: {pixels.reason}; training goes on with the next image")
            unreadable.add(row)
        raise ToolkitError(f"{MAX_UNREADABLE} images in a row cannot be read, the last one {uri}; check the manifest")

    def load_part(part: NDArray[np.int64]) -> list[tuple[int, Values, bool]]:
        rows = [row for row in dict.fromkeys(part[:, 1].tolist()) if row not in cache and row not in unreadable]
        decoded = dict(zip(rows, read([images.uris[row].as_py() for row in rows]), strict=True))
        return [load(sample, row, decoded) for sample, row in part.tolist()]

    num_parts = max(num_workers, 1)
    own, again = tee(np.array(samples[process::num_processes]) for samples in batches)
    drawn = (np.stack([samples, drawn_rows(images, seed, samples)], axis=1) for samples in own)
    parts = (part for batch in drawn for part in np.array_split(batch, num_parts))
    with (
        ThreadPoolExecutor(num_parts, thread_name_prefix="decode") as pool,
        image_workers(decode, num_parts, limits) as read,
    ):
        ahead = LOOK_AHEAD_BATCHES * num_workers
        with closing(map_in_order(load_part, parts, pool, ahead)) as loaded:
            for samples in again:
                found = [image for part in islice(loaded, num_parts) for image in part]
                for row, pixels, _ in found:
                    cache.add(row, pixels)
                yield _batch(samples, [pixels for _, pixels, _ in found], sum(skipped for *_, skipped in found))


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


def _batch(samples: NDArray[np.int64], pixels: list[Values], num_replaced: int) -> Batch:
    sizes = np.array([image.shape[:2] for image in pixels], dtype=np.int64)
    canvas = np.zeros((len(pixels), *sizes.max(axis=0), pixels[0].shape[2]), dtype=pixels[0].dtype)
    for place, image in zip(canvas, pixels, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return Batch(torch.from_numpy(canvas), sizes, samples, num_replaced)
