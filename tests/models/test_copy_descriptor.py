"""The descriptor for near-duplicates: margins, invariance to how a picture comes, and copies found among others."""

from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance
from torch import Tensor

from dinov2_toolkit.features.extract.extract import open_model
from dinov2_toolkit.models.copy_descriptor import (
    PREPROCESS,
    THRESHOLD,
    WEIGHTS_FILE,
    CopyDescriptor,
    content_bounds,
    copy_content_id,
    crop_margins,
    load_copy_descriptor,
)
from dinov2_toolkit.models.preprocess import crop_picture, normalise
from dinov2_toolkit.store.images import decode


@pytest.fixture(scope="module")
def descriptor() -> CopyDescriptor:
    return load_copy_descriptor()


def described(descriptor: CopyDescriptor, pictures: list[Image.Image]) -> Tensor:
    pixels = torch.stack([crop_picture(picture, PREPROCESS) for picture in pictures])
    with torch.inference_mode():
        return descriptor.forward_features(normalise(pixels, PREPROCESS)).cls_token


def scene(number: int, side: int = 120) -> Image.Image:
    """Return a picture of thirty shapes, another for every number."""
    rng = np.random.default_rng(number)
    picture = Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(30):
        left, top = rng.integers(-20, side, 2).tolist()
        width, height = rng.integers(8, 50, 2).tolist()
        draw_shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        draw_shape((left, top, left + width, top + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def encoded(picture: Image.Image, image_format: str, **options: int) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(rows: int, columns: int) -> Tensor:
    return torch.rand(3, rows, columns, generator=torch.Generator().manual_seed(0))


def with_margins() -> Tensor:
    """Return margins on all sides, margins on one, and none."""
    images = torch.zeros(3, 3, 64, 64)
    images[:] = torch.tensor([1.0, 0.2, 0.5])[:, None, None]
    images[0, :, 10:50, 5:60] = noise(40, 55)
    images[1, :, :, 30:] = noise(64, 34)
    images[2] = noise(64, 64)
    return images


def in_a_black_frame() -> Tensor:
    images = torch.zeros(1, 3, 64, 64)  # a frame of 6
    images[:, :, 6:58, 6:58] = 1.0  # white margins left and right
    images[0, :, 6:58, 20:44] = noise(52, 24)
    return images


def test_margins_of_any_colour_and_width_are_not_content() -> None:
    expected = torch.tensor([[5, 60, 10, 50], [30, 64, 0, 64], [0, 64, 0, 64]])
    assert (content_bounds(with_margins()) - expected).abs().max() < 2


def test_a_frame_hides_no_margins() -> None:
    assert (content_bounds(in_a_black_frame()) - torch.tensor([[20, 44, 6, 58]])).abs().max() < 2


def reference_crossing(strength: list[float], first: float) -> float:
    """Return where the strength of lines, averaged over five, rises above 1 for the first time from `first` on."""
    held = [strength[0]] * 2 + strength + [strength[-1]] * 2
    even = [sum(held[line : line + 5]) / 5 for line in range(len(strength))]
    for line, value in enumerate(even):
        if value > 1 and line + 0.5 > first:
            before = even[line - 1] if line else 0.0
            share = min(max((1 - before) / (value - before), 0), 1)
            return max(line - 0.5 + share, first)
    return first


def reference_bounds(image: np.ndarray) -> list[float]:
    """Return the content's bounds (4) of one picture (3, S, S), line by line."""
    side = image.shape[1]
    columns = image.reshape(3, side // 2, 2, side).mean(axis=2)  # (3, S / 2, S)
    rows = image.reshape(3, side, side // 2, 2).mean(axis=3).transpose(0, 2, 1)  # likewise

    def places(step: int, ends: list[float], blur_px: int) -> list[int]:
        first, last = ends
        blur_px *= last - first > 4 * blur_px
        return [i for i in range(side // step) if first + blur_px <= (i + 0.5) * step <= last - blur_px]

    def inside(bounds: list[float], blur_px: int) -> list[float]:
        across, down = bounds[:2], bounds[2:]
        seen = columns[:, places(2, down, blur_px)][:, :, places(1, across, blur_px)]
        limit = max(0.25 * np.sqrt(seen.reshape(3, -1).var(axis=1).mean()), 0.01)
        found = []
        for lines, along, (first, last) in ((columns, down, across), (rows, across, down)):
            strength = (lines[:, places(2, along, blur_px)].std(axis=1).max(axis=0) / limit).tolist()
            begin = reference_crossing(strength, first)
            end = side - reference_crossing(strength[::-1], side - last)
            found += [begin, end] if end - begin >= side / 8 else [first, last]
        return found

    whole = [0.0, side, 0.0, side]
    widths = [abs(bound - edge) for bound, edge in zip(inside(whole, 0), whole, strict=True)]
    frame = [min(width, 2 * min(widths)) for width in widths]
    return inside([abs(edge - width) for edge, width in zip(whole, frame, strict=True)], 2)


def test_bounds_are_those_found_line_by_line() -> None:
    scenes = [torch.from_numpy(np.asarray(scene(number, 64)).copy()).permute(2, 0, 1) / 255 for number in range(4)]
    images = torch.cat([with_margins(), in_a_black_frame(), torch.stack(scenes)])
    expected = torch.tensor([reference_bounds(image.double().numpy()) for image in images])
    torch.testing.assert_close(content_bounds(images), expected, rtol=0, atol=0.02)  # px


def test_the_noise_of_a_jpeg_moves_bounds_by_less_than_a_pixel() -> None:
    images = [Image.new("RGB", (128, 128), "white") for _ in range(20)]
    for number, image in enumerate(images):
        image.paste(scene(number, 84), (22, 22))
    pairs = [images, [decode(encoded(image, "JPEG", quality=60)) for image in images]]
    before, after = (
        content_bounds(torch.stack([crop_picture(each, PREPROCESS) / 255 for each in some])) for some in pairs
    )
    assert (before - after).abs().max() < 1


def test_a_side_of_nothing_but_flat_lines_stays_whole() -> None:
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, :, 20:44] = 0.7  # a flag
    images[1] = 0.3
    assert content_bounds(images).tolist() == [[0, 64, 0, 64]] * 2


def test_what_is_left_fills_the_square() -> None:
    inside = noise(64, 64)[None]
    framed = torch.ones(1, 3, 128, 128)
    framed[:, :, 32:96, 32:96] = inside
    left, right, top, bottom = content_bounds(framed)[0].tolist()
    corners = torch.tensor([[left, top], [right, bottom]]) - torch.tensor([32, 32])
    assert corners.abs().sub(torch.tensor([[0], [64]])).abs().max() < 2
    middles = (torch.arange(64) + 0.5) / 64
    across, down = ((low + (high - low) * middles).long() for low, high in ((left, right), (top, bottom)))
    nearest = framed[0][:, down][:, :, across]
    assert torch.corrcoef(torch.stack([crop_margins(framed).flatten(), nearest.flatten()]))[0, 1] > 0.8
    whole = noise(128, 128)[None]
    torch.testing.assert_close(crop_margins(whole), torch.nn.functional.avg_pool2d(whole, 2))


def test_plain_pictures_have_vectors_and_tell_their_colours(descriptor: CopyDescriptor) -> None:
    colours = ["white", "black", "red", "blue", "#808080"]
    vectors = described(descriptor, [Image.new("RGB", (50, 40), colour) for colour in colours])
    assert torch.isfinite(vectors).all()
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(colours)))
    assert (vectors @ vectors.T).fill_diagonal_(0).max() < 0.999


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (3000, 3), (28, 28), (700, 500)])
def test_pictures_of_any_size_have_vectors_of_length_one(descriptor: CopyDescriptor, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    (vector,) = described(descriptor, [Image.fromarray(pixels)])
    assert vector.shape == (CopyDescriptor.embed_dim,) and vector.norm().item() == pytest.approx(1, abs=1e-5)


def test_neither_the_batch_nor_how_a_picture_is_stored_changes_its_vector(descriptor: CopyDescriptor) -> None:
    picture = scene(0)
    grey = picture.convert("L")
    deep = Image.fromarray(np.asarray(grey, np.uint16) * 257)  # 16 bits
    clear = picture.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 120, 20))  # transparent black: white
    white = picture.copy()
    white.paste("white", (0, 0, 120, 20))
    together = described(descriptor, [scene(number) for number in range(9)])
    for alone, expected in zip([scene(number) for number in range(9)], together, strict=True):
        torch.testing.assert_close(described(descriptor, [alone])[0], expected, rtol=0, atol=1e-5)
    for stored, plain in ((grey, grey.convert("RGB")), (deep, grey.convert("RGB")), (clear, white)):
        vectors = described(descriptor, [decode(encoded(stored, "PNG")), plain])
        torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=1e-5)


def framed(picture: Image.Image) -> Image.Image:
    wide = Image.new("RGB", (picture.width + 24, picture.height + 24), "white")
    wide.paste(picture, (12, 12))
    return wide


@pytest.mark.parametrize(
    "alter",
    [
        lambda picture: decode(encoded(picture, "JPEG", quality=50)),
        lambda picture: decode(encoded(picture, "WEBP", quality=50)),
        lambda picture: decode(encoded(picture, "GIF")),
        lambda picture: picture.resize((60, 60)),
        lambda picture: ImageEnhance.Brightness(picture).enhance(0.7),
        lambda picture: ImageEnhance.Contrast(picture).enhance(0.7),
        lambda picture: picture.crop((3, 3, 117, 117)),
        framed,
    ],
    ids=["jpeg", "webp", "gif", "resized", "darker", "paler", "cropped", "framed"],
)
def test_copies_are_above_the_threshold_and_other_pictures_below(
    descriptor: CopyDescriptor, alter: Callable[[Image.Image], Image.Image]
) -> None:
    scenes = [scene(number) for number in range(60)]
    similarities = described(descriptor, [alter(picture) for picture in scenes]) @ described(descriptor, scenes).T
    assert (similarities.diagonal() > THRESHOLD).float().mean() >= 0.95
    assert (similarities.fill_diagonal_(0) > THRESHOLD).sum() == 0


def test_the_model_copy_needs_nothing_from_outside() -> None:
    model = open_model("copy")
    assert (model.source.path, model.source.content_id, model.dim) == ("copy", copy_content_id(), 128)
    assert isinstance(model.backbone, CopyDescriptor) and not model.backbone.training
    assert WEIGHTS_FILE.stat().st_size < 1_400_000
