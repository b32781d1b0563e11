"""Small arrays of the host, moved to the device together."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes; at least that of every number


def copied(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Return arrays of any types and shapes as tensors on the device, by one copy that the host does not wait for."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)])
    buffer = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = buffer.numpy()
    for array, start in zip(arrays, starts, strict=False):
        places[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    on_device = buffer.to(device, non_blocking=True)
    return [
        on_device[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, start in zip(arrays, starts.tolist(), strict=False)
    ]
