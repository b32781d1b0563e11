"""Masks of the global crops: random blocks of patches that the student does not see, exact in number.

`step_masks` is what training takes: the masks of a sample are a function of the seed and its index alone. `block_masks`
draws those of a batch at once, as the released code does.

Shapes: C crops, B images with 2 global crops each, N = rows * columns patches of a crop.
Source: dinov2/data/collate.py and masking.py (after BEiT).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .. import counter_rng

MIN_BLOCK_PATCHES = 4
BLOCK_ASPECT = (0.3, 1 / 0.3)  # height / width, drawn evenly in its logarithm
MAX_TRIES = 10  # for one block to fit
DRAWN_TRIES = 16  # random numbers of so many are drawn at once
# Steps between the samples of a sequence that fills [0, 1) evenly: 2^64 times the fractions of the roots of 29 and 22.
# Chosen: these stay even for every 2nd, 3rd, 4th, ... 256th sample, as each of so many processes has.
RATIO_STEP, MASKED_STEP = (np.uint64(math.sqrt(number) % 1 * 2.0**64) for number in (29, 22))

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]


def step_masks(
    seed: int, samples: NDArray[np.int64], grid: tuple[int, int], probability: float, ratio: tuple[float, float]
) -> Masks:
    """Return the masks (2 B, N) of samples (B,) of a run, view-major, True = masked.

    A sample's masks are the same in any batch and process. Both which views are masked and the ratios follow an even
    sequence over the samples: of the recipes' probability 0.5 one of the two views of each image is masked, and the
    ratios of any few consecutive samples, or of every n-th of a batch, fill their range.

    Deviation from the released code: that masks half of the crops of a process, wherever they are, the i-th of n with a
    ratio from the i-th of n equal parts of the range. Here the sums differ from that by a few patches, and it holds for
    every micro-batch and for all processes together too.
    """
    num_patches = grid[0] * grid[1]
    is_masked = np.stack([_even(seed, "masked", samples, MASKED_STEP, view / 2) for view in (0, 1)]) < probability
    # Where both views are masked, the second one's ratio is half the range away from the first one's.
    shift = np.stack([np.zeros(len(samples)), is_masked[0] / 2])
    share = ratio[0] + (ratio[1] - ratio[0]) * _even(seed, "mask ratio", samples, RATIO_STEP, shift)
    counts = np.where(is_masked, (num_patches * share).astype(np.int64), 0).ravel()
    crops = np.concatenate([2 * samples, 2 * samples + 1])

    def numbers(tries: int, slots: int, chosen: NDArray[np.int64]) -> Floats:
        return counter_rng.uniform(seed, f"mask blocks {tries}", crops[chosen], slots)

    return exact_masks(grid, counts, numbers)


def _even(seed: int, purpose: str, samples: NDArray[np.int64], step: np.uint64, shift: float | Floats) -> Floats:
    """Return where the samples are in an even sequence over [0, 1) that starts at random, moved on by `shift`."""
    places = counter_rng.hashed(seed, purpose, 0, 1)[0] + samples.astype(np.uint64) * step  # modulo 2^64
    moved: Floats = ((places >> np.uint64(11)).astype(np.float64) * 2.0**-53 + shift) % 1.0
    return moved


def block_masks(
    num_crops: int,
    grid: tuple[int, int],
    generator: np.random.Generator,
    *,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> Masks:
    """Return masks (C, N), exactly int(C * probability) of them not empty.

    The i-th of n masked crops has int(N * u) masked patches, u drawn from the i-th of n equal parts of the range of
    ratios. Which crops are masked is random.

    Args:
        num_crops: global crops of a batch, 2 B.
        grid: rows and columns of patches, N = rows * columns.
        probability: share of crops that are masked.
        ratio: least and greatest share of a masked crop's patches.

    Deviation from the released code: single patches are added where blocks mask too few, so counts are exact.
    """
    num_masked_crops = int(num_crops * probability)
    edges = np.linspace(*ratio, num_masked_crops + 1)
    counts = np.zeros(num_crops, dtype=np.int64)
    counts[:num_masked_crops] = grid[0] * grid[1] * generator.uniform(edges[:-1], edges[1:])
    masks = exact_masks(grid, counts, lambda _, slots, chosen: generator.random((num_crops, slots))[chosen])
    generator.shuffle(masks)
    return masks


def block_mask(grid: tuple[int, int], num_masked: int, generator: np.random.Generator) -> Masks:
    """Return one mask (rows, columns) of exactly `num_masked` patches, in blocks as far as they fit."""
    masks = exact_masks(grid, np.array([num_masked]), lambda _, slots, chosen: generator.random((1, slots))[chosen])
    return masks.reshape(grid)


def exact_masks(
    grid: tuple[int, int], counts: NDArray[np.int64], numbers: Callable[[int, int, NDArray[np.int64]], Floats]
) -> Masks:
    """Return masks (C, N) of exactly `counts` (C,) patches each, in blocks as far as they fit.

    A block has between 4 patches and the number still missing, at most half the grid, and adds at least one. After ten
    blocks in a row that do not fit, single patches are added. All crops draw their next block at once.

    Args:
        numbers: of (tries, slots, crops) returns random numbers in [0, 1), so many for each of these crops; others for
            every number of tries.
    """
    rows, columns = grid
    num_patches = rows * columns
    flat = np.zeros((len(counts), num_patches), dtype=bool)
    crops = np.flatnonzero(counts)  # what follows is of these
    masks = np.zeros((len(crops), rows, columns), dtype=bool)
    num_missing, failures = counts[crops], np.zeros(len(crops), dtype=np.int64)
    row, column = np.arange(rows), np.arange(columns)
    log_aspects = np.log(BLOCK_ASPECT)
    draws, tries = np.empty((len(crops), DRAWN_TRIES, 4)), 0
    open_crops = np.arange(len(crops))
    while len(open_crops):
        if tries % DRAWN_TRIES == 0:
            draws[open_crops] = numbers(tries, 4 * DRAWN_TRIES, crops[open_crops]).reshape(-1, DRAWN_TRIES, 4)
        area_share, aspect_share, top_share, left_share = draws[open_crops, tries % DRAWN_TRIES].T
        tries += 1
        room = np.minimum(num_missing[open_crops], num_patches // 2)
        smallest = np.minimum(MIN_BLOCK_PATCHES, room)
        area = smallest + (np.maximum(MIN_BLOCK_PATCHES, room) - smallest) * area_share
        aspect = np.exp(log_aspects[0] + (log_aspects[1] - log_aspects[0]) * aspect_share)
        height, width = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        top, left = np.floor(top_share * (rows - height + 1)), np.floor(left_share * (columns - width + 1))
        in_rows = (row >= top[:, None]) & (row < (top + height)[:, None])  # (open, rows)
        in_columns = (column >= left[:, None]) & (column < (left + width)[:, None])
        new = in_rows[:, :, None] & in_columns[:, None, :] & ~masks[open_crops]
        num_new = np.count_nonzero(new.reshape(len(new), -1), axis=1)
        fits = (height < rows) & (width < columns) & (num_new > 0) & (num_new <= room)
        masks[open_crops[fits]] |= new[fits]
        num_missing[open_crops] -= np.where(fits, num_new, 0)
        failures[open_crops] = np.where(fits, 0, failures[open_crops] + 1)
        open_crops = open_crops[(num_missing[open_crops] > 0) & (failures[open_crops] < MAX_TRIES)]
    flat[crops] = masks.reshape(len(crops), num_patches)
    short = np.flatnonzero(num_missing)
    if len(short):
        # The free patches with the smallest random keys, as many as are missing.
        crops = crops[short]
        keys = np.where(flat[crops], 2.0, numbers(-1, num_patches, crops))
        flat[crops] |= keys.argsort(axis=1).argsort(axis=1) < num_missing[short, None]
    return flat
