"""Make the linear map of `--model copy` again: models/copy_weights.safetensors.

    apt install dataset-fashion-mnist openclipart-png
    python examples/build_copy_weights.py

Of some thousand pictures (Fashion-MNIST's training images, clip art, drawn ones) altered copies are made. Where the
copies of a picture lie around it, and where pictures lie, are two covariances; the map is the linear discriminant
analysis of the two. It is made twice: the second time copies count by how near the first map leaves them, for it is
those that a threshold can keep. Clip art of the folders that `is_held_out` names is not used, so that
`benchmarks/copies.py` measures on what the map has not seen; the constants below were chosen there. A few minutes on
two cores; the same seed and versions give the same map but for rounding.
"""

import argparse
import hashlib
import io
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from build_data import read_split
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from dinov2_toolkit.models.copy_descriptor import PREPROCESS, WEIGHTS_FILE, CopyDescriptor, without_margins
from dinov2_toolkit.models.preprocess import crop_picture, normalise
from dinov2_toolkit.store.images import UnreadableImage, decode

SEED = 0
NUM_FASHION, NUM_DRAWN = 6_000, 1_000  # pictures; of the clip art all that is not held out
COPIES = 4  # of each picture
SHRINKAGE = 0.1  # added to the correlations within copies: they come from few pictures
WHITENING = 1.0  # chosen: power of the variance that each number is divided by; 0.5 gives all the same weight
NEARNESS = 0.75  # chosen: copies count by (1 - cosine) to minus this power
NEAR = 0.02  # chosen: those nearer than this count alike
CLIPART_SIDE_PX, DRAWN_SIDE_PX = 128, 160
HELD_OUT_SHARE = 0.4  # of the clip art folders
BATCH = 64

Rng = np.random.Generator

# How a copy comes to be, and how often; applied in this order.
KINDS = {
    "crop": 6.0,
    "rotate": 0.5,
    "border": 2.0,
    "resize": 6.0,
    "shift": 0.3,
    "brightness": 4.0,
    "contrast": 2.0,
    "gamma": 2.0,
    "saturation": 0.3,
    "light": 0.7,
    "grey": 0.8,
    "blur": 2.0,
    "noise": 0.3,
    "text": 0.1,
    "jpeg": 9.0,
    "webp": 1.0,
    "gif": 1.0,
}
PROBABILITIES = np.array(list(KINDS.values())) / sum(KINDS.values())


def is_held_out(path: str) -> bool:
    """Tell whether clip art is for measuring only, by the folder it lies in."""
    digest = hashlib.md5(os.path.dirname(path).encode()).digest()  # any fixed number of a name would do
    return digest[0] < HELD_OUT_SHARE * 255


# Copies


def reencoded(picture: Image.Image, image_format: str, quality: int = 75) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, image_format, quality=quality)
    return Image.open(buffer).convert("RGB")


def with_gamma(picture: Image.Image, exponent: float) -> Image.Image:
    return picture.point([round(255 * (value / 255) ** exponent) for value in range(256)] * 3)


def cropped(picture: Image.Image, rng: Rng, least: float, most: float) -> Image.Image:
    width, height = (max(1, round(side * rng.uniform(least, most))) for side in picture.size)
    left, top = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
    return picture.crop((left, top, left + width, top + height))


def any_colour(picture: Image.Image, rng: Rng) -> tuple[int, ...]:
    random = tuple(rng.integers(0, 256, 3).tolist())
    return [(255, 255, 255), (0, 0, 0), picture.getpixel((0, 0)), random][rng.integers(4)]


def bordered(picture: Image.Image, rng: Rng) -> Image.Image:
    width, height = picture.size
    is_even = rng.random() < 0.6
    left, right, top, bottom = [rng.uniform(0.02, 0.13)] * 4 if is_even else rng.uniform(0, 0.13, 4).tolist()
    offset = round(left * width), round(top * height)
    size = width + offset[0] + round(right * width), height + offset[1] + round(bottom * height)
    framed = Image.new("RGB", size, any_colour(picture, rng))
    framed.paste(picture, offset)
    return framed


def resized(picture: Image.Image, factor: float) -> Image.Image:
    width, height = (max(8, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def with_text(picture: Image.Image, rng: Rng) -> Image.Image:
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    size_px = max(6, round(min(picture.size) * rng.uniform(0.08, 0.16)))
    font = ImageFont.load_default(size_px)
    text = letters(rng, int(rng.integers(3, 9)))
    length = draw.textlength(text, font=font)
    left = rng.uniform(0, max(1, picture.width - length))
    top = rng.uniform(0, max(1, picture.height - 1.2 * size_px))
    colour = any_colour(picture, rng)
    if rng.random() < 0.3:
        ground = tuple(255 - value for value in colour)
        draw.rectangle((left - 1, top - 1, left + length + 1, top + 1.2 * size_px), fill=ground)
    draw.text((left, top), text, fill=colour, font=font)
    return picture


def letters(rng: Rng, count: int) -> str:
    return "".join(chr(code) for code in rng.integers(97, 123, count).tolist())


def altered(picture: Image.Image, kind: str, rng: Rng) -> Image.Image:
    match kind:
        case "crop":
            return cropped(picture, rng, 0.8, 0.98)
        case "rotate":
            return picture.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, fillcolor=any_colour(picture, rng))
        case "border":
            return bordered(picture, rng)
        case "resize":
            return resized(picture, rng.choice([0.5, 0.5, 0.5, 0.6, 0.75, 1.5, 2]))
        case "shift":
            return Image.fromarray(np.roll(np.asarray(picture), rng.integers(-1, 2, 2).tolist(), (0, 1)))
        case "brightness":
            return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.65, 1.45))
        case "contrast":
            return ImageEnhance.Contrast(picture).enhance(rng.uniform(0.65, 1.45))
        case "gamma":
            return with_gamma(picture, math.exp(rng.uniform(-0.4, 0.4)))
        case "saturation":
            return ImageEnhance.Color(picture).enhance(rng.uniform(0.3, 1.7))
        case "light":
            brighter = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.8, 1.25))
            return with_gamma(ImageEnhance.Contrast(brighter).enhance(rng.uniform(0.8, 1.25)), rng.uniform(0.8, 1.25))
        case "grey":
            return picture.convert("L").convert("RGB")
        case "blur":
            return picture.filter(ImageFilter.GaussianBlur(max(picture.size) * rng.uniform(0.003, 0.015)))
        case "noise":
            noise = rng.normal(0, rng.uniform(2, 10), (picture.height, picture.width, 3))
            return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
        case "text":
            return with_text(picture, rng)
        case "jpeg":
            return reencoded(picture, "JPEG", int(rng.integers(20, 90)))
        case "webp":
            return reencoded(picture, "WEBP", int(rng.integers(30, 96)))
        case "gif":
            return reencoded(picture, "GIF")
    raise ValueError(f"unknown kind of copy: {kind}")


def copy_of(picture: Image.Image, rng: Rng) -> Image.Image:
    """Return a copy altered in one to three ways."""
    count = rng.choice([1, 1, 1, 1, 2, 2, 3])
    chosen = set(rng.choice(list(KINDS), count, replace=False, p=PROBABILITIES).tolist())
    for kind in KINDS:
        if kind in chosen:
            picture = altered(picture, kind, rng)
    return picture


# Pictures


def read_clipart(folder: Path) -> list[Image.Image]:
    """Return the clip art that may be shown, in the order of its paths, scaled down, each picture once."""
    pictures, seen = [], set()
    for path in sorted(path for path in folder.rglob("*.png") if not path.is_symlink()):
        if is_held_out(path.relative_to(folder).as_posix()):
            continue
        try:
            picture = decode(path.read_bytes())
        except (UnreadableImage, Image.DecompressionBombWarning):
            continue
        picture.thumbnail((CLIPART_SIDE_PX, CLIPART_SIDE_PX), Image.Resampling.LANCZOS)
        if (
            min(picture.size) >= 12
            and np.asarray(picture).std(axis=(0, 1)).max() >= 8
            and picture.tobytes() not in seen
        ):
            seen.add(picture.tobytes())
            pictures.append(picture)
    return pictures


def drawn(rng: Rng) -> Image.Image:
    """Return a picture out of nothing: clouds, scattered shapes, a page of text, or a plain colour."""
    side = DRAWN_SIDE_PX
    kind = rng.choice(4, p=[0.2, 0.585, 0.2, 0.015])
    if kind == 0 or (kind == 1 and rng.random() < 0.35):
        picture = clouds(rng)
    else:
        is_page = kind == 2 and rng.random() < 0.7
        picture = Image.new(
            "RGB", (side, side), (255, 255, 255) if is_page else tuple(rng.integers(0, 256, 3).tolist())
        )
    if kind == 1:
        picture = scattered(picture, rng)
    if kind == 2:
        write_lines(picture, rng)
    return picture.resize((side, int(rng.integers(80, side)))) if rng.random() < 0.3 else picture


def clouds(rng: Rng) -> Image.Image:
    """Return noise whose amplitude falls with frequency, as in photographs."""
    side = DRAWN_SIDE_PX
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) * side
    frequency[0, 0] = 1
    exponent, colourful = rng.uniform(0.8, 2.2), rng.uniform(0, 1)
    waves = (rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))) / frequency**exponent
    planes = np.fft.irfft2(waves, (side, side)).transpose(1, 2, 0)  # (S, S, 3)
    planes = (planes - planes.mean(axis=(0, 1))) / planes.std(axis=(0, 1))
    mixed = colourful * planes + (1 - colourful) * 1.5 * planes.mean(axis=2, keepdims=True)
    return Image.fromarray(np.clip(mixed * rng.uniform(20, 70) + rng.uniform(60, 190, 3), 0, 255).astype(np.uint8))


def scattered(picture: Image.Image, rng: Rng) -> Image.Image:
    draw, side = ImageDraw.Draw(picture), DRAWN_SIDE_PX
    main_colour = rng.integers(0, 256, 3)
    for _ in range(int(rng.integers(3, 80))):
        radius = min(60.0, 4 / max(rng.random(), 0.05) ** 0.8 * rng.uniform(0.5, 1.5))
        x, y = rng.uniform(0, side, 2).tolist()
        colour = tuple(np.clip(main_colour + rng.normal(0, 60, 3), 0, 255).astype(int).tolist())
        flatness = rng.uniform(0.1, 1) * radius
        match rng.integers(4):
            case 0:
                draw.ellipse((x - radius, y - flatness, x + radius, y + flatness), fill=colour)
            case 1:
                draw.rectangle((x - radius, y - flatness, x + radius, y + flatness), fill=colour)
            case 2:
                corners = np.array([x, y]) + rng.normal(0, radius, (3, 2))
                draw.polygon([tuple(corner) for corner in corners.tolist()], fill=colour)
            case 3:
                end = rng.normal(0, 2 * radius, 2)
                draw.line((x, y, x + end[0], y + end[1]), fill=colour, width=int(rng.integers(1, 8)))
    if rng.random() < 0.5:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    if rng.random() < 0.5:  # light from one side
        down, right = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
        slope = rng.normal(0, 0.3, 2)
        lit = np.asarray(picture) * (1 + slope[0] * right + slope[1] * down)[..., None]
        picture = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))
    return picture


def write_lines(picture: Image.Image, rng: Rng) -> None:
    draw, side = ImageDraw.Draw(picture), DRAWN_SIDE_PX
    size_px = int(rng.integers(7, 22))
    font = ImageFont.load_default(size_px)
    colour = (0, 0, 0) if rng.random() < 0.7 else tuple(rng.integers(0, 200, 3).tolist())
    top = float(rng.integers(0, 20))
    while top < side:
        words = [letters(rng, int(rng.integers(1, 9))) for _ in range(int(rng.uniform(0, 8)))]
        draw.text((rng.choice([8, 8, 8, 20]), top), " ".join(words), fill=colour, font=font)
        top += 1.3 * size_px


def read_fashion(folder: Path) -> list[Image.Image]:
    images = read_split(folder, "train").images
    rows = np.random.default_rng((SEED, 1)).choice(len(images), NUM_FASHION, replace=False)
    return [Image.fromarray(images[row]).convert("RGB") for row in rows.tolist()]


# Learning


def measured(descriptor: CopyDescriptor, pictures: list[Image.Image]) -> Tensor:
    """Return what the map will see, (N, E) float64."""
    parts = []
    for start in range(0, len(pictures), BATCH):
        pixels = torch.stack([crop_picture(picture, PREPROCESS) for picture in pictures[start : start + BATCH]])
        parts.append(descriptor.measure(without_margins(normalise(pixels, PREPROCESS))).double())
    return torch.cat(parts)


def discriminant_map(pictures: Tensor, copies: Tensor, weights: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return weight (D, E) and bias (D,) of the map.

    Args:
        pictures: (N, E).
        copies: (M, N, E), M copies of each.
        weights: (M, N), of mean 1: how much each copy counts.
        dim: D.
    """
    mean = pictures.mean(dim=0)
    between = torch.cov(pictures.T, correction=0)
    apart = ((copies - pictures) * weights.sqrt()[:, :, None]).flatten(0, 1)
    within = apart.T @ apart / len(apart) / 2  # both ends of a difference deviate
    scale = within.diag().sqrt() + 1e-4
    correlation = within / scale / scale[:, None] + SHRINKAGE * torch.eye(len(scale), dtype=torch.float64)
    variances, axes = torch.linalg.eigh(correlation)
    sphered = axes / variances.sqrt() / scale[:, None]  # copies deviate alike in all directions
    ratios, axes = torch.linalg.eigh(sphered.T @ between @ sphered)
    weight = (sphered @ axes[:, -dim:] / ratios[-dim:] ** WHITENING).T.flip(0)
    weight = weight / weight.square().mean().sqrt() / 10  # float16 holds numbers of this size best
    return weight, -weight @ mean


def nearness(pictures: Tensor, copies: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return how much copies count, (M, N) of mean 1, by how near a map leaves them to their pictures."""
    mapped = F.normalize(F.linear(pictures, weight, bias), dim=-1)
    cosines = (F.normalize(F.linear(copies, weight, bias), dim=-1) * mapped).sum(dim=-1)
    near = (1 - cosines).clamp(min=NEAR) ** -NEARNESS
    return near / near.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--output", type=Path, default=WEIGHTS_FILE)
    arguments = parser.parse_args()

    Image.MAX_IMAGE_PIXELS = 8_000_000  # a few sources have hundreds of millions
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    rng = np.random.default_rng((SEED, 2))
    drawings = [drawn(rng) for _ in range(NUM_DRAWN)]
    pictures = [*read_fashion(arguments.fashion), *read_clipart(arguments.openclipart), *drawings]
    print(f"{len(pictures):,} pictures", flush=True)
    descriptor = CopyDescriptor()
    with torch.inference_mode():
        copies = [measured(descriptor, [copy_of(picture, rng) for picture in pictures]) for _ in range(COPIES)]
        originals, altered_ones = measured(descriptor, pictures), torch.stack(copies)
        weights, dim = torch.ones(altered_ones.shape[:2], dtype=torch.float64), CopyDescriptor.embed_dim
        first = discriminant_map(originals, altered_ones, weights, dim)
        weights = nearness(originals, altered_ones, *first)
        weight, bias = discriminant_map(originals, altered_ones, weights, dim)
    save_file({"head.weight": weight.half().contiguous(), "head.bias": bias.half()}, arguments.output)
    arguments.output.chmod(0o644)  # it is made for its owner only
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
