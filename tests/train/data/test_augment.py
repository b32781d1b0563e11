import colorsys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from dinov2_toolkit.train.data import augment
from dinov2_toolkit.train.data.augment import Crops, ViewSettings

GLOBAL = ViewSettings(size_px=12, scale=(0.32, 1.0), blur=(0.0, 0.9), solarize=(0.0, 0.2))
LOCAL = ViewSettings(size_px=7, scale=(0.05, 0.32), blur=(0.5,) * 3, solarize=(0.0,) * 3)


def canvas(*sizes: tuple[int, int], channels: int = 3) -> tuple[Tensor, np.ndarray]:
    """Random images of the given (height, width) on one canvas whose padding is noise, and their sizes."""
    height, width = np.max(sizes, axis=0)
    images = torch.randint(0, 256, (len(sizes), height, width, channels), dtype=torch.uint8)
    return images, np.array(sizes)


def plain(crops: Crops) -> Crops:
    """The same boxes with nothing done to their colours."""
    shape = crops.flip.shape
    no = np.zeros(shape, dtype=bool)
    return replace(crops, flip=no, jitter=no, gray=no, solarize=no, blur_sigma_px=np.zeros(shape))


def one_crop(**changes: object) -> Crops:
    """A single whole 6 x 6 image to which only `changes` happen."""
    no = np.zeros((1, 1), dtype=bool)
    crops = Crops(
        size_px=6,
        boxes=np.array([[[0, 0, 6, 6]]]),
        flip=no,
        jitter=no,
        factors=np.array([[[1.0, 1.0, 1.0, 0.0]]]),
        order=np.array([[[0, 1, 2, 3]]]),
        gray=no,
        blur_sigma_px=np.zeros((1, 1)),
        solarize=no,
    )
    return replace(crops, **changes)  # type: ignore[arg-type]


def placed(crops: Crops) -> augment.PlacedCrops:
    return augment.placed_crops(crops, (0.0,), (1.0,), 3, torch.device("cpu"))


def test_images_resized_a_few_at_a_time_are_those_resized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images, sizes = canvas((400, 20), (20, 400), (60, 50), (390, 22), (25, 380), (9, 9))
    crops = augment.draw_crops(0, "x", np.arange(6), sizes, GLOBAL)
    assert len(augment.resize_chunks(crops, 3)) == 1
    together = augment.apply_crops(images, crops)
    monkeypatch.setattr(augment, "CHUNK_BYTES", 4 * 3 * 2 * 400 * 22)
    chunks = [set(chunk.tolist()) for chunk in augment.resize_chunks(crops, 3)]
    assert len(chunks) > 1 and not any(chunk & {0, 3} and chunk & {1, 4} for chunk in chunks)  # high ones, wide ones
    torch.testing.assert_close(augment.apply_crops(images, crops), together)
    deep = torch.from_numpy(images.numpy().astype(np.uint16) * np.uint16(257))
    torch.testing.assert_close(augment.apply_crops(deep, crops), together, atol=1e-4, rtol=0)


def test_crops_equal_torch_and_pillow_antialiased_bicubic() -> None:
    torch.manual_seed(0)
    images, sizes = canvas((40, 33), (18, 50), (9, 9), (300, 120))
    for view in (GLOBAL, LOCAL):
        crops = augment.draw_crops(0, "x", np.arange(4), sizes, view)
        got = augment.resized_crops(images, plain(crops)).view(*crops.flip.shape, 3, view.size_px, view.size_px)
        for v in range(got.shape[0]):
            for b in range(4):
                top, left, height, width = crops.boxes[v, b]
                crop = images[b, top : top + height, left : left + width].permute(2, 0, 1).float() / 255
                size = (view.size_px, view.size_px)
                by_torch = F.interpolate(crop[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
                torch.testing.assert_close(got[v, b], by_torch, atol=1e-5, rtol=0)
                channel = Image.fromarray(crop[0].numpy(), mode="F").resize(size, Image.Resampling.BICUBIC)
                torch.testing.assert_close(got[v, b, 0], torch.from_numpy(np.array(channel)), atol=1e-5, rtol=0)


def test_flip_mirrors_the_crop() -> None:
    images, sizes = canvas((20, 30), (25, 14))
    crops = plain(augment.draw_crops(0, "x", np.arange(2), sizes, GLOBAL))
    mirrored = augment.resized_crops(images, replace(crops, flip=~crops.flip))
    torch.testing.assert_close(mirrored, augment.resized_crops(images, crops).flip(-1))


def test_a_sample_gets_the_same_crops_in_any_batch_and_canvas() -> None:
    images, sizes = canvas((20, 30), (25, 14), (16, 16))
    whole = augment.draw_crops(5, "x", np.array([10, 11, 12]), sizes, GLOBAL)
    pixels = augment.apply_crops(images, whole).view(2, 3, 3, 12, 12)
    alone = augment.draw_crops(5, "x", np.array([11]), sizes[1:2], GLOBAL)
    assert (alone.boxes[:, 0] == whole.boxes[:, 1]).all() and (alone.order[:, 0] == whole.order[:, 1]).all()
    smaller_canvas = images[1:2, :25, :14]
    torch.testing.assert_close(augment.apply_crops(smaller_canvas, alone), pixels[:, 1])


def test_boxes_lie_in_the_image_with_area_and_aspect_in_range() -> None:
    sizes = np.tile(np.array([[200, 250]]), (4000, 1))
    boxes = augment.draw_crops(0, "x", np.arange(4000), sizes, GLOBAL).boxes.reshape(-1, 4)
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 200).all() and (left + width <= 250).all()
    assert (top == 0).any() and (top + height == 200).any()
    share, aspect = height * width / 50_000, width / height
    assert 0.315 < share.min() < 0.33 and 0.95 < share.max() < 1.005
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35


def test_an_image_no_attempt_fits_is_cropped_in_the_middle() -> None:
    view = replace(GLOBAL, scale=(0.9, 1.0))
    boxes = augment.draw_crops(0, "x", np.arange(1), np.array([[100, 1000]]), view).boxes
    assert boxes[0, 0].tolist() == [0, (1000 - 133) // 2, 100, 133]


def test_operations_happen_as_often_as_their_probabilities_say() -> None:
    samples = np.arange(20_000)
    crops = augment.draw_crops(0, "x", samples, np.full((20_000, 2), 32), GLOBAL)
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


def test_hue_agrees_with_colorsys() -> None:
    pixels = torch.rand(5, 3, 4, 4)
    pixels[0, :, 0, 0] = 0.25  # gray: hue is undefined and nothing must change
    turns = torch.tensor([0.1, -0.1, 0.37, -0.5, 0.0])
    got = augment.shift_hue(pixels, turns.view(-1, 1, 1, 1))
    for n in range(5):
        for y in range(4):
            for x in range(4):
                hue, saturation, value = colorsys.rgb_to_hsv(*pixels[n, :, y, x].tolist())
                wanted = colorsys.hsv_to_rgb((hue + turns[n].item()) % 1, saturation, value)
                np.testing.assert_allclose(got[n, :, y, x].numpy(), wanted, atol=2e-6)


def test_jitter_follows_the_drawn_order() -> None:
    torch.manual_seed(1)
    pixels = torch.rand(1, 3, 6, 6)

    def brightness(x: Tensor) -> Tensor:
        return (x * 1.3).clamp(0, 1)

    def contrast(x: Tensor) -> Tensor:
        mean = (0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]).mean()
        return (0.7 * x + 0.3 * mean).clamp(0, 1)

    def saturation(x: Tensor) -> Tensor:
        gray = 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]
        return (1.2 * x - 0.2 * gray).clamp(0, 1)

    yes, factors = np.ones((1, 1), dtype=bool), np.array([[[1.3, 0.7, 1.2, 0.0]]])
    for order, wanted in (
        ([0, 1, 2, 3], saturation(contrast(brightness(pixels)))),
        ([2, 3, 1, 0], brightness(contrast(saturation(pixels)))),
    ):
        got = pixels.clone()
        augment._jitter_(got, placed(one_crop(jitter=yes, factors=factors, order=np.array([[order]]))))
        torch.testing.assert_close(got, wanted)


def test_blur_equals_a_reflected_convolution() -> None:
    pixels = torch.rand(2, 3, 9, 9)
    for size, radius in ((9, 4), (3, 2)):
        crop = pixels[:, :, :size, :size].contiguous()
        blurred = crop.clone()
        two = one_crop(blur_sigma_px=np.array([[1.5, 0.0]]), boxes=np.zeros((1, 2, 4), np.int64))
        augment._blur_(blurred, placed(two))
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / 1.5) ** 2)
        kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
        padded = F.pad(crop[:1], (radius,) * 4, mode="reflect")
        wanted = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
        torch.testing.assert_close(blurred[:1], wanted)
        assert (blurred[1] == crop[1]).all()


def test_grayscale_solarize_and_normalisation_are_their_formulas() -> None:
    torch.manual_seed(2)
    images = torch.randint(0, 256, (1, 6, 6, 3), dtype=torch.uint8)
    pixels = images[0].permute(2, 0, 1).float() / 255
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    yes = np.ones((1, 1), dtype=bool)
    torch.testing.assert_close(augment.apply_crops(images, one_crop())[0], (pixels - mean) / std)
    gray = (0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]).expand(3, 6, 6)
    torch.testing.assert_close(augment.apply_crops(images, one_crop(gray=yes))[0], (gray - mean) / std)
    inverted = torch.where(images[0].permute(2, 0, 1) >= 128, 1 - pixels, pixels)
    torch.testing.assert_close(augment.apply_crops(images, one_crop(solarize=yes))[0], (inverted - mean) / std)


def test_sixteen_bits_are_augmented_as_eight_are_and_the_lower_ones_count() -> None:
    for channels in (1, 3, 5):
        images, sizes = canvas((20, 30), (25, 14), channels=channels)
        deep = torch.from_numpy(images.numpy().astype(np.uint16) * np.uint16(257))  # the same share of their range
        crops = augment.draw_crops(0, "x", np.arange(2), sizes, GLOBAL)
        pixels, from_deep = (augment.apply_crops(pixels, crops, mean=(0.0,), std=(1.0,)) for pixels in (images, deep))
        torch.testing.assert_close(from_deep, pixels, atol=1e-5, rtol=0)
    ramp = torch.arange(36, dtype=torch.int32).add(1000).to(torch.uint16).view(1, 6, 6, 1)  # not two levels of 8 bits
    torch.testing.assert_close(
        augment.apply_crops(ramp, one_crop(), (0.0,), (1.0,)).view(6, 6) * 65535, ramp[0, :, :, 0].float()
    )


def test_any_number_of_channels_is_augmented_and_colour_only_at_three() -> None:
    for channels in (1, 5):
        images, sizes = canvas((20, 20), (20, 20), channels=channels)
        crops = augment.draw_crops(0, "x", np.arange(2), sizes, GLOBAL)
        pixels = augment.apply_crops(images, crops, mean=(0.0,), std=(1.0,))
        assert pixels.shape == (4, channels, 12, 12)
        assert pixels.min() >= 0 and pixels.max() <= 1
        # The first channel does not see the others' colours: only contrast's mean couples them.
        without = replace(crops, jitter=np.zeros_like(crops.jitter))
        first = augment.apply_crops(images[..., :1], without, mean=(0.0,), std=(1.0,))
        torch.testing.assert_close(augment.apply_crops(images, without, mean=(0.0,), std=(1.0,))[:, :1], first)
