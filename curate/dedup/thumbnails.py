"""Thumbnails of images: what registration compares. Each is made once and kept in a file, for a pool's exceed memory.

B images.
"""

import errno
import os
import tempfile
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ... import console
from ...errors import ToolkitError
from ...features.extract.decoding import ImageBatch, load_batches
from ...features.search.products import device
from ...features.threads import num_cores
from ...models.copy_descriptor import PREPROCESS, content_bounds
from ...store.cache import cache_folder, open_cache
from ...store.vectors import Int64
from ..inputs import EmbeddedImages

WHOLE_PX = 64  # a side, of whole images
CONTENT_PX = 32  # a side, of the content without flat margins; 64 finds no more copies, in twice the time
MARGIN_PX = 16  # kept on each side of the content: half of it again
CONTENT = slice(MARGIN_PX, MARGIN_PX + CONTENT_PX)
BLURRED_PX = 1  # at the border of an image that are left out, for they blur into what was put around it

READ_BATCH = 64
UNKNOWN, UNREADABLE = -2, -1  # mark images that were not read yet, and those that cannot be


class Thumbnails(NamedTuple):
    """Images at the size at which they are registered."""

    whole: Tensor  # (B, 3, 64, 64) uint8: every other pixel of the whole image; averages would hide clipped pixels
    sizes: Tensor  # (B, 2) int64: width and height of the original in pixels, 64 at most
    content: Tensor  # (B, 3, 64, 64) uint8: the content on the inner 32 x 32, with its surroundings or repeated edges
    bounds: Tensor  # (B, 4) left, right, top and bottom of the content, as shares of the image

    def at(self, which: Tensor) -> "Thumbnails":
        """Return some of them, by index or mask."""
        return Thumbnails(*(tensor[which] for tensor in self))

    def levels(self) -> Tensor:
        """Return the content and its surroundings in [0, 1], (B, 3, 64, 64)."""
        return self.content.float() / 255

    def edges(self) -> Tensor:
        """Return left, right, top and bottom of the images (B, 4) in coordinates in which contents go from -1 to 1."""
        first, last = self.bounds[:, ::2], self.bounds[:, 1::2]  # (B, 2), across and down
        half, middle = (last - first) / 2, (first + last) / 2
        edge = 2 * BLURRED_PX / CONTENT_PX
        return torch.stack([-middle / half + edge, (1 - middle) / half - edge], dim=2).flatten(1)


RECORD = np.dtype(  # of Thumbnails
    [
        ("whole", np.uint8, (3, WHOLE_PX, WHOLE_PX)),
        ("sizes", np.int64, 2),
        ("content", np.uint8, (3, CONTENT_PX + 2 * MARGIN_PX, CONTENT_PX + 2 * MARGIN_PX)),
        ("bounds", np.float32, 4),
    ]
)


def make_thumbnails(images: Tensor, sizes: Tensor) -> Thumbnails:
    """Return the thumbnails of images.

    Args:
        images: (B, 3, 128, 128) uint8, squeezed into the square.
        sizes: (B, 2) width and height in pixels before that.
    """
    levels = images.float() / 255
    bounds = content_bounds(levels)
    left, right, top, bottom = bounds.T  # (B,) each
    size = 2 * (CONTENT_PX + 2 * MARGIN_PX)  # then averaged over 2 x 2
    steps = (torch.arange(size, device=levels.device) + 0.5 - 2 * MARGIN_PX) / (2 * CONTENT_PX)
    across = left[:, None] + (right - left)[:, None] * steps  # (B, 128) pixels
    down = top[:, None] + (bottom - top)[:, None] * steps
    shape = (len(levels), size, size)
    grid = torch.stack([across[:, None, :].expand(shape), down[:, :, None].expand(shape)], dim=-1)
    content = F.grid_sample(levels, grid * 2 / levels.shape[-1] - 1, align_corners=False, padding_mode="border")
    return Thumbnails(
        images[:, :, :: images.shape[2] // WHOLE_PX, :: images.shape[3] // WHOLE_PX].contiguous(),
        sizes.clamp(max=WHOLE_PX),
        (F.avg_pool2d(content, 2) * 255).round().byte(),
        bounds / levels.shape[-1],
    )


class ThumbnailCache:
    """The thumbnails of some images, each read once, in a nameless file."""

    def __init__(self, images: EmbeddedImages) -> None:
        self.images = images
        self.record = np.full(len(images), UNKNOWN)  # (N,) its number in the file
        self.num_records = 0
        self.file = tempfile.TemporaryFile(dir=open_cache())

    def read(self, positions: Int64) -> None:
        """Read those of the images at `positions` that were not read before."""
        missing = np.unique(positions[self.record[positions] == UNKNOWN])
        if not len(missing):
            return
        self.record[missing] = UNREADABLE
        uris = self.images.uris(missing).to_pylist()
        named = missing[[uri is not None for uri in uris]]
        batches = load_batches(
            (uri for uri in uris if uri is not None), PREPROCESS, batch_size=READ_BATCH, num_workers=num_cores()
        )
        with console.progress("reading images to verify", len(missing), "images") as advance:
            for batch in batches:
                if batch.indices:
                    self.record[named[batch.indices]] = self.num_records + np.arange(len(batch.indices))
                    self.num_records += len(batch.indices)
                    self._write(_records(batch).tobytes(), len(missing))
                advance(len(batch.indices) + len(batch.failures))

    def at(self, positions: Int64) -> tuple[Thumbnails, Tensor]:
        """Return the thumbnails of the images at `positions` (B,), which were read, and which of them are readable."""
        numbers = self.record[positions]
        file, size = self.file.fileno(), RECORD.itemsize
        records = np.empty(len(numbers), RECORD)
        for row, number in enumerate(np.maximum(numbers, 0).tolist()):
            records[row] = np.frombuffer(os.pread(file, size, number * size).ljust(size, b"\0"), RECORD)[0]
        thumbnails = Thumbnails(*(torch.from_numpy(records[name]).to(device()) for name in Thumbnails._fields))
        return thumbnails, torch.from_numpy(numbers >= 0).to(device())

    def close(self) -> None:
        """Free the disk space."""
        with suppress(OSError):  # of a full disk
            self.file.close()

    def _write(self, data: bytes, num: int) -> None:
        try:
            self.file.write(data)
            self.file.flush()
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
            raise ToolkitError(
                f"no space left in {cache_folder()}, where the thumbnails of {num:,} images take"
                f" {num * RECORD.itemsize / 1e6:,.0f} MB; make room, or skip the pixel verification by --no-verify"
            ) from None


def _records(batch: ImageBatch) -> npt.NDArray[np.void]:
    sizes = torch.tensor([(facts.width, facts.height) for facts in batch.facts])
    with torch.inference_mode():
        made = make_thumbnails(batch.pixels.to(device()), sizes.to(device()))
    records = np.empty(len(batch.indices), RECORD)
    for name, tensor in made._asdict().items():
        records[name] = tensor.cpu().numpy()
    return records
