"""Images of any sizes, one behind the other in one tensor of bytes, so that each takes its own memory and no more.

Shapes: B images (H, W, C) of any height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...store.images import Values

ALIGNMENT = 64  # bytes, of the start of an image
GROWTH = 1.25  # chosen: of the memory, over what a batch needs


class Place(NamedTuple):
    """Where an image lies: its first byte, and its height and width in pixels."""

    start: int
    height: int
    width: int


@dataclass(frozen=True)
class PackedImages:
    """B images in one tensor, each row by row."""

    data: Tensor  # (n,) uint8; behind the last image, a row of the widest one has room
    starts: NDArray[np.int64]  # (B,): first byte of each
    sizes: NDArray[np.int64]  # (B, 2): height and width of each in pixels
    channels: int
    dtype: torch.dtype  # uint8 or uint16

    def image(self, number: int) -> Tensor:
        """Return an image (H, W, C), in place."""
        height, width = self.sizes[number].tolist()
        start, num_bytes = int(self.starts[number]), height * width * self.channels * self.dtype.itemsize
        return self.data[start : start + num_bytes].view(self.dtype).view(height, width, self.channels)

    def on(self, device: torch.device) -> "PackedImages":
        """Return them on a device, by one copy that the host does not wait for where they are in pinned memory."""
        return replace(self, data=self.data.to(device, non_blocking=True))


class Buffer:
    """Memory for the images of one batch after another. Any thread may add images."""

    def __init__(self, *, is_pinned: bool = False) -> None:
        self._is_pinned = is_pinned  # page-locked, from which a GPU copies while the host goes on
        self._data = torch.empty(0, dtype=torch.uint8)
        self._lock = Lock()
        self.clear()

    def clear(self) -> None:
        """Forget the images."""
        self._end = 0
        self._beside: dict[int, Values] = {}  # by their start, images for which there is no room yet

    def add(self, pixels: Values) -> Place:
        """Copy an image (H, W, C) in."""
        with self._lock:
            start = self._end
            self._end += -(-pixels.nbytes // ALIGNMENT) * ALIGNMENT
        if start + pixels.nbytes <= len(self._data):
            self._put(start, pixels)
        else:
            self._beside[start] = pixels.copy()
        return Place(start, *pixels.shape[:2])

    def packed(self, places: Sequence[Place], channels: int, dtype: torch.dtype) -> PackedImages:
        """Return images of the buffer, in place: they hold until it is cleared."""
        starts, heights, widths = np.array(places, dtype=np.int64).T
        length = self._end + int(widths.max()) * channels * dtype.itemsize
        if length > len(self._data):
            old = self._data
            self._data = torch.empty(int(GROWTH * length), dtype=torch.uint8, pin_memory=self._is_pinned)
            self._data[: len(old)] = old
            for start, pixels in self._beside.items():
                self._put(start, pixels)
            self._beside.clear()
        return PackedImages(self._data[:length], starts, np.stack([heights, widths], axis=1), channels, dtype)

    def _put(self, start: int, pixels: Values) -> None:
        self._data.numpy()[start : start + pixels.nbytes] = np.ascontiguousarray(pixels).reshape(-1).view(np.uint8)


def packed(images: Sequence[Values]) -> PackedImages:
    """Return images (H, W, C) of one type, packed."""
    buffer = Buffer()
    places = [buffer.add(image) for image in images]
    return buffer.packed(places, images[0].shape[2], torch.from_numpy(images[0][:0]).dtype)
