"""Images decoded ahead in threads, in order, a batch at a time.

Shapes: B images, C channels, S side in pixels, T tiles.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, count, islice

import torch
from PIL import Image
from torch import Tensor

from ...models.preprocess import Preprocess, crop_picture
from ...store.images import UnreadableImage, image_id, read_bytes
from ...store.pixels import Picture, as_image, decode_picture
from ..threads import map_in_order
from .windows import Layout

TASK_IMAGES = 8  # chosen: images a thread decodes at a time, so that small ones do not drown in hand-overs


@dataclass(frozen=True)
class Reading:
    """What else is asked of an image while it is read."""

    known: Callable[[str], int | None] | None = None  # by image_id: a number, if it need not be decoded
    reject: Callable[[Image.Image, tuple[int, int]], str | None] | None = None  # picture and full size -> reason
    decode_side: int = 0  # pixels that `reject` needs of the shorter side


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut into tiles."""

    cut: Callable[[Picture], tuple[Tensor, Layout]]
    decode_side: int  # pixels that it needs of the shorter side


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a decoded image."""

    image_id: str
    width: int  # pixels, upright and in full
    height: int


@dataclass(frozen=True)
class Loaded:
    """An image on its way into a batch."""

    facts: ImageFacts
    pixels: Tensor  # (C, S, S) uint8 or uint16, or its tiles (T, C, S, S)
    layout: Layout | None = None  # of the tiles


@dataclass
class ImageBatch:
    """Decoded images, and what could not be decoded up to the last of them."""

    indices: list[int] = field(default_factory=list)  # (B,) positions among the uris, ascending
    facts: list[ImageFacts] = field(default_factory=list)  # (B,)
    pixels: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, C, S, S), or the tiles of all (T, C, S, S)
    failures: list[tuple[int, str]] = field(default_factory=list)  # position and reason
    waited_s: float = 0.0  # how long the caller had to wait for it
    layouts: list[Layout] = field(default_factory=list)  # (B,) of tiles
    known: list[tuple[int, int]] = field(default_factory=list)  # position, and what `Reading.known` said


def load_batches(
    uris: Iterable[str | None],
    preprocess: Preprocess,
    *,
    batch_size: int,
    num_workers: int,
    reading: Reading | None = None,
    tiling: Tiling | None = None,
) -> Generator[ImageBatch, None, None]:
    """Yield all images, decoded and cropped, in order and `batch_size` at a time, decoding ahead in threads.

    Pillow, hashing and file reading let other threads run meanwhile; forked processes would not do, for FAISS hangs
    in them. At most two batches and a little for every thread are decoded ahead, so memory stays bounded.
    """
    asked = Reading() if reading is None else reading

    def load_all(task: list[tuple[int, str | None]]) -> list[tuple[int, Loaded | int | str | None]]:
        return [(index, uri and load(uri, preprocess, asked, tiling)) for index, uri in task]

    batch, images, start = ImageBatch(), list[Loaded](), time.perf_counter()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="decode") as executor:
        ahead = 2 * batch_size // TASK_IMAGES + 2 * num_workers  # tasks
        with closing(map_in_order(load_all, _tasks(uris), executor, ahead)) as tasks:
            for task in tasks:
                batch.waited_s += time.perf_counter() - start
                for index, result in task:
                    if isinstance(result, Loaded):
                        batch.indices.append(index)
                        images.append(result)
                    elif isinstance(result, str):
                        batch.failures.append((index, result))
                    elif result is not None:
                        batch.known.append((index, result))
                    is_end = result is None and (images or batch.failures or batch.known)
                    if is_end or len(images) == batch_size:
                        yield _filled(batch, images)
                        batch, images = ImageBatch(), []
                start = time.perf_counter()


def _tasks(uris: Iterable[str | None]) -> Iterator[list[tuple[int, str | None]]]:
    """Yield the names a few at a time, numbered; None, which ends a batch, is not counted, and comes last."""
    numbers = count()
    numbered = ((-1 if uri is None else next(numbers), uri) for uri in chain(uris, [None]))
    while task := list(islice(numbered, TASK_IMAGES)):
        yield task


def load(uri: str, preprocess: Preprocess, reading: Reading, tiling: Tiling | None) -> Loaded | int | str:
    """Return the image behind a uri, ready for the model; or the reason why there is none; or its number if known."""
    side = preprocess.min_side if tiling is None else tiling.decode_side
    try:
        data = read_bytes(uri)
        identity = image_id(data)
        if reading.known is not None and (number := reading.known(identity)) is not None:
            return number
        picture, size = decode_picture(data, preprocess.in_chans, preprocess.bit_depth, max(side, reading.decode_side))
    except UnreadableImage as problem:
        return problem.reason
    if reading.reject is not None and (reason := reading.reject(as_image(picture), size)) is not None:
        return reason
    facts = ImageFacts(identity, *size)
    return Loaded(facts, crop_picture(picture, preprocess)) if tiling is None else Loaded(facts, *tiling.cut(picture))


def _filled(batch: ImageBatch, images: list[Loaded]) -> ImageBatch:
    """Return a batch with its images."""
    batch.facts = [image.facts for image in images]
    batch.layouts = [image.layout for image in images if image.layout is not None]
    if images:
        batch.pixels = (torch.cat if batch.layouts else torch.stack)([image.pixels for image in images])
    return batch
