"""Training pictures of the copy descriptor, and altered copies of them, for examples/build_copy_weights.py.

Pictures: Fashion-MNIST's training images, clip art, random drawings, and pictures composed of pieces of clip art. Some
composed ones have a sibling that differs in one small place: similar, but no copy.
"""

import hashlib
import io
import math
import os
from pathlib import Path

import numpy as np
from build_data import read_split
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from dinov2_toolkit.store.images import UnreadableImage, decode

SEED = 0
NUM_FASHION, NUM_UNTOUCHED, NUM_MORE_FASHION = 6_000, 10_000, 20_000
CLIPART_SIDE_PX, DRAWN_SIDE_PX, SOURCE_SIDE_PX = 128, 160, 400
HELD_OUT_SHARE = 0.4  # of the clip art folders

Rng = np.random.Generator
Kinds = dict[str, float]

# Alterations and their relative frequencies, for the copies of the map and those of the network.
MAP_KINDS: Kinds = {
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
MAP_COUNTS = (1, 1, 1, 1, 2, 2, 3)  # number of alterations of one copy, drawn uniformly
NETWORK_KINDS: Kinds = {
    "crop": 6.0,
    "rotate": 0.5,
    "border": 4.0,
    "resize": 4.0,
    "shift": 0.5,
    "brightness": 6.0,
    "contrast": 2.0,
    "gamma": 2.0,
    "saturation": 0.4,
    "light": 1.5,
    "grey": 0.6,
    "blur": 3.0,
    "noise": 0.5,
    "jpeg": 6.0,
    "webp": 1.0,
    "gif": 0.6,
}
NETWORK_COUNTS = (1, 1, 1, 2, 2, 3, 4)


def is_held_out(path: str) -> bool:
    """Return whether clip art is held out for measuring, by its folder."""
    digest = hashlib.md5(os.path.dirname(path).encode()).digest()  # any fixed hash of the name would do
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


def copy_of(picture: Image.Image, rng: Rng, kinds: Kinds, counts: tuple[int, ...]) -> Image.Image:
    """Return a copy altered in as many ways as `counts` says, in the order of the kinds."""
    shares = np.array(list(kinds.values())) / sum(kinds.values())
    chosen = set(rng.choice(list(kinds), rng.choice(counts), replace=False, p=shares).tolist())
    for kind in kinds:
        if kind in chosen:
            picture = altered(picture, kind, rng)
    return picture


# Pictures


def read_clipart(folder: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """Return the clip art for training by path, scaled down, each picture once; then larger ones to compose from."""
    pictures, sources, seen = [], [], set()
    for path in sorted(path for path in folder.rglob("*.png") if not path.is_symlink()):
        if is_held_out(path.relative_to(folder).as_posix()):
            continue
        try:
            picture = decode(path.read_bytes())
        except (UnreadableImage, Image.DecompressionBombWarning):
            continue
        source = picture.copy()
        source.thumbnail((SOURCE_SIDE_PX, SOURCE_SIDE_PX), Image.Resampling.LANCZOS)
        picture.thumbnail((CLIPART_SIDE_PX, CLIPART_SIDE_PX), Image.Resampling.LANCZOS)
        if shows_something(picture) and picture.tobytes() not in seen:
            seen.add(picture.tobytes())
            pictures.append(picture)
            if path.parent.name != "stars" or len(pictures) % 8 == 0:  # a third of all
                sources.append(source)
    return pictures, sources


def shows_something(picture: Image.Image) -> bool:
    return min(picture.size) >= 12 and bool(np.asarray(picture).std(axis=(0, 1)).max() >= 8)


def drawn(rng: Rng) -> Image.Image:
    """Return a random drawing: clouds, scattered shapes, a page of text, or a plain colour."""
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


def composed(sources: list[Image.Image], rng: Rng) -> Image.Image:
    """Return a piece of clip art, or some pieces on a background."""
    if rng.random() < 0.45:
        return piece(sources, rng, 60, 160)
    width, height = rng.integers(80, 160, 2).tolist()
    match rng.choice(4, p=[0.3, 0.2, 0.3, 0.2]):
        case 0:
            picture = Image.new("RGB", (width, height), "white")
        case 1:
            picture = Image.new("RGB", (width, height), tuple(rng.integers(0, 256, 3).tolist()))
        case 2:
            picture = clouds(rng).resize((width, height))
        case _:
            picture = drawn(rng).resize((width, height))
    for _ in range(int(rng.integers(1, 7))):
        pasted = piece(sources, rng, 20, 110)
        paper_is_clear = rng.random() < 0.7
        mask = pasted.convert("L").point([255] * 245 + [0] * 11) if paper_is_clear else None
        picture.paste(pasted, (int(rng.integers(-10, width - 20)), int(rng.integers(-10, height - 20))), mask)
    return picture


def piece(sources: list[Image.Image], rng: Rng, least_px: float, most_px: float) -> Image.Image:
    """Return a piece of clip art, perhaps mirrored, turned or in other colours, its long side within bounds."""
    picture = sources[rng.integers(len(sources))]
    if rng.random() < 0.6:
        picture = cropped(picture, rng, 0.35, 1)
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(90 * int(rng.integers(4)), expand=True)
    if rng.random() < 0.6:
        picture = Image.merge("RGB", [picture.split()[channel] for channel in rng.permutation(3)])
    return scaled(picture, rng.uniform(least_px, most_px))


def scaled(picture: Image.Image, long_side_px: float) -> Image.Image:
    factor = long_side_px / max(picture.size)
    width, height = (max(4, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def sibling(picture: Image.Image, sources: list[Image.Image], rng: Rng) -> Image.Image:
    """Return a picture that differs in one small place, or in its hues."""
    picture = picture.copy()
    size_px = rng.uniform(0.07, 0.2) * max(picture.size)
    left, top = (rng.uniform(0, max(1, side - 0.8 * size_px)) for side in picture.size)
    draw = ImageDraw.Draw(picture)
    colour = tuple(rng.integers(0, 256, 3).tolist())
    match rng.integers(5):
        case 0:
            draw.ellipse((left, top, left + size_px, top + size_px), fill=colour)
        case 1:
            draw.rectangle((left, top, left + size_px, top + size_px * rng.uniform(0.3, 1)), fill=colour)
        case 2:
            text = letters(rng, int(rng.integers(1, 3))).upper()
            draw.text((left, top), text, fill=colour, font=ImageFont.load_default(max(7, int(size_px))))
        case 3:
            picture.paste(scaled(sources[rng.integers(len(sources))], 1.4 * size_px), (int(left), int(top)))
        case _:
            hues = np.array(picture.convert("HSV"))
            hues[..., 0] += np.uint8(rng.integers(30, 226))
            picture = Image.fromarray(hues, "HSV").convert("RGB")
    return picture


def compose(sources: list[Image.Image], count: int, rng: Rng) -> list[Image.Image]:
    """Return composed pictures, some followed by siblings."""
    pictures: list[Image.Image] = []
    while len(pictures) < count:
        if pictures and rng.random() < 0.35:
            pictures.append(sibling(pictures[-1], sources, rng))
        elif shows_something(picture := composed(sources, rng)):
            pictures.append(picture)
    return pictures


def read_fashion(folder: Path) -> tuple[list[Image.Image], list[Image.Image], list[Image.Image]]:
    """Return Fashion-MNIST's training images for the map, more for the network, and unused ones."""
    images = read_split(folder, "train").images
    rows = np.random.default_rng((SEED, 1)).choice(len(images), NUM_FASHION, replace=False)
    others = np.random.default_rng(2).permutation(np.setdiff1d(np.arange(len(images)), rows))
    chosen = rows, others[-NUM_MORE_FASHION:], others[:NUM_UNTOUCHED]
    mapped, more, untouched = (
        [Image.fromarray(images[row]).convert("RGB") for row in part.tolist()] for part in chosen
    )
    return mapped, more, untouched
