"""Filters of `embed`: exact measures of pictures whose measures are known."""

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from dinov2_toolkit.curate.embed.filters import Filters, grey_levels, sharpness


def grey(values: npt.NDArray[np.int64]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def test_sizes_and_shapes_are_those_of_the_full_image() -> None:
    small = Image.new("RGB", (8, 4))  # decoded at an eighth
    filters = Filters(min_side=33, max_aspect=2.0)
    assert filters.reason(small, (64, 32)) == "below --min-side 33: 64 x 32 pixels"
    assert filters.reason(small, (66, 33)) is None
    assert filters.reason(small, (33, 67)) == "above --max-aspect 2: 2.03, 33 x 67 pixels"
    assert filters.decode_side == 0


def test_contrast_is_the_standard_deviation_of_the_grey_levels() -> None:
    halves = grey(np.repeat([100, 104], 50).reshape(1, 100).repeat(100, axis=0))
    assert Filters(min_contrast=2.0).reason(halves, halves.size) is None
    assert Filters(min_contrast=2.01).reason(halves, halves.size) == "below --min-contrast 2.01: 2.00"
    assert (
        Filters(min_contrast=0.5).reason(Image.new("RGB", (9, 9), "navy"), (9, 9)) == "below --min-contrast 0.5: 0.00"
    )


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 31))
    laplacian = [
        values[row - 1, column] + values[row + 1, column] + values[row, column - 1] + values[row, column + 1]
        - 4 * values[row, column]
        for row in range(1, 19)
        for column in range(1, 30)
    ]  # fmt: skip
    assert sharpness(grey_levels(grey(values))) == pytest.approx(np.var(laplacian), rel=1e-5)
    ramp = np.add.outer(np.arange(50), 2 * np.arange(60))
    assert sharpness(grey_levels(grey(ramp))) == 0.0
    assert sharpness(np.zeros((2, 9), np.float32)) == 0.0


def test_blurred_images_are_told_from_sharp_ones_at_any_size() -> None:
    filters = Filters(min_sharpness=50.0)
    rng = np.random.default_rng(0)
    coarse = grey(rng.integers(0, 256, (64, 64)))
    for side in (256, 1024):
        sharp = coarse.resize((side, side), Image.Resampling.NEAREST)
        assert filters.reason(sharp, sharp.size) is None
        blurred = sharp.filter(ImageFilter.GaussianBlur(side / 16))
        assert str(filters.reason(blurred, blurred.size)).startswith("below --min-sharpness 50: ")


def test_measures_are_taken_at_a_fixed_size() -> None:
    board = grey(np.kron(np.indices((32, 32)).sum(0) % 2 * 255, np.ones((32, 32))))
    assert grey_levels(board).shape == (256, 256)
    assert np.array_equal(grey_levels(board), np.kron(np.indices((32, 32)).sum(0) % 2 * 255, np.ones((8, 8))))
    assert grey_levels(Image.new("L", (512, 1024))).shape == (512, 256)
    assert grey_levels(Image.new("L", (30, 20))).shape == (20, 30)
    assert Filters(min_sharpness=1.0).decode_side == 256
