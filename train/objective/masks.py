"""The masks of a step's global crops, with all indices that the step needs of them, made on the host.

So a GPU is never asked how many patches are masked. Where shapes must not change from step to step, the list of masked
patches is padded with rows that count nothing.

Shapes: C crops with N patches each, M masked patches, crop by crop and in order, P >= M with the padding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ...models.selected import SelectedPatches
from ..transfer import copied


class Padding(NamedTuple):
    """What the settings say of masks, from which the padded lengths follow."""

    mean_share: float  # of all patches: the masked ones, on average
    max_share: float  # of a crop's patches

    def length(self, num_masked: int, num_crops: int, num_patches: int) -> int:
        """Return P: what M is on average and some more, the same at nearly every step; else as much more as needed."""
        more = max(1, math.ceil(num_patches * math.sqrt(num_crops) / 8))  # measured: 1.2 to 2 times what M varies by
        average = math.ceil(num_crops * num_patches * self.mean_share)
        return average + more * max(1, math.ceil((num_masked - average) / more))

    def most(self, num_patches: int) -> int:
        """Return the most masked patches of a crop."""
        return int(num_patches * self.max_share)


@dataclass(frozen=True)
class Masks:
    """The masks of some crops, on their device."""

    counts: NDArray[np.int64]  # (C,) masked patches of each crop, on the host
    is_masked: Tensor  # (C, N) bool
    patches: Tensor  # (P,) int64: number of each masked patch among C N; of padding, any
    starts: Tensor  # (C,) int64: place of each crop's first patch in the list
    weights: Tensor  # (P,) float32: 1 / masked patches of its crop; 0 of padding
    padding: Padding | None = None

    @property
    def num_masked(self) -> int:
        """Return M."""
        return int(self.counts.sum())

    @property
    def is_row(self) -> Tensor | None:
        """Return (P,) 1 for a masked patch and 0 for padding; None without padding."""
        return None if self.padding is None else self.weights.sign()

    @property
    def selected(self) -> SelectedPatches:
        """Return the masked patches as a backbone takes them."""
        most = int(self.counts.max(initial=0)) if self.padding is None else self.padding.most(self.is_masked.shape[1])
        return SelectedPatches(self.patches, self.starts, max(most, int(self.counts.max(initial=0))))

    def places(self, crops: Sequence[range]) -> list[slice]:
        """Return which rows of the list are those of some ranges of crops."""
        ends = np.cumsum([0, *self.counts])
        return [slice(int(ends[part.start]), int(ends[part.stop])) for part in crops]

    def of_crops(self, crops: Sequence[range]) -> "Masks":
        """Return the masks of some ranges of crops, in that order."""
        num_patches = self.is_masked.shape[1]
        counts = np.concatenate([self.counts[part.start : part.stop] for part in crops])
        patches, starts, first_crop, first_row = [], [], 0, 0
        for part, place in zip(crops, self.places(crops), strict=True):
            patches.append(self.patches[place] + (first_crop - part.start) * num_patches)
            starts.append(self.starts[part.start : part.stop] + (first_row - place.start))
            first_crop, first_row = first_crop + len(part), first_row + place.stop - place.start
        weights = torch.cat([self.weights[place] for place in self.places(crops)])
        more = 0
        if self.padding is not None:
            more = self.padding.length(first_row, first_crop, num_patches) - first_row
        return Masks(
            counts,
            torch.cat([self.is_masked[part.start : part.stop] for part in crops]),
            F.pad(torch.cat(patches), (0, more)),
            torch.cat(starts),
            F.pad(weights, (0, more)),
            self.padding,
        )

    def rows_of(self, rows: Tensor, crops: Sequence[range]) -> Tensor:
        """Return those of the list's rows (P, K) that `of_crops` keeps, padded with zeros as it is."""
        kept = [rows[place] for place in self.places(crops)]
        chosen = kept[0] if len(kept) == 1 else torch.cat(kept)
        if self.padding is None:
            return chosen
        num_crops = sum(map(len, crops))
        length = self.padding.length(len(chosen), num_crops, self.is_masked.shape[1])
        return F.pad(chosen, (0, 0, 0, length - len(chosen)))


def placed_masks(masks: ArrayLike, device: torch.device, padding: Padding | None = None) -> Masks:
    """Return masks (C, N) of the host, True = masked, on the device by one copy.

    Raises ValueError for a tensor on a device, which the host would have to wait for.
    """
    if isinstance(masks, Tensor) and masks.device.type != "cpu":
        raise ValueError(f"masks are on {masks.device}; they are drawn and kept on the host")
    is_masked = np.asarray(masks, dtype=bool)
    counts = is_masked.sum(1)
    patches = np.flatnonzero(is_masked)
    ends = counts.cumsum()
    weights = np.repeat((1 / np.maximum(counts, 1)).astype(np.float32), counts)
    if padding is not None:
        more = (0, padding.length(len(patches), *is_masked.shape) - len(patches))
        patches, weights = np.pad(patches, more), np.pad(weights, more)
    placed, numbers, starts, row_weights = copied([is_masked, patches.astype(np.int64), ends - counts, weights], device)
    return Masks(counts, placed, numbers, starts, row_weights, padding)


def every_patch(masks: ArrayLike, device: torch.device) -> Masks:
    """Return masks of the shape of others, (C, N), that select all patches of all crops."""
    num_crops, num_patches = np.shape(masks)
    return Masks(
        np.full(num_crops, num_patches),
        torch.ones(num_crops, num_patches, dtype=torch.bool, device=device),
        torch.arange(num_crops * num_patches, device=device),
        torch.arange(num_crops, device=device) * num_patches,
        torch.full((num_crops * num_patches,), 1 / num_patches, device=device),
    )
