"""The tokens that the last block computes, by indices that are known before the step: nothing is asked of a device.

Shapes: a group has B sequences of n tokens, the last N of them patches; M selected patch tokens of a group, R = B + M
with the class tokens; m queries that a sequence has at most.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


class SelectedPatches(NamedTuple):
    """Which patch tokens of a group are wanted. The list may be padded, with rows that the caller ignores."""

    patches: Tensor  # (M,) int64: number of each among B N, sequence by sequence and in order; of padding, any
    starts: Tensor  # (B,) int64: place in the list of each sequence's first one
    most: int  # at least as many as any sequence has


class Selection(NamedTuple):
    """The R tokens of a group that are computed: its class tokens, then the selected patch tokens."""

    rows: Tensor  # (R,) in the pack
    sequences: Tensor  # (R,) the sequence of each
    positions: Tensor  # (R,) its place among its sequence's queries
    queries: Tensor  # (B, m) which of the R tokens each sequence asks for, padded with any


def selected_patches(is_selected: ArrayLike) -> SelectedPatches:
    """Return the patches where an array (B, N) of the host is True."""
    wanted = np.asarray(is_selected, dtype=bool)
    counts = wanted.sum(1)
    starts = torch.from_numpy(counts.cumsum() - counts)
    return SelectedPatches(torch.from_numpy(np.flatnonzero(wanted)), starts, int(counts.max(initial=0)))


def selection(
    selected: SelectedPatches | None, group: tuple[int, int], *, num_patches: int, start: int, device: torch.device
) -> Selection:
    """Return the selected tokens of a group (B, n) that starts at row `start` of the pack; None selects no patch."""
    num_sequences, length = group
    numbers = torch.arange(num_sequences, device=device)
    class_rows = start + numbers * length
    if selected is None:
        return Selection(class_rows, numbers, torch.zeros_like(numbers), numbers[:, None])
    patches, starts, most = selected
    sequences, patch = patches // num_patches, patches % num_patches
    # Padding lies far behind its sequence's last query, where it may read any other.
    places = torch.arange(len(patches), device=device) - starts.index_select(0, sequences)
    queries = num_sequences + (starts[:, None] + torch.arange(most, device=device)).clamp(max=len(patches) - 1)
    return Selection(
        torch.cat([class_rows, start + sequences * length + (length - num_patches) + patch]),
        torch.cat([numbers, sequences]),
        torch.cat([torch.zeros_like(numbers), 1 + places.clamp(max=most - 1)]),
        torch.cat([numbers[:, None], queries], dim=1),
    )
