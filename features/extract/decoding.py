"""Images decoded ahead in threads, in order, a batch at a time.

Shapes: B images, C channels, S side in pixels, T tiles.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor

from ...models.preprocess import Preprocess, crop_picture
from ...store.images import UnreadableImage, image_id, read_bytes
from ...store.pixels import Picture, as_image, decode_picture
from .windows import Layout

TASK_IMAGES = 8  # chosen: images a thread decodes at a time, so that small ones do not drown in hand-overs

Cutting = Callable[[Picture], tuple[Tensor, Layout]]  # a picture into its tiles


@dataclass(frozen=True)
class Reading:
    """What else is asked of an image while it is read."""

    known: Callable[[str], int | None] | None = None  # by image_id: a number, if it need not be decoded
    reject: Callable[[Image.Image, tuple[int, int]], str | None] | None = None  # picture and full size -> reason
    decode_side: int = 0  # pixels that `reject` needs of the shorter side


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image once it was decoded."""

    image_id: str
    width: int  # pixels, upright and in full
    height: int


@dataclass(frozen=True)
class ImageBatch:
    """Decoded images, and what could not be decoded up to the last of them."""

    indices: list[int]  # (B,) positions among the uris, ascending
    facts: list[ImageFacts]  # (B,)
    pixels: Tensor  # (B, C, S, S) uint8 or uint16, or the tiles of all images (T, C, S, S)
    failures: list[tuple[int, str]]  # position and reason
    waited_s: float  # how long the caller had to wait for it
    layouts: list[Layout] = field(default_factory=list)  # (B,) of tiles
    known: list[tuple[int, int]] = field(default_factory=list)  # position, and what `Reading.known` said


def load_batches(
    uris: Iterable[str | None],
    preprocess: Preprocess,
    *,
    batch_size: int,
    num_workers: int,
    reading: Reading | None = None,
    cutting: tuple[Cutting, int] | None = None,
) -> Generator[ImageBatch, None, None]:
    """Yield all images, decoded and cropped, in order and `batch_size` at a time, decoding ahead in threads.

    Pillow, hashing and file reading let other threads run meanwhile; forked processes would not do, for FAISS hangs
    in them. At most two batches and a little for every thread are decoded ahead, so memory stays bounded.
    """
    ahead = 2 * batch_size // TASK_IMAGES + 2 * num_workers  # tasks
    loaded: list[tuple[int, Loaded]] = []
    failures: list[tuple[int, str]] = []
    known: list[tuple[int, int]] = []
    waited_s = 0.0
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
    submitted = (
        None if task is None else pool.submit(_load_all, task, preprocess, reading, cutting) for task in _tasks(uris)
    )
    tasks: deque[Future[list[tuple[int, Loaded | int | str]]] | None] = deque()
    try:
        while True:
            tasks.extend(islice(submitted, ahead - len(tasks)))
            if not tasks:
                break
            start = time.perf_counter()
            task = tasks.popleft()
            results = [] if task is None else task.result()
            waited_s += time.perf_counter() - start
            for index, result in results:
                match result:
                    case Loaded():
                        loaded.append((index, result))
                    case str():
                        failures.append((index, result))
                    case int():
                        known.append((index, result))
                if len(loaded) == batch_size:
                    yield _batch(loaded, failures, known, waited_s)
                    loaded, failures, known, waited_s = [], [], [], 0.0
            if task is None and (loaded or failures or known):
                yield _batch(loaded, failures, known, waited_s)
                loaded, failures, known, waited_s = [], [], [], 0.0
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _tasks(uris: Iterable[str | None]) -> Iterator[list[tuple[int, str]] | None]:
    """Yield the names a few at a time, numbered; None where a batch ends, and last."""
    index = 0
    task: list[tuple[int, str]] = []
    for uri in chain(uris, [None]):
        if uri is not None:
            task.append((index, uri))
            index += 1
        if task and (uri is None or len(task) == TASK_IMAGES):
            yield task
            task = []
        if uri is None:
            yield None


@dataclass(frozen=True)
class Loaded:
    """An image on its way into a batch."""

    facts: ImageFacts
    pixels: Tensor  # (C, S, S) uint8 or uint16, or its tiles (T, C, S, S)
    layout: Layout | None = None  # of the tiles


def _load_all(
    task: list[tuple[int, str]], preprocess: Preprocess, reading: Reading | None, cutting: tuple[Cutting, int] | None
) -> list[tuple[int, Loaded | int | str]]:
    if reading is None and cutting is None:
        return [(index, load(uri, preprocess)) for index, uri in task]
    return [(index, load(uri, preprocess, reading or Reading(), cutting)) for index, uri in task]


def load(
    uri: str, preprocess: Preprocess, reading: Reading = Reading(), cutting: tuple[Cutting, int] | None = None
) -> Loaded | int | str:
    """Return the image behind a uri, ready for the model; the reason why there is none; or what it is known by."""
    min_side = max(preprocess.min_side if cutting is None else cutting[1], reading.decode_side)
    try:
        data = read_bytes(uri)
        identity = image_id(data)
        if reading.known is not None and (number := reading.known(identity)) is not None:
            return number
        picture, size = decode_picture(data, preprocess.in_chans, preprocess.bit_depth, min_side)
    except UnreadableImage as problem:
        return problem.reason
    if reading.reject is not None and (reason := reading.reject(as_image(picture), size)) is not None:
        return reason
    facts = ImageFacts(identity, *size)
    return Loaded(facts, crop_picture(picture, preprocess)) if cutting is None else Loaded(facts, *cutting[0](picture))


def _batch(
    loaded: list[tuple[int, Loaded]], failures: list[tuple[int, str]], known: list[tuple[int, int]], waited_s: float
) -> ImageBatch:
    images = [image for _, image in loaded]
    layouts = [image.layout for image in images if image.layout is not None]
    join = torch.cat if layouts else torch.stack
    return ImageBatch(
        [index for index, _ in loaded],
        [image.facts for image in images],
        join([image.pixels for image in images]) if images else torch.empty(0),
        failures,
        waited_s,
        layouts,
        known,
    )
