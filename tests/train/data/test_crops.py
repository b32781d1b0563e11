from dataclasses import replace

import numpy as np

from dinov2_toolkit.train.data.crops import ViewSettings, draw_crops

GLOBAL = ViewSettings(size_px=12, scale=(0.32, 1.0), blur=(0.0, 0.9), solarize=(0.0, 0.2))


def test_boxes_lie_in_the_image_with_area_and_aspect_in_range() -> None:
    sizes = np.tile(np.array([[200, 250]]), (4000, 1))
    boxes = draw_crops(0, "x", np.arange(4000), sizes, GLOBAL).boxes.reshape(-1, 4)
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 200).all() and (left + width <= 250).all()
    assert (top == 0).any() and (top + height == 200).any()
    share, aspect = height * width / 50_000, width / height
    assert 0.315 < share.min() < 0.33 and 0.95 < share.max() < 1.005
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35


def test_an_image_no_attempt_fits_is_cropped_in_the_middle() -> None:
    view = replace(GLOBAL, scale=(0.9, 1.0))
    boxes = draw_crops(0, "x", np.arange(1), np.array([[100, 1000]]), view).boxes
    assert boxes[0, 0].tolist() == [0, (1000 - 133) // 2, 100, 133]


def test_operations_happen_as_often_as_their_probabilities_say() -> None:
    samples = np.arange(20_000)
    crops = draw_crops(0, "x", samples, np.full((20_000, 2), 32), GLOBAL)
    shares = [crops.flip.mean(1), crops.jitter.mean(1), crops.gray.mean(1), crops.solarize.mean(1)]
    wanted = [(0.5, 0.5), (0.8, 0.8), (0.2, 0.2), (0.0, 0.2)]
    for share, (first, second) in zip([*shares, (crops.blur_sigma_px > 0).mean(1)], [*wanted, (0.0, 0.9)], strict=True):
        assert abs(share[0] - first) < 0.015 and abs(share[1] - second) < 0.015
    sigma = crops.blur_sigma_px[crops.blur_sigma_px > 0]
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() < 2.0
    low, high = crops.factors.min((0, 1)), crops.factors.max((0, 1))
    np.testing.assert_allclose(low, [0.6, 0.6, 0.8, -0.1], atol=1e-3)
    np.testing.assert_allclose(high, [1.4, 1.4, 1.2, 0.1], atol=1e-3)
    assert len(np.unique(crops.order.reshape(-1, 4), axis=0)) == 24
