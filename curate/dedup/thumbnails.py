"""Pictures that were read, each once, on the disk: those of a pool do not fit in memory.

N images, B of them at a time.
"""

import errno
import tempfile
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ... import console
from ...errors import ToolkitError
from ...features.extract.decoding import ImageBatch, load_batches
from ...features.search.products import device
from ...features.threads import num_cores
from ...models.copy_descriptor import PREPROCESS
from ...store.cache import cache_folder, open_cache
from ...store.vectors import Int64, release
from ..inputs import EmbeddedImages
from .registration import AROUND_PX, CONTENT_PX, FRAME_PX, Plates, plates

READ_BATCH = 64
PLATE_PX = CONTENT_PX + 2 * AROUND_PX
RECORD = np.dtype(  # of Plates
    [
        ("frames", np.uint8, (3, FRAME_PX, FRAME_PX)),
        ("sizes", np.int64, 2),
        ("pixels", np.uint8, (3, PLATE_PX, PLATE_PX)),
        ("bounds", np.float32, 4),
    ]
)
MAPPED_BYTES = RECORD.itemsize + (64 << 10)  # the system maps 64 KB around what is read
MOST_MAPPED_BYTES = 1 << 30  # chosen: as much as the rest of a step takes
UNKNOWN, UNREADABLE = -2, -1  # in place of a place


class Shelf:
    """The pictures of some images that were read, in a nameless file."""

    def __init__(self, images: EmbeddedImages) -> None:
        self.images = images  # kept, so that its id stays its own
        self.place = np.full(len(images), UNKNOWN)  # (N,) in the file
        self.records = np.empty(0, RECORD)
        self.mapped = 0  # bytes, at most
        self.file = tempfile.TemporaryFile(dir=open_cache())

    def read(self, positions: Int64) -> None:
        """Read the pictures of the images at `positions`, but for those that are there."""
        missing = np.unique(positions[self.place[positions] == UNKNOWN])
        if not len(missing):
            return
        self.place[missing] = UNREADABLE
        uris = self.images.uris(missing).to_pylist()
        named = missing[[uri is not None for uri in uris]]
        count = len(self.records)
        batches = load_batches(
            (uri for uri in uris if uri is not None), PREPROCESS, batch_size=READ_BATCH, num_workers=num_cores()
        )
        with console.progress("reading images to look at", len(missing), "images") as advance:
            for batch in batches:
                if batch.indices:
                    self.place[named[batch.indices]] = count + np.arange(len(batch.indices))
                    count += len(batch.indices)
                    self._write(_records(batch).tobytes(), len(missing))
                advance(len(batch.indices) + len(batch.failures))
        if count:
            self.records = np.memmap(self.file, RECORD, "r+", shape=(count,))

    def at(self, positions: Int64) -> tuple[Plates, Tensor]:
        """Return the pictures of the images at `positions` (B,), which were read, and which of them are readable."""
        place = self.place[positions]
        is_there = place >= 0
        taken = self.records[np.maximum(place, 0)] if len(self.records) else np.zeros(len(place), RECORD)
        self._release(len(place) * MAPPED_BYTES)
        shown = Plates(*(torch.from_numpy(taken[name]).to(device()) for name in Plates._fields))
        return shown, torch.from_numpy(is_there).to(device())

    def close(self) -> None:
        """Give back the place that the pictures take."""
        with suppress(OSError):  # of a full disk
            self.file.close()

    def _release(self, num_bytes: int) -> None:
        """Let go of what is mapped once it could be too much, with so many bytes more."""
        self.mapped += num_bytes
        if self.mapped > MOST_MAPPED_BYTES:
            self.mapped = 0
            if self.records.nbytes > MOST_MAPPED_BYTES:
                release(self.records)

    def _write(self, data: bytes, num: int) -> None:
        try:
            self.file.write(data)
            self.file.flush()
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
            raise ToolkitError(
                f"no space left in {cache_folder()}, where {num:,} pictures that are looked at take"
                f" {num * RECORD.itemsize / 1e6:,.0f} MB; make room, or look at none by --no-verify"
            ) from None


def _records(batch: ImageBatch) -> npt.NDArray[np.void]:
    sizes = torch.tensor([(facts.width, facts.height) for facts in batch.facts])
    with torch.inference_mode():
        shown = plates(batch.pixels.to(device()), sizes.to(device()))
    records = np.empty(len(batch.indices), RECORD)
    for name, tensor in shown._asdict().items():
        records[name] = tensor.cpu().numpy()
    return records
