"""Train the descriptor behind `--model copy` again: models/copy_weights.safetensors.

    apt install dataset-fashion-mnist openclipart-png
    python examples/build_copy_weights.py

Each step shows the network pictures and altered copies of them; it learns to find each one's partner among all others
(InfoNCE, with the last pictures seen as further wrong answers), and to spread pictures out. The pictures are
Fashion-MNIST's training images, two classes at a time, clip art, neighbours in their folders at a time, and drawn
ones; siblings (recoloured, mirrored, patched) are wrong answers too. Clip art of the folders that `is_held_out` names
is never shown, so that `benchmarks/copies.py` measures on what is new. About twenty minutes on two cores; the same
seed and versions give nearly, not exactly, the same weights.
"""

import argparse
import hashlib
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from build_data import read_split
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from dinov2_toolkit.models.copy_descriptor import PREPROCESS, WEIGHTS_FILE, CopyDescriptor, without_margins
from dinov2_toolkit.models.preprocess import crop_picture
from dinov2_toolkit.store.images import UnreadableImage, decode

SEED = 0
STEPS = 1_200
LEARNING_RATE = 3e-3
TEMPERATURE = 0.04
SPREAD_WEIGHT = 0.3
QUEUE_STEPS = 32  # how many steps' pictures are further wrong answers
NUM_FASHION, NUM_CLIPART, NUM_DRAWN, NUM_SIBLINGS = 80, 80, 32, 48  # pictures a step
CLIPART_RUN = 20  # neighbours in the list of clip art, often variants of one another
CLIPART_SIDE_PX = 128
DRAWN_POOL, DRAWN_SIDE_PX = 2_500, 160
HELD_OUT_SHARE = 0.4  # of the clip art folders

Rng = np.random.Generator

# How a copy comes to be, and how often; applied in this order.
KINDS = {
    "crop": 4.0,
    "rotate": 1.5,
    "border": 2.5,
    "resize": 2.5,
    "shift": 0.5,
    "brightness": 2.5,
    "contrast": 2.0,
    "gamma": 2.0,
    "saturation": 0.4,
    "light": 1.0,
    "grey": 0.8,
    "blur": 1.5,
    "noise": 0.4,
    "text": 1.0,
    "jpeg": 3.0,
    "webp": 0.6,
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
            return resized(picture, rng.choice([0.5, 0.5, 0.75, 1.5, 2]))
        case "shift":
            return Image.fromarray(np.roll(np.asarray(picture), rng.integers(-1, 2, 2).tolist(), (0, 1)))
        case "brightness":
            return ImageEnhance.Brightness(picture).enhance(rng.uniform(0.65, 1.4))
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
            return reencoded(picture, "JPEG", int(rng.integers(25, 96)))
        case "webp":
            return reencoded(picture, "WEBP", int(rng.integers(30, 96)))
        case "gif":
            return reencoded(picture, "GIF")
    raise ValueError(f"unknown kind of copy: {kind}")


def copy_of(picture: Image.Image, rng: Rng) -> Image.Image:
    """Return a copy altered in one to three ways."""
    count = rng.choice([1, 1, 1, 2, 2, 3])
    chosen = set(rng.choice(list(KINDS), count, replace=False, p=PROBABILITIES).tolist())
    for kind in KINDS:
        if kind in chosen:
            picture = altered(picture, kind, rng)
    return picture


def nearly_itself(picture: Image.Image, rng: Rng) -> Image.Image:
    """Return a picture as a pool may hold it: mostly untouched."""
    match rng.choice(4, p=[0.55, 0.15, 0.15, 0.15]):
        case 1:
            return reencoded(picture, "JPEG", int(rng.integers(50, 96)))
        case 2:
            return resized(picture, rng.choice([0.5, 0.75, 1.5]))
        case 3:
            return cropped(picture, rng, 0.94, 1)
    return picture


def sibling(picture: Image.Image, rng: Rng) -> Image.Image:
    """Return a picture that is like this one and yet another: recoloured, mirrored, or with a part replaced."""
    match rng.choice(3, p=[0.45, 0.2, 0.35]):
        case 0:
            hue, saturation, value = picture.convert("HSV").split()
            turn = int(rng.integers(30, 226))
            return Image.merge("HSV", (hue.point([(i + turn) % 256 for i in range(256)]), saturation, value)).convert(
                "RGB"
            )
        case 1:
            return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed = picture.copy()
    width, height = (max(2, round(side * rng.uniform(0.2, 0.4))) for side in picture.size)
    corners = [(rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)) for _ in range(2)]
    left, top = corners[0]
    changed.paste(picture.crop((left, top, left + width, top + height)), corners[1])
    return changed


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


class Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The pictures, copies and siblings of every step, each (B, 3, 64, 64) uint8 without margins."""

    def __init__(self, fashion: Path, openclipart: Path, steps: int) -> None:
        self.steps = steps
        split = read_split(fashion, "train")
        self.fashion, self.rows = split.images, [np.flatnonzero(split.labels == label) for label in range(10)]
        self.clipart = read_clipart(openclipart)
        rng = np.random.default_rng((SEED, 1))
        self.drawn = [drawn(rng) for _ in range(DRAWN_POOL)]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        if step >= self.steps:
            raise IndexError(step)
        rng = np.random.default_rng((SEED, 2, step))
        pictures = []
        for label in rng.choice(10, 2, replace=False).tolist():
            rows = rng.choice(self.rows[label], NUM_FASHION // 2, replace=False)
            pictures += [Image.fromarray(self.fashion[row]).convert("RGB") for row in rows.tolist()]
        chosen: dict[int, None] = {}
        while len(chosen) < NUM_CLIPART:
            first = int(rng.integers(len(self.clipart)))
            neighbours = range(first, min(first + CLIPART_RUN, len(self.clipart)))
            chosen |= dict.fromkeys(list(neighbours)[: NUM_CLIPART - len(chosen)])
        pictures += [self.clipart[number] for number in chosen]
        pictures += [self.drawn[number] for number in rng.choice(DRAWN_POOL, NUM_DRAWN, replace=False).tolist()]
        imitated = rng.choice(len(pictures) - NUM_FASHION, NUM_SIBLINGS, replace=False) + NUM_FASHION
        return (
            network_input([nearly_itself(picture, rng) for picture in pictures]),
            network_input([copy_of(picture, rng) for picture in pictures]),
            network_input([sibling(pictures[number], rng) for number in imitated.tolist()]),
        )


def network_input(pictures: Sequence[Image.Image]) -> Tensor:
    pixels = torch.stack([crop_picture(picture, PREPROCESS) for picture in pictures])
    return (without_margins(pixels.float() / 255).clamp(0, 1) * 255).round().byte()


# Training


def copy_loss(pictures: Tensor, copies: Tensor, others: Tensor) -> Tensor:
    """Return how badly pictures and copies (B, D), of length 1, find each other among all, `others` (M, D) included."""
    itself = torch.eye(len(pictures), dtype=torch.bool)
    losses = []
    for queries, answers in ((pictures, copies), (copies, pictures)):
        logits = torch.cat(
            [queries @ answers.T, (queries @ queries.T).masked_fill(itself, -torch.inf), queries @ others.T], dim=1
        )
        losses.append(F.cross_entropy(logits / TEMPERATURE, torch.arange(len(queries))))
    return torch.stack(losses).mean()


def spread_loss(pictures: Tensor) -> Tensor:
    """Return minus the mean log distance of each picture (B, D) to its nearest other (KoLeo)."""
    itself = torch.eye(len(pictures), dtype=torch.bool)
    nearest = (pictures @ pictures.T).masked_fill(itself, -1).amax(dim=1)
    return -(2 - 2 * nearest).clamp(min=1e-6).sqrt().log().mean()


def train(descriptor: CopyDescriptor, batches: Batches, learning_rate: float, num_workers: int) -> None:
    descriptor.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(descriptor.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, batches.steps, pct_start=0.15)
    queue = torch.empty(0, CopyDescriptor.embed_dim)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=num_workers, worker_init_fn=lambda _: torch.set_num_threads(1)
    )
    for step, parts in enumerate(loader):
        images = torch.cat(parts).float().div(255).contiguous(memory_format=torch.channels_last)
        features = descriptor.describe(images).cls_token
        pictures, copies, siblings = features.split([len(part) for part in parts])

        loss = copy_loss(pictures, copies, torch.cat([siblings, queue]))
        spread = spread_loss(pictures)
        (loss + SPREAD_WEIGHT * spread).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

        if step > batches.steps // 10:  # before, features change too quickly to be kept
            queue = torch.cat([queue, pictures.detach()])[-QUEUE_STEPS * len(pictures) :]
        if step % 20 == 0:
            similarity = (pictures * copies).sum(dim=1).mean().item()
            print(
                f"step {step}: loss {loss.item():.3f}, spread {spread.item():.3f}, copies at {similarity:.3f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--output", type=Path, default=WEIGHTS_FILE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--init-from", type=Path, help="weights to go on from")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()

    Image.MAX_IMAGE_PIXELS = 8_000_000  # a few sources have hundreds of millions
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    batches = Batches(arguments.fashion, arguments.openclipart, arguments.steps)
    print(f"{len(batches.clipart):,} pieces of clip art", flush=True)
    torch.manual_seed(SEED)
    descriptor = CopyDescriptor()
    if arguments.init_from is not None:
        descriptor.load_state_dict({name: tensor.float() for name, tensor in load_file(arguments.init_from).items()})
    train(descriptor, batches, arguments.learning_rate, arguments.num_workers)
    tensors = {
        name: tensor.half().contiguous()
        for name, tensor in descriptor.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(tensors, arguments.output)
    arguments.output.chmod(0o644)  # it is made for its owner only
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
