"""Images decoded ahead in processes, in order, a batch at a time.

Shapes: B images, C channels, S side in pixels, T tiles.
"""

import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice

import numpy as np
import torch
from torch import Tensor

from ...models.cpu import spin_less
from ...models.preprocess import Preprocess
from ...store.images import UnreadableImage
from ..image_workers import image_workers
from ..threads import map_in_order
from .reading import ImageFacts, Loaded, Reading, Tiling, load
from .windows import Layout

TASK_IMAGES = 16  # chosen: images a process decodes at a time, so that small ones do not drown in hand-overs

Task = list[tuple[int, str | None]]  # uris with their numbers


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
    """Yield all images, decoded and cropped, in order and `batch_size` at a time, decoding ahead in processes.

    At most two batches and a little for every process are decoded ahead, so memory stays bounded.
    """
    asked = Reading() if reading is None else reading
    function = partial(load, preprocess=preprocess, reading=asked, tiling=tiling)

    def load_all(task: Task) -> list[tuple[int, Loaded | int | UnreadableImage | None]]:
        loaded = iter(read([uri for _, uri in task if uri is not None]))
        return [(index, None if uri is None else next(loaded)) for index, uri in task]

    batch, images, start = ImageBatch(), list[Loaded](), time.perf_counter()
    with (
        ThreadPoolExecutor(2 * num_workers, thread_name_prefix="decode", initializer=spin_less) as executor,
        image_workers(function, num_workers, asked.limits) as read,
    ):
        ahead = 2 * batch_size // TASK_IMAGES + 2 * num_workers  # tasks
        with closing(map_in_order(load_all, _tasks(uris), executor, ahead)) as tasks:
            for task in tasks:
                batch.waited_s += time.perf_counter() - start
                for index, result in task:
                    if isinstance(result, Loaded):
                        batch.indices.append(index)
                        images.append(result)
                    elif isinstance(result, UnreadableImage):
                        batch.failures.append((index, result.reason))
                    elif result is not None:
                        batch.known.append((index, result))
                    is_end = result is None and (images or batch.failures or batch.known)
                    if is_end or len(images) == batch_size:
                        yield _filled(batch, images)
                        batch, images = ImageBatch(), []
                start = time.perf_counter()


def _tasks(uris: Iterable[str | None]) -> Iterator[Task]:
    """Yield the names a few at a time, numbered; None, which ends a batch, is not counted, and comes last."""
    numbers = count()
    numbered = ((-1 if uri is None else next(numbers), uri) for uri in chain(uris, [None]))
    while task := list(islice(numbered, TASK_IMAGES)):
        yield task


def _filled(batch: ImageBatch, images: list[Loaded]) -> ImageBatch:
    """Return a batch with its images."""
    batch.facts = [image.facts for image in images]
    batch.layouts = [image.layout for image in images if image.layout is not None]
    if images:
        pixels = (np.concatenate if batch.layouts else np.stack)([image.pixels for image in images])
        batch.pixels = torch.from_numpy(pixels)
    return batch
