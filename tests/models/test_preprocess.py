"""From a picture to a model's input."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess, crop_picture, normalise
from dinov2_toolkit.store.pixels import Bands

OFFICIAL = Preprocess(224, 0.875, IMAGENET_MEAN, IMAGENET_STD)


def picture(width: int, height: int) -> Image.Image:
    """Return random colours, smooth enough to survive a resize."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def test_the_short_side_becomes_256_for_a_crop_of_224() -> None:
    assert OFFICIAL.short_side == 256
    assert Preprocess(28, 1.0, IMAGENET_MEAN, IMAGENET_STD).short_side == 28


@pytest.mark.parametrize(("width", "height"), [(256, 301), (333, 256)])
def test_without_a_resize_the_crop_is_the_middle(width: int, height: int) -> None:
    source = picture(width, height)
    left, top = round((width - 224) / 2), round((height - 224) / 2)
    expected = np.asarray(source)[top : top + 224, left : left + 224].transpose(2, 0, 1)
    assert np.array_equal(crop_picture(source, OFFICIAL).numpy(), expected)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (100, 100), (31, 47)])
def test_the_middle_of_the_whole_resized_picture_is_cut_out(width: int, height: int) -> None:
    source = picture(width, height)
    short = min(width, height)
    whole = source.resize((int(256 * width / short), int(256 * height / short)), Image.Resampling.BICUBIC)
    left, top = round((whole.width - 224) / 2), round((whole.height - 224) / 2)
    expected = np.asarray(whole)[top : top + 224, left : left + 224].transpose(2, 0, 1)
    assert np.array_equal(crop_picture(source, OFFICIAL).numpy(), expected)


def test_a_very_long_strip_costs_no_memory_and_shows_its_middle() -> None:
    strip = Image.fromarray(np.tile((np.arange(50_000) // 25_000 * 255).astype(np.uint8), (50, 1)))
    pixels = crop_picture(strip, OFFICIAL)
    assert pixels[:, :, :100].max() == 0 and pixels[:, :, -100:].min() == 255
    assert torch.equal(crop_picture(strip.transpose(Image.Transpose.TRANSPOSE), OFFICIAL), pixels.transpose(1, 2))
    assert crop_picture(strip.crop((0, 0, 50_000, 1)), OFFICIAL).shape == (3, 224, 224)  # whole, it would be 10 GB


def test_without_a_crop_ratio_the_whole_picture_is_squeezed() -> None:
    source = picture(300, 100)
    expected = np.asarray(source.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(crop_picture(source, Preprocess(16, None, (0, 0, 0), (1, 1, 1))).numpy(), expected)


def test_a_grey_model_gets_one_channel_of_any_picture() -> None:
    grey = Preprocess(224, 0.875, (0.5,), (0.25,))
    source = picture(256, 256)
    pixels = crop_picture(source, grey)
    assert np.array_equal(pixels.numpy()[0], np.asarray(source.convert("L"))[16:240, 16:240])
    assert torch.allclose(normalise(pixels[None], grey), (pixels[None] / 255 - 0.5) / 0.25)


def test_normalising_takes_off_the_mean_and_divides_by_the_std_of_each_channel() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    expected = [(0 - 0.485) / 0.229, (0.2 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    normal = normalise(pixels, OFFICIAL)
    assert normal.dtype == torch.float32 and normal.shape == (2, 3, 2, 2)
    assert torch.allclose(normal[1, :, 0, 1], torch.tensor(expected), atol=1e-6)


def test_deep_pixels_of_any_number_of_channels_are_cropped_and_normalised_as_they_are() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (20, 16, 5), dtype=np.uint16)
    five = Preprocess(16, 1.0, (0.1, 0.2, 0.3, 0.4, 0.5), (0.5,) * 5, 16)
    pixels = crop_picture(Bands(values), five)
    assert pixels.dtype == torch.uint16 and np.array_equal(pixels.numpy(), values[2:18].transpose(2, 0, 1))
    expected = (values[2:18].transpose(2, 0, 1) / 65535 - np.array(five.mean)[:, None, None]) / 0.5
    assert np.abs(normalise(pixels[None], five)[0].numpy() - expected).max() < 1e-6


def test_what_no_picture_can_be_brought_into_is_refused() -> None:
    with pytest.raises(ToolkitError, match="crop_ratio 1.2"):
        Preprocess(224, 1.2, IMAGENET_MEAN, IMAGENET_STD)
    with pytest.raises(ToolkitError, match="3 channels, but std .* 1"):
        Preprocess(224, 1.0, IMAGENET_MEAN, (0.5,))
    with pytest.raises(ToolkitError, match="bit_depth 12 is neither 8 nor 16"):
        Preprocess(224, 1.0, IMAGENET_MEAN, IMAGENET_STD, 12)
