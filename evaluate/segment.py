"""The segmentation protocol: a linear layer on patch tokens predicts the class of every pixel.

M images, D numbers a patch token, rows x columns patches of an image, S patches a side of a tile, B tiles, P pixels,
C classes, V values that a mask's pixel may have.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, best_device, with_choice
from ..features.extract.tokens import TokenChoice
from ..features.extract.windows import MAX_ASPECT
from ..features.image_workers import Read, image_workers
from ..models.vit import VisionTransformer
from ..store.cache import open_cache
from ..store.images import UnreadableImage
from ..store.vectors import Float64, Int64
from .labelled import extract_split
from .masks import IGNORE, Mask, MaskedSplit, decode_mask, read_mask
from .scores import Measurement, resampled_interval

NUM_VALUES = 256  # V
OWN_SIZE = 1 << 30  # short side in pixels to which larger images are resized: none is
BATCH_TILES = 16  # B
PIXELS_A_TILE = 1_024  # chosen: random pixels of a tile that the loss is computed on
MIN_STEPS, MAX_STEPS, PASSES = 500, 40_000, 100  # chosen: passes over the tiles, within these numbers of steps
LEARNING_RATE = 1e-2  # chosen: DINOv3's configuration has 1e-3, for 80 times as many steps
WEIGHT_DECAY, WARMUP = 1e-3, 0.05  # the warm-up is a share of the steps
PREDICTED_NUMBERS = 16_000_000  # pixels by classes that are predicted at a time: 64 MB

Random = np.random.Generator
Sizes = tuple[int, int | None]  # the batch size and the number of threads that decode images


@dataclass(frozen=True)
class Sample:
    """An image's patch tokens and mask."""

    tokens: Tensor  # (rows, columns, D) float16
    mask: Mask  # (height, width)


def measure_segment(
    model: FeatureModel, train: MaskedSplit, test: MaskedSplit, *, image_size: int | None, sizes: Sizes, seed: int
) -> Iterator[Measurement]:
    """Yield mean intersection over union and pixel accuracy of a batch norm and a 1 x 1 convolution on patch tokens.

    Images keep their size (smaller ones are enlarged to `image_size` on the short side). Windows of `image_size`, the
    model's own by default, slide over them; patch tokens of overlapping windows are averaged, logits are interpolated
    between patches. The tokens of the training images are computed once. Pixels of value 255 are ignored; the mean is
    over the classes that stand in the test masks or are predicted.

    Raises ToolkitError when the model has no patch tokens, no mask suits its image, or they name a single class.
    Source: the linear segmentation of DINOv2 (Oquab et al. 2023, section 7.4), optimised as DINOv3's published
    configuration says (AdamW, decay 1e-3, warm-up, cosine), but without augmentation, and with fewer, larger steps.
    """
    if not isinstance(model.backbone, VisionTransformer):
        path = model.source.path
        raise ToolkitError(f"the model {path!r} has no patch tokens, which segmentation needs; name a ViT by --model")
    side_px = image_size or model.preprocess.image_size
    windowed = with_choice(model, TokenChoice("patches"), side_px, OWN_SIZE)
    side = side_px // model.backbone.patch_size
    with tempfile.TemporaryFile(dir=open_cache()) as file:
        samples = [_on_disk(sample, file) for sample in _samples(windowed, train, *sizes)]
        classes = _classes(samples, train)
        num_tiles = sum(len(_offsets(sample.tokens, side)) for sample in samples)
        steps = min(MAX_STEPS, max(MIN_STEPS, PASSES * num_tiles // BATCH_TILES))
        head = train_head(samples, classes, side=side, steps=steps, seed=seed)
    counts = []
    for sample in _samples(windowed, test, *sizes):
        counts.append(pixel_counts(classes[predict(head, sample.tokens, sample.mask.shape)], sample.mask))
    by_image = np.stack(counts)  # (M, 3, V)
    if len(unknown := np.setdiff1d(np.flatnonzero(by_image[:, 1].sum(axis=0)), classes)):
        listed = ", ".join(map(str, unknown[:3])) + (", ..." if len(unknown) > 3 else "")
        console.warn(f"the test masks hold classes that no training mask has ({listed}); their pixels count as wrong")
    parameters: dict[str, object] = {
        "image_size": side_px,
        "windows": "sliding, evenly spaced, tokens averaged",
        "head": "batch norm, 1 x 1 convolution",
        "steps": steps,
        "batch_size": BATCH_TILES,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "classes": len(classes),
        "ignored_value": IGNORE,
    }
    for metric, score in (("miou", mean_iou), ("pixel_accuracy", pixel_accuracy)):

        def resampled(random: Random) -> float:
            drawn = np.bincount(random.integers(len(by_image), size=len(by_image)), minlength=len(by_image))
            return score(np.tensordot(drawn, by_image, axes=1))  # noqa: B023  # called before the next metric

        interval = resampled_interval(resampled, seed)
        yield Measurement(parameters, metric, score(by_image.sum(axis=0)), interval, len(samples), len(by_image))


def _on_disk(sample: Sample, file: IO[bytes]) -> Sample:
    """Return the same sample, read from a temporary file as it is needed."""
    start = file.seek(0, os.SEEK_END)
    tokens = np.ascontiguousarray(sample.tokens.numpy())
    file.write(tokens.tobytes() + sample.mask.tobytes())
    file.flush()
    # Copy on write, for torch warns of arrays that cannot be written to.
    kept = np.memmap(file, tokens.dtype, "c", start, tokens.shape)
    mask: Mask = np.memmap(file, np.uint8, "c", start + tokens.nbytes, sample.mask.shape)
    return Sample(torch.from_numpy(kept), mask)


def _samples(model: FeatureModel, split: MaskedSplit, batch_size: int, num_workers: int | None) -> Iterator[Sample]:
    """Yield the tokens and mask of every image of a split; a warning says which are left out.

    Raises ToolkitError when all are.
    """
    num_read, left_out = 0, list[tuple[str, str]]()  # an image and its reason
    with image_workers(decode_mask, 1) as read:
        for batch in extract_split(model, split, batch_size, num_workers):
            for index, facts, tokens in zip(batch.indices, batch.facts, batch.patches, strict=True):
                mask = _mask(read, split.mask_uris[index], facts.width, facts.height)
                if isinstance(mask, UnreadableImage):
                    left_out.append((split.uris[index], mask.reason))
                    continue
                num_read += 1
                yield Sample(tokens.half(), mask)
    if left_out:
        (uri, reason), role = left_out[0], split.source.role
        if not num_read:
            raise ToolkitError(f"no image of {split.source.path} has a mask to use, first {uri} ({reason}); check them")
        console.warn(f"{role}: {len(left_out):,} images left out for their masks, first {uri} ({reason})")


def _mask(read: Read[Mask], uri: str, width: int, height: int) -> Mask | UnreadableImage:
    """Return the mask of an image, or why there is none to use."""
    if max(width, height) > MAX_ASPECT * min(width, height):  # its features are of its middle alone
        return UnreadableImage(f"it is {width} x {height} pixels, too long; cut it to pieces")
    return read_mask(read, uri, width, height)


def _classes(samples: list[Sample], train: MaskedSplit) -> Int64:
    """Return the values in the training masks, (C,), rising.

    Raises ToolkitError when there is only one.
    """
    seen = np.zeros(NUM_VALUES, dtype=np.int64)
    for sample in samples:
        seen += np.bincount(sample.mask.ravel(), minlength=NUM_VALUES)
    seen[IGNORE] = 0
    classes = np.flatnonzero(seen)
    if len(classes) < 2:
        found = f"only the class {classes[0]}" if len(classes) else "no class"
        raise ToolkitError(f"the masks of {train.source.path} hold {found}; a probe needs two or more to tell apart")
    return classes


def train_head(samples: list[Sample], classes: Int64, *, side: int, steps: int, seed: int) -> nn.Module:
    """Return a batch norm and a 1 x 1 convolution, (B, D, rows, columns) -> (B, C, rows, columns), trained on samples.

    The loss is the cross-entropy at PIXELS_A_TILE random pixels of each tile of side x side patches, where logits are
    interpolated between patches: in expectation the loss of all pixels, for a fraction of the work.
    """
    device = best_device()
    random = np.random.default_rng([seed, 4])
    dim = samples[0].tokens.shape[2]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        head = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, len(classes), 1)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    number = torch.full((NUM_VALUES,), -100)  # what cross_entropy ignores
    number[classes] = torch.arange(len(classes))
    tiles = [(sample, top, left) for sample in samples for top, left in _offsets(sample.tokens, side)]
    order = np.concatenate([random.permutation(len(tiles)) for _ in range(-(-steps * BATCH_TILES // len(tiles)))])
    with console.progress("training the segmentation head", steps, "steps") as advance:
        for step in range(steps):
            tokens, points, truth = [], [], []
            for tile in order[step * BATCH_TILES : (step + 1) * BATCH_TILES]:
                sample, top, left = tiles[tile]
                tokens.append(sample.tokens[top : top + side, left : left + side].permute(2, 0, 1).float())
                places, values = _random_pixels(sample, top, left, side, random)
                points.append(places)
                truth.append(values)
            maps = head(torch.stack(tokens).to(device))  # (B, C, S, S)
            logits = at_points(maps, torch.stack(points)[:, None].to(device))[:, :, 0]  # (B, C, P)
            loss = F.cross_entropy(logits, number[torch.stack(truth)].to(device), reduction="sum")
            optimizer.zero_grad()
            (loss / (BATCH_TILES * PIXELS_A_TILE)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            advance()
    return head.eval()


def _offsets(tokens: Tensor, side: int) -> list[tuple[int, int]]:
    """Return top and left of the tiles of side x side patches that cover a map of tokens."""
    tops, lefts = (sorted({*range(0, length - side + 1, side), length - side}) for length in tokens.shape[:2])
    return [(top, left) for top in tops for left in lefts]


def _random_pixels(sample: Sample, top: int, left: int, side: int, random: Random) -> tuple[Tensor, Tensor]:
    """Return random places in a tile (P, 2), across and down in [-1, 1], and the mask's values there (P,)."""
    places, pixels = [], []
    for first, patches, length in zip((top, left), sample.tokens.shape[:2], sample.mask.shape, strict=True):
        pixel = ((first + random.random(PIXELS_A_TILE) * side) / patches * length).astype(np.int64)
        places.append(((pixel + 0.5) / length * patches - first) / side * 2 - 1)  # of the pixel's middle
        pixels.append(pixel)
    down, across = places
    return torch.from_numpy(np.stack([across, down], axis=1)).float(), torch.from_numpy(sample.mask[*pixels]).long()


def at_points(logits: Tensor, points: Tensor) -> Tensor:
    """Return logits (B, C, rows, columns) at points (B, H, W, 2), bilinear between patches: (B, C, H, W)."""
    return F.grid_sample(logits, points, mode="bilinear", padding_mode="border", align_corners=False)


@torch.inference_mode()
def predict(head: nn.Module, tokens: Tensor, size: tuple[int, ...]) -> Int64:
    """Return the most likely class number of each pixel (height, width), of patch tokens (rows, columns, D)."""
    height, width = size
    device = best_device()
    logits = head(tokens.permute(2, 0, 1)[None].float().to(device))  # (1, C, rows, columns)
    across = (torch.arange(width, device=device) + 0.5) / width * 2 - 1
    down = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    predictions = np.empty((height, width), dtype=np.int64)
    strip = max(1, PREDICTED_NUMBERS // (logits.shape[1] * width))
    for start in range(0, height, strip):
        rows, columns = torch.meshgrid(down[start : start + strip], across, indexing="ij")
        strip_logits = at_points(logits, torch.stack([columns, rows], dim=-1)[None])
        predictions[start : start + strip] = strip_logits[0].argmax(dim=0).cpu().numpy()
    return predictions


def pixel_counts(predictions: Int64, mask: Mask) -> Int64:
    """Return, for each value, how many pixels are predicted correctly, labelled and predicted as such: (3, V)."""
    counts = mask != IGNORE
    predicted, labels = predictions[counts], mask[counts]
    correct = labels[predicted == labels]
    return np.stack([np.bincount(values, minlength=NUM_VALUES) for values in (correct, labels, predicted)])


def mean_iou(counts: Int64) -> float:
    """Return the mean intersection over union of the classes that are labelled or predicted, from `pixel_counts`."""
    correct, labelled, predicted = counts.astype(np.float64)
    union = labelled + predicted - correct
    shares: Float64 = correct[union > 0] / union[union > 0]
    return float(shares.mean()) if len(shares) else 0.0


def pixel_accuracy(counts: Int64) -> float:
    """Return the share of pixels that are predicted correctly, from `pixel_counts`."""
    return float(counts[0].sum() / max(counts[1].sum(), 1))
