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
from dinov2_toolkit.train.data.crops import Crops, ViewSettings, draw_crops
from dinov2_toolkit.train.data.packed import PackedImages, packed

GLOBAL = ViewSettings(size_px=12, scale=(0.32, 1.0), blur=(0.0, 0.9), solarize=(0.0, 0.2))
LOCAL = ViewSettings(size_px=7, scale=(0.05, 0.32), blur=(0.5,) * 3, solarize=(0.0,) * 3)


def random_images(*sizes: tuple[int, int], channels: int = 3) -> PackedImages:
    """Random images of the given (height, width), with noise between and behind them."""
    images = packed([torch.randint(0, 256, (*size, channels), dtype=torch.uint8).numpy() for size in sizes])
    data = torch.randint(0, 256, images.data.shape, dtype=torch.uint8)
    noisy = replace(images, data=data)
    for number in range(len(sizes)):
        noisy.image(number).copy_(images.image(number))
    return noisy


def deep(images: PackedImages) -> PackedImages:
    """The same images of 16 bits, with the same share of their range."""
    return packed([image.numpy().astype(np.uint16) * np.uint16(257) for image in each(images)])


def each(images: PackedImages) -> list[Tensor]:
    return [images.image(number) for number in range(len(images.sizes))]


def resized(images: PackedImages, crops: Crops) -> Tensor:
    return augment.resized_crops(images, crops, augment.placed_crops(images, crops, (0.0,), (1.0,)))


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
    return augment.placed_crops(random_images((6, 6)), crops, (0.0,), (1.0,))


def test_images_resized_a_few_at_a_time_are_those_resized_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images((400, 20), (20, 400), (60, 50), (390, 22), (25, 380), (9, 9))
    crops = draw_crops(0, "x", np.arange(6), images.sizes, GLOBAL)
    assert len(placed(crops).chunks) == 1
    together = augment.apply_crops(images, crops)
    monkeypatch.setattr(augment, "CHUNK_BYTES", 4 * 3 * 2 * 400 * 22)
    chunks = [set(chunk.rows.tolist()) for chunk in placed(crops).chunks]
    assert len(chunks) > 1 and not any(chunk & {0, 3} and chunk & {1, 4} for chunk in chunks)  # high ones, wide ones
    torch.testing.assert_close(augment.apply_crops(images, crops), together)
    torch.testing.assert_close(augment.apply_crops(deep(images), crops), together, atol=1e-4, rtol=0)


def test_crops_equal_torch_and_pillow_antialiased_bicubic() -> None:
    torch.manual_seed(0)
    images = random_images((40, 33), (18, 50), (9, 9), (300, 120))
    for view in (GLOBAL, LOCAL):
        crops = draw_crops(0, "x", np.arange(4), images.sizes, view)
        got = resized(images, plain(crops)).view(*crops.flip.shape, 3, view.size_px, view.size_px)
        for v in range(got.shape[0]):
            for b in range(4):
                top, left, height, width = crops.boxes[v, b]
                crop = images.image(b)[top : top + height, left : left + width].permute(2, 0, 1).float() / 255
                size = (view.size_px, view.size_px)
                by_torch = F.interpolate(crop[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
                torch.testing.assert_close(got[v, b], by_torch, atol=1e-5, rtol=0)
                channel = Image.fromarray(crop[0].numpy(), mode="F").resize(size, Image.Resampling.BICUBIC)
                torch.testing.assert_close(got[v, b, 0], torch.from_numpy(np.array(channel)), atol=1e-5, rtol=0)


def test_flip_mirrors_the_crop() -> None:
    images = random_images((20, 30), (25, 14))
    crops = plain(draw_crops(0, "x", np.arange(2), images.sizes, GLOBAL))
    mirrored = resized(images, replace(crops, flip=~crops.flip))
    torch.testing.assert_close(mirrored, resized(images, crops).flip(-1))


def test_a_sample_gets_the_same_crops_in_any_batch_whatever_lies_beside_it() -> None:
    images = random_images((20, 30), (25, 14), (16, 16))
    whole = draw_crops(5, "x", np.array([10, 11, 12]), images.sizes, GLOBAL)
    pixels = augment.apply_crops(images, whole).view(2, 3, 3, 12, 12)
    alone = draw_crops(5, "x", np.array([11]), images.sizes[1:2], GLOBAL)
    assert (alone.boxes[:, 0] == whole.boxes[:, 1]).all() and (alone.order[:, 0] == whole.order[:, 1]).all()
    torch.testing.assert_close(augment.apply_crops(packed([images.image(1).numpy()]), alone), pixels[:, 1])
    turned = packed([image.numpy() for image in each(images)[::-1]])
    in_order = replace(turned, starts=turned.starts[::-1], sizes=turned.sizes[::-1])  # in another order in memory
    assert torch.equal(augment.apply_crops(in_order, whole), augment.apply_crops(images, whole))


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
    images = random_images((6, 6))
    values = images.image(0).permute(2, 0, 1)
    pixels = values.float() / 255
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    yes = np.ones((1, 1), dtype=bool)
    torch.testing.assert_close(augment.apply_crops(images, one_crop())[0], (pixels - mean) / std)
    gray = (0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]).expand(3, 6, 6)
    torch.testing.assert_close(augment.apply_crops(images, one_crop(gray=yes))[0], (gray - mean) / std)
    inverted = torch.where(values >= 128, 1 - pixels, pixels)
    torch.testing.assert_close(augment.apply_crops(images, one_crop(solarize=yes))[0], (inverted - mean) / std)


def test_sixteen_bits_are_augmented_as_eight_are_and_the_lower_ones_count() -> None:
    for channels in (1, 3, 5):
        images = random_images((20, 30), (25, 14), channels=channels)
        crops = draw_crops(0, "x", np.arange(2), images.sizes, GLOBAL)
        pixels, from_deep = (augment.apply_crops(one, crops, (0.0,), (1.0,)) for one in (images, deep(images)))
        torch.testing.assert_close(from_deep, pixels, atol=1e-5, rtol=0)
    ramp = np.arange(1000, 1036, dtype=np.uint16).reshape(6, 6, 1)  # not two levels of 8 bits
    found = augment.apply_crops(packed([ramp]), one_crop(), (0.0,), (1.0,)).view(6, 6) * 65535
    torch.testing.assert_close(found, torch.from_numpy(ramp[..., 0]).float())


def test_any_number_of_channels_is_augmented_and_colour_only_at_three() -> None:
    for channels in (1, 5):
        images = random_images((20, 20), (20, 20), channels=channels)
        crops = draw_crops(0, "x", np.arange(2), images.sizes, GLOBAL)
        pixels = augment.apply_crops(images, crops, mean=(0.0,), std=(1.0,))
        assert pixels.shape == (4, channels, 12, 12)
        assert pixels.min() >= 0 and pixels.max() <= 1
        # The first channel does not see the others' colours: only contrast's mean couples them.
        without = replace(crops, jitter=np.zeros_like(crops.jitter))
        one_channel = packed([image[..., :1].numpy() for image in each(images)])
        first = augment.apply_crops(one_channel, without, mean=(0.0,), std=(1.0,))
        torch.testing.assert_close(augment.apply_crops(images, without, mean=(0.0,), std=(1.0,))[:, :1], first)
