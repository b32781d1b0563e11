"""The residual of registration: little for copies, much for look-alikes."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from dinov2_toolkit.curate.dedup.registration import UNALIGNED, _resize_matrices, residual
from dinov2_toolkit.curate.dedup.thumbnails import CONTENT, CONTENT_PX, Thumbnails, make_thumbnails
from dinov2_toolkit.models.copy_descriptor import PREPROCESS, content_bounds
from dinov2_toolkit.models.preprocess import crop_picture
from dinov2_toolkit.tests.models import test_copy_descriptor

SIDE = 160


def scene(number: int) -> Image.Image:
    """Return a picture of thirty shapes, another for every number, none of it black or white."""
    return test_copy_descriptor.scene(number, SIDE).point(lambda level: 40 + 0.7 * level)


def thumbnails_of(*pictures: Image.Image) -> Thumbnails:
    pixels = torch.stack([crop_picture(picture, PREPROCESS) for picture in pictures])
    return make_thumbnails(pixels, torch.tensor([picture.size for picture in pictures]))


def residual_of(one: Image.Image, other: Image.Image) -> float:
    return residual(thumbnails_of(one), thumbnails_of(other)).item()


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


def test_the_same_pixels_have_no_residual() -> None:
    one = thumbnails_of(*(scene(number) for number in range(6)))
    assert one.content.shape == (6, 3, 2 * CONTENT_PX, 2 * CONTENT_PX) and one.content.dtype == torch.uint8
    assert residual(one, one).max() < 1e-4


@pytest.mark.parametrize("kind", COPIES)
def test_copies_have_a_small_residual_and_other_pictures_a_large_one(kind: str) -> None:
    pictures = [scene(number) for number in range(6)]
    originals, copies = thumbnails_of(*pictures), thumbnails_of(*map(COPIES[kind], pictures))
    for one, other in ((originals, copies), (copies, originals)):
        found = residual(one, other)
        assert found.max() < 0.06, found
        others = residual(one, other.at(torch.arange(6).roll(1)))
        assert others.min() > 0.2, others


def test_what_is_drawn_differently_leaves_a_residual() -> None:
    picture = scene(0)
    changed = picture.copy()
    ImageDraw.Draw(changed).rectangle((60, 60, 95, 95), fill=(0, 255, 0))
    recoloured = Image.merge("RGB", [picture.split()[channel] for channel in (1, 2, 0)])
    copies = [residual_of(picture, COPIES[kind](picture)) for kind in COPIES]
    for other in (changed, recoloured, ImageOps.invert(picture), ImageOps.mirror(picture)):
        assert residual_of(picture, other) > 2 * max(copies)


def test_the_residual_is_the_share_of_variance_at_the_same_place() -> None:
    """Noise on a picture that neither light nor a map explains, against the definition."""
    generator = torch.Generator().manual_seed(0)

    def smooth(seed_pixels: Tensor) -> Tensor:
        return F.interpolate(seed_pixels, size=128, mode="bicubic").clamp(0, 1)

    base = smooth(0.2 + 0.6 * torch.rand(1, 3, 9, 9, generator=generator))
    added = (base + 0.12 * (smooth(torch.rand(1, 3, 9, 9, generator=generator)) - 0.5)).clamp(0, 1)
    sizes = torch.tensor([[128, 128]])
    one, other = (make_thumbnails((255 * each).round().byte(), sizes) for each in (base, added))
    x, y = (each.levels()[:, :, CONTENT, CONTENT].double() for each in (one, other))
    gain = ((x * y).mean() - x.mean() * y.mean()) / x.var(correction=0)
    rest = (y - y.mean() - gain * (x - x.mean())).square().sum()
    total = (y - y.mean((2, 3), keepdim=True)).square().sum()
    found = residual(one, other).item()
    assert 0.5 * (rest / total).item() < found < 1.2 * (rest / total).item()


def test_a_plain_picture_is_no_copy_of_anything() -> None:
    white, whitish = (Image.new("RGB", (SIDE, SIDE), (level,) * 3) for level in (255, 250))
    light = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(light).rectangle((70, 70, 90, 90), fill=(200, 200, 200))
    assert residual_of(light, reencoded(light)) < 0.02
    for other in (white, whitish, light, scene(0)):
        assert residual_of(white, other) == residual_of(other, white) == UNALIGNED


def test_pictures_that_hardly_overlap_are_no_copies() -> None:
    """A detail that fills the whole of one picture and a hundredth of another is no copy of it."""
    picture = scene(3)
    detail = picture.crop((40, 40, 72, 72)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    assert residual_of(picture, detail) == UNALIGNED or residual_of(picture, detail) > 0.2


def test_thumbnails_hold_the_content_in_their_middle() -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    framed = ImageOps.expand(picture, 40, "white")
    pixels = crop_picture(framed, PREPROCESS)[None]
    thumbnails = thumbnails_of(framed)
    assert torch.allclose(thumbnails.bounds, content_bounds(pixels.float() / 255) / 128)
    assert torch.allclose(thumbnails.bounds, torch.tensor([1 / 6, 5 / 6, 1 / 6, 5 / 6]), atol=2 / 128)
    around = thumbnails.levels()[0]
    assert torch.allclose(around[:, 2, 2], torch.ones(3), atol=0.01)  # of a content half as large again, the frame
    assert around[:, CONTENT, CONTENT].std() > 0.1
    assert residual(thumbnails, thumbnails_of(picture)).item() < 0.01


def test_contents_are_aligned_only_where_asked() -> None:
    pictures = [scene(number) for number in range(6)]
    one, other = thumbnails_of(*pictures), thumbnails_of(*map(COPIES["cropped"], pictures))
    align = torch.tensor([True, False] * 3)
    found = residual(one, other, align)
    assert torch.equal(found[align], residual(one.at(align), other.at(align)))
    assert found[align].max() < 0.06 and found[~align].min() > 0.2
    assert torch.equal(found[~align], residual(one, other, torch.zeros(6, dtype=torch.bool))[~align])


@pytest.mark.gpu
def test_a_gpu_sees_what_a_cpu_sees() -> None:
    pictures = [scene(number) for number in range(6)]
    copies = [COPIES["cropped"](picture) for picture in pictures]
    pixels = [torch.stack([crop_picture(each, PREPROCESS) for each in side]) for side in (pictures, copies)]
    sizes = torch.tensor([[SIDE, 48]] * 6)
    one, other = (make_thumbnails(side, sizes) for side in pixels)
    on_cpu = residual(one, other)
    one, other = (make_thumbnails(side.cuda(), sizes.cuda()) for side in pixels)
    on_gpu = residual(one, other)
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=2e-3)


def small(number: int) -> Image.Image:
    """Return a picture of 28 pixels a side, hardly one of which is like the next."""
    coarse = Image.fromarray(np.random.default_rng(number).integers(40, 216, (12, 12, 3), np.uint8))
    return coarse.resize((28, 28), Image.Resampling.BICUBIC)


def test_images_are_compared_at_the_size_of_the_smaller_one() -> None:
    """Of 28 pixels a side much is lost at 14; the rest has no residual."""
    pictures = [small(number) for number in range(6)]
    smaller = [picture.resize((14, 14), Image.Resampling.BICUBIC) for picture in pictures]
    one, other = thumbnails_of(*pictures), thumbnails_of(*smaller)
    of_unknown_size = other._replace(sizes=torch.full((6, 2), 64))
    assert residual(one, other).max() < 0.001 and residual(other, one).max() < 0.001
    assert residual(one, of_unknown_size).min() > 0.01
    assert residual(one, other.at(torch.arange(6).roll(1))).min() > 0.5


def test_resizing_is_what_pillow_does() -> None:
    picture = small(0).resize((64, 64), Image.Resampling.BICUBIC)
    pixels = torch.tensor(np.asarray(picture, np.float32)).permute(2, 0, 1)
    maps = _resize_matrices(torch.device("cpu"))
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


def test_clipping_to_white_is_no_difference() -> None:
    pale, brown = drawing((240, 215, 200)), drawing((150, 130, 100))
    brighter = ImageEnhance.Brightness(pale).enhance(1.3)
    assert residual_of(pale, brighter) < 0.001 and residual_of(brighter, pale) < 0.001
    assert residual_of(brown, brighter) > 0.2
