import numpy as np
import pytest
from numpy.typing import NDArray

from dinov2_toolkit.train.data.masking import block_mask, block_masks, step_masks


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("num_crops", "probability", "expected"), [(128, 0.5, 64), (7, 0.5, 3), (6, 1.0, 6), (6, 0, 0)]
)
def test_an_exact_number_of_crops_is_masked(num_crops: int, probability: float, expected: int) -> None:
    masks = block_masks(num_crops, (14, 14), generator(), probability=probability)
    assert masks.shape == (num_crops, 196) and masks.dtype == bool
    assert masks.any(1).sum() == expected


def test_each_masked_crop_has_its_own_part_of_the_range_of_ratios() -> None:
    for seed in range(20):
        counts = np.sort(block_masks(32, (16, 16), generator(seed)).sum(1))[16:]
        edges = np.linspace(0.1, 0.5, 17)
        assert (counts >= np.floor(256 * edges[:-1])).all()
        assert (counts <= 256 * edges[1:]).all()


def test_the_mean_ratio_is_the_middle_of_the_range() -> None:
    masks = np.concatenate([block_masks(8, (14, 14), generator(seed)) for seed in range(100)])
    ratios = masks.mean(1)[masks.any(1)]
    assert ratios.mean() == pytest.approx(0.30, abs=0.005)


@pytest.mark.parametrize("num_masked", [0, 1, 3, 20, 98, 150, 196])
def test_a_mask_has_exactly_as_many_patches_as_asked(num_masked: int) -> None:
    for seed in range(20):
        assert block_mask((14, 14), num_masked, generator(seed)).sum() == num_masked


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 5), (4, 4)])
def test_small_grids_are_masked_exactly_too(grid: tuple[int, int]) -> None:
    for num_masked in range(grid[0] * grid[1] + 1):
        assert block_mask(grid, num_masked, generator(num_masked)).sum() == num_masked


def test_masked_patches_form_blocks() -> None:
    def share_of_masked_right_neighbours(masks: list[np.ndarray]) -> float:
        return float(np.mean([(mask[:, :-1] & mask[:, 1:]).sum() / mask[:, :-1].sum() for mask in masks]))

    blocks = [block_mask((14, 14), 60, generator(seed)) for seed in range(50)]
    scattered = [generator(seed).permutation(mask.ravel()).reshape(14, 14) for seed, mask in enumerate(blocks)]
    assert share_of_masked_right_neighbours(scattered) < 0.35
    assert share_of_masked_right_neighbours(blocks) > 0.7


def test_which_crops_are_masked_is_random() -> None:
    masked = np.stack([block_masks(8, (6, 6), generator(seed)).any(1) for seed in range(200)])
    assert (np.abs(masked.mean(0) - 0.5) < 0.15).all()


def test_masks_are_a_function_of_the_generator_alone() -> None:
    first, again, other = (block_masks(16, (7, 7), generator(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def masks_of(samples: NDArray[np.int64], probability: float = 0.5, seed: int = 0) -> NDArray[np.bool_]:
    """Masks (2, B, N) of samples on a grid of 14 x 14."""
    return step_masks(seed, samples, (14, 14), probability, (0.1, 0.5)).reshape(2, len(samples), 196)


def test_a_sample_has_the_same_masks_in_any_batch() -> None:
    whole = masks_of(np.arange(100, 140))
    for part in (slice(7, 8), slice(0, 40, 4), slice(10, 30)):
        assert (masks_of(np.arange(100, 140)[part]) == whole[:, part]).all()
    assert (masks_of(np.arange(100, 140), seed=1) != whole).any()


@pytest.mark.parametrize("num_processes", [1, 2, 8, 64])
def test_the_masks_of_a_process_are_half_of_its_crops_with_ratios_all_over_the_range(num_processes: int) -> None:
    counts = masks_of(np.arange(64) * num_processes).sum(2)  # (2, 64)
    assert ((counts > 0).sum(0) == 1).all()
    ratios = counts.max(0) / 196
    assert 0.09 < ratios.min() < 0.13 and 0.47 < ratios.max() < 0.5
    assert ratios.mean() == pytest.approx(0.3, abs=0.03)
    assert np.histogram(ratios, 4, (0.095, 0.5))[0].min() >= 10
    assert 24 <= (counts[0] > 0).sum() <= 40  # neither view is always the masked one


def test_other_probabilities_mask_that_share_of_the_crops() -> None:
    for probability in (0.0, 0.2, 0.8, 1.0):
        masked = masks_of(np.arange(1000), probability).any(2)
        assert masked.mean() == pytest.approx(probability, abs=0.005)
    both = masks_of(np.arange(1000), 1.0).sum(2) / 196
    assert both.mean(1) == pytest.approx([0.3, 0.3], abs=0.01)
    assert np.abs(both[0] - both[1]).min() > 0.19  # half of the range apart
