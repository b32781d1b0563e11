"""Products of blocks of vectors: one matrix product a tile, a tile a core, what is above a threshold at once.

A block product runs at the full rate of a machine, where scanning lists does not. Each product is computed by one
thread and its shape does not depend on how many there are, so its numbers repeat.

B left vectors, C right vectors, D numbers a vector, E pairs.
"""

import threading

import numpy as np
import torch
from torch import Tensor

from ...store.vectors import Float32, Int64, Stored, Vectors
from .similarity import similarities, tolerance

TILE = (1_024, 4_096)  # chosen: rows x columns of a product, 16 MB

_buffers = threading.local()


def device() -> torch.device:
    """Return where products are computed: on the GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unit_rows(stored: Stored) -> Tensor:
    """Return stored vectors (B, D) at length 1, float32 on the device; a zero vector stays zero."""
    rows = torch.from_numpy(np.array(stored)).to(device(), torch.float32)
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows.div_(lengths.masked_fill_(lengths == 0, 1.0))


def product(left: Tensor, right: Tensor) -> Float32:
    """Return left (B, D) x right (C, D) transposed, (B, C); the next product of this thread overwrites it."""
    if left.is_cuda:
        on_device: Float32 = (left @ right.T).cpu().numpy()
        return on_device
    size = len(left) * len(right)
    buffer = getattr(_buffers, "products", None)
    if buffer is None or len(buffer) < size:
        _buffers.products = buffer = torch.empty(size)
    out = buffer[:size].view(len(left), len(right))
    torch.mm(left, right.T, out=out)
    products: Float32 = out.numpy()
    return products


def tile_above(
    left: Tensor, left_rows: Int64, right: Tensor, right_rows: Int64, vectors: Vectors, threshold: float
) -> tuple[Int64, Int64]:
    """Return places (E,) in left and (E,) in right of the pairs above the threshold, in the order of left, then right.

    Float64 decides where float32 cannot tell a similarity from the threshold.

    Args:
        left: (B, D) the vectors at `left_rows` (B,), at length 1; `right` (C, D) likewise.
    """
    error = tolerance(vectors.dim)
    if left.is_cuda:  # only what is above leaves the card
        on_device = (left @ right.T).flatten()
        places = (on_device > threshold - error).nonzero()[:, 0]
        found, values = places.cpu().numpy(), on_device[places].cpu().numpy()
    else:
        products = product(left, right).reshape(-1)
        found = np.flatnonzero(products > threshold - error)
        values = products[found]
    is_above = values > threshold + error
    row, column = np.divmod(found, max(len(right), 1))
    unsure = np.flatnonzero(~is_above)
    if len(unsure):
        exact = similarities(vectors, left_rows[row[unsure]], vectors, right_rows[column[unsure]])
        is_above[unsure] = exact > threshold
        row, column = row[is_above], column[is_above]
    return row, column
