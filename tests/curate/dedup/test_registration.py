"""What one picture leaves unexplained of another: little of copies, much of look-alikes."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dinov2_toolkit.curate.dedup.registration import (
    CONTENT,
    CONTENT_PX,
    UNLIKE,
    Plates,
    _shrinking,
    plates,
    unexplained,
)
from dinov2_toolkit.models.copy_descriptor import PREPROCESS, content_bounds
from dinov2_toolkit.models.preprocess import crop_picture
from dinov2_toolkit.tests.models import test_copy_descriptor

SIDE = 160


def scene(number: int) -> Image.Image:
    """Return a picture of thirty shapes, another for every number, none of it black or white."""
    return test_copy_descriptor.scene(number, SIDE).point(lambda level: 40 + 0.7 * level)


def shown(*pictures: Image.Image) -> Plates:
    pixels = torch.stack([crop_picture(picture, PREPROCESS) for picture in pictures])
    return plates(pixels, torch.tensor([picture.size for picture in pictures]))


def left_of(one: Image.Image, other: Image.Image) -> float:
    return unexplained(shown(one), shown(other)).item()


def reencoded(picture: Image.Image) -> Image.Image:
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 30": reencoded,
    "half as large": lambda picture: picture.resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC),
    "brighter, some of it white": lambda picture: ImageEnhance.Brightness(picture).enhance(1.3),
    "less contrast": lambda picture: ImageEnhance.Contrast(picture).enhance(0.7),
    "gamma": lambda picture: picture.point([round(255 * (value / 255) ** 0.7) for value in range(256)] * 3),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "cropped": lambda picture: picture.crop((0, 12, SIDE - 14, SIDE)),
    "with a border": lambda picture: ImageOps.expand(picture, 16, "white"),
    "turned": lambda picture: picture.rotate(3, Image.Resampling.BICUBIC).crop((8, 8, SIDE - 8, SIDE - 8)),
}


def test_nothing_is_left_of_the_same_pixels() -> None:
    one = shown(*(scene(number) for number in range(6)))
    assert one.pixels.shape == (6, 3, 2 * CONTENT_PX, 2 * CONTENT_PX) and one.pixels.dtype == torch.uint8
    assert unexplained(one, one).max() < 1e-4


@pytest.mark.parametrize("kind", COPIES)
def test_little_is_left_of_copies_and_much_of_other_pictures(kind: str) -> None:
    pictures = [scene(number) for number in range(6)]
    originals, copies = shown(*pictures), shown(*map(COPIES[kind], pictures))
    for one, other in ((originals, copies), (copies, originals)):
        left = unexplained(one, other)
        assert left.max() < 0.06, left
        others = unexplained(one, other.at(torch.arange(6).roll(1)))
        assert others.min() > 0.2, others


def test_what_is_drawn_otherwise_is_left() -> None:
    picture = scene(0)
    changed = picture.copy()
    ImageDraw.Draw(changed).rectangle((60, 60, 95, 95), fill=(0, 255, 0))
    recoloured = Image.merge("RGB", [picture.split()[channel] for channel in (1, 2, 0)])
    copies = [left_of(picture, COPIES[kind](picture)) for kind in COPIES]
    for other in (changed, recoloured, ImageOps.invert(picture), ImageOps.mirror(picture)):
        assert left_of(picture, other) > 2 * max(copies)


def test_left_over_is_the_share_of_contrast_at_the_same_place() -> None:
    """Noise on a picture that neither light nor a map explains, against the definition."""
    generator = torch.Generator().manual_seed(0)

    def smooth(seed_pixels: Tensor) -> Tensor:
        return F.interpolate(seed_pixels, size=128, mode="bicubic").clamp(0, 1)

    base = smooth(0.2 + 0.6 * torch.rand(1, 3, 9, 9, generator=generator))
    added = (base + 0.12 * (smooth(torch.rand(1, 3, 9, 9, generator=generator)) - 0.5)).clamp(0, 1)
    sizes = torch.tensor([[128, 128]])
    one, other = (plates((255 * each).round().byte(), sizes) for each in (base, added))
    x, y = (each.images()[:, :, CONTENT, CONTENT].double() for each in (one, other))
    gain = ((x * y).mean() - x.mean() * y.mean()) / x.var(correction=0)
    rest = (y - y.mean() - gain * (x - x.mean())).square().sum()
    contrast = (y - y.mean((2, 3), keepdim=True)).square().sum()
    left = unexplained(one, other).item()
    assert 0.5 * (rest / contrast).item() < left < 1.2 * (rest / contrast).item()


def test_pictures_that_hardly_meet_are_unlike() -> None:
    """A detail that fills the whole of one picture and a hundredth of another is no copy of it."""
    picture = scene(3)
    detail = picture.crop((40, 40, 72, 72)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert left_of(picture, detail) == UNLIKE or left_of(picture, detail) > 0.2


def test_plates_hold_the_content_in_their_middle() -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    framed = ImageOps.expand(picture, 40, "white")
    pixels = crop_picture(framed, PREPROCESS)[None]
    plate = shown(framed)
    assert torch.allclose(plate.bounds, content_bounds(pixels.float() / 255) / 128)
    assert torch.allclose(plate.bounds, torch.tensor([1 / 6, 5 / 6, 1 / 6, 5 / 6]), atol=2 / 128)
    around = plate.images()[0]
    assert torch.allclose(around[:, 2, 2], torch.ones(3), atol=0.01)  # of a content half as large again, the frame
    assert around[:, CONTENT, CONTENT].std() > 0.1
    assert unexplained(plate, shown(picture)).item() < 0.01


def test_contents_are_compared_of_those_that_are_looked_at_closely() -> None:
    pictures = [scene(number) for number in range(6)]
    one, other = shown(*pictures), shown(*map(COPIES["cropped"], pictures))
    closely = torch.tensor([True, False] * 3)
    left = unexplained(one, other, closely)
    assert torch.equal(left[closely], unexplained(one.at(closely), other.at(closely)))
    assert left[closely].max() < 0.06 and left[~closely].min() > 0.2
    assert torch.equal(left[~closely], unexplained(one, other, torch.zeros(6, dtype=torch.bool))[~closely])


@pytest.mark.gpu
def test_a_gpu_sees_what_a_cpu_sees() -> None:
    pictures = [scene(number) for number in range(6)]
    copies = [COPIES["cropped"](picture) for picture in pictures]
    pixels = [torch.stack([crop_picture(each, PREPROCESS) for each in side]) for side in (pictures, copies)]
    sizes = torch.tensor([[SIDE, 48]] * 6)
    one, other = (plates(side, sizes) for side in pixels)
    on_cpu = unexplained(one, other)
    one, other = (plates(side.cuda(), sizes.cuda()) for side in pixels)
    on_gpu = unexplained(one, other)
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=2e-3)


def small(number: int) -> Image.Image:
    """Return a picture of 28 pixels a side, hardly one of which is like the next."""
    coarse = Image.fromarray(np.random.default_rng(number).integers(40, 216, (12, 12, 3), np.uint8))
    return coarse.resize((28, 28), Image.Resampling.BICUBIC)


def test_a_picture_is_made_as_small_as_the_other() -> None:
    """Much is lost of 28 pixels a side when 14 are left; what is left is explained in full."""
    pictures = [small(number) for number in range(6)]
    one, other = shown(*pictures), shown(*(picture.resize((14, 14), Image.Resampling.BICUBIC) for picture in pictures))
    of_unknown_size = other._replace(sizes=torch.full((6, 2), 64))
    assert unexplained(one, other).max() < 0.001 and unexplained(other, one).max() < 0.001
    assert unexplained(one, of_unknown_size).min() > 0.01
    assert unexplained(one, other.at(torch.arange(6).roll(1))).min() > 0.5


def test_shrinking_is_what_pillow_does() -> None:
    picture = small(0).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = torch.tensor(np.asarray(picture, np.float32)).permute(2, 0, 1)
    maps = _shrinking(torch.device("cpu"))
    for across, down in ((20, 33), (64, 14)):
        smaller = picture.resize((across, down), Image.Resampling.BICUBIC)
        again = np.asarray(smaller.resize((64, 64), Image.Resampling.BICUBIC), np.float32)
        shrunk = (maps[down] @ pixels @ maps[across].T).clamp(0, 255).permute(1, 2, 0).numpy()
        assert np.abs(shrunk - again).max() < 2
    assert torch.equal(maps[64], torch.eye(64))


def drawing(disc: tuple[int, int, int]) -> Image.Image:
    """Return a pale drawing with a thin line across it."""
    picture = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((8, 8, 120, 120), fill=(205, 225, 240))
    draw.ellipse((24, 24, 72, 72), fill=disc)
    draw.rectangle((64, 72, 96, 112), fill=(60, 40, 30))
    draw.line((48, 16, 112, 64), fill=(90, 40, 130))
    return picture


def test_what_turns_white_is_no_difference() -> None:
    pale, brown = drawing((240, 215, 200)), drawing((150, 130, 100))
    brighter = ImageEnhance.Brightness(pale).enhance(1.3)
    assert left_of(pale, brighter) < 0.001 and left_of(brighter, pale) < 0.001
    assert left_of(brown, brighter) > 0.2
