"""Masks of the global crops: random blocks of patches that the student does not see, exact in number."""

import math

import numpy as np
from numpy.typing import NDArray

MIN_BLOCK_PATCHES = 4
BLOCK_ASPECT = (0.3, 1 / 0.3)  # height / width, drawn evenly in its logarithm
MAX_TRIES = 10  # for one block to fit


def block_masks(
    num_crops: int,
    grid: tuple[int, int],
    generator: np.random.Generator,
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> NDArray[np.bool_]:
    """Return masks (num_crops, N) bool, True = masked, exactly int(num_crops * probability) of them not empty.

    The i-th of n masked crops has int(N * u) masked patches, u drawn from the i-th of n equal parts of the range of
    ratios. Which crops are masked is random.

    Args:
        num_crops: global crops of a batch, 2 B.
        grid: rows and columns of patches, N = rows * columns.
        probability: share of crops that are masked.
        ratio: least and greatest share of a masked crop's patches.

    Source: dinov2/data/collate.py and masking.py (after BEiT). Deviation: single patches are added where blocks mask
    too few, so counts are exact.
    """
    num_masked_crops = int(num_crops * probability)
    masks = np.zeros((num_crops, grid[0] * grid[1]), dtype=bool)
    edges = np.linspace(*ratio, num_masked_crops + 1)
    for crop, share in enumerate(generator.uniform(edges[:-1], edges[1:])):
        masks[crop] = block_mask(grid, int(grid[0] * grid[1] * share), generator).ravel()
    generator.shuffle(masks)
    return masks


def block_mask(grid: tuple[int, int], num_masked: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Return one mask (rows, columns) bool of exactly `num_masked` patches, in blocks as far as they fit.

    A block has between 4 patches and the number still missing, at most half the grid, and adds at least one.
    """
    rows, columns = grid
    mask = np.zeros(grid, dtype=bool)
    num_missing, tries = num_masked, 0
    while num_missing > 0 and tries < MAX_TRIES:
        tries += 1
        room = min(num_missing, rows * columns // 2)
        area = generator.uniform(min(MIN_BLOCK_PATCHES, room), max(MIN_BLOCK_PATCHES, room))
        aspect = math.exp(generator.uniform(math.log(BLOCK_ASPECT[0]), math.log(BLOCK_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = generator.integers(rows - height + 1), generator.integers(columns - width + 1)
        block = mask[top : top + height, left : left + width]
        num_new = block.size - int(block.sum())
        if 0 < num_new <= room:
            block[:] = True
            num_missing, tries = num_missing - num_new, 0
    free = np.flatnonzero(~mask)
    mask.ravel()[generator.choice(free, num_missing, replace=False)] = True
    return mask
