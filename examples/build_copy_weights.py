"""Make the weights of `--model copy` again: models/copy_weights.safetensors.

    apt install dataset-fashion-mnist openclipart-png
    python examples/build_copy_weights.py

First the linear map. Altered copies are made of some thousand pictures (Fashion-MNIST's training images, clip art,
drawn ones). The map is a linear discriminant analysis of two covariances: that of copies around their picture, and that
of the pictures. It is computed twice. The second time a copy has the more weight, the nearer the first map places it to
its picture, because a threshold can find only near copies. Two minutes.

Then the network, whose output is added to the map's. It is trained on more pictures of each kind and on pictures
composed of clip art. A batch has two copies each of pictures that are similar under the map. The loss pulls copies
above, and the most similar other pictures below, one limit, which is learnt too, because deduplication uses one
threshold. Forty minutes on two cores, and 8 GB of memory.

Clip art in the folders of `is_held_out` is not used, so that `benchmarks/copies.py` measures on unseen pictures. The
same seed and versions give the same weights up to rounding.
"""

import argparse
import math
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from copy_pictures import (
    MAP_COUNTS,
    MAP_KINDS,
    NETWORK_COUNTS,
    NETWORK_KINDS,
    SEED,
    compose,
    copy_of,
    drawn,
    read_clipart,
    read_fashion,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dinov2_toolkit.models.copy_descriptor import PREPROCESS, WEIGHTS_FILE, CopyDescriptor, crop_margins, standardise
from dinov2_toolkit.models.preprocess import crop_picture, normalise

Rng = np.random.Generator
Pictures = list[Image.Image]

# The map
NUM_DRAWN = 1_000  # pictures; clip art: all that is not held out
COPIES = 4  # of each picture
SHRINKAGE = 0.1  # added to the correlations within copies: they come from few pictures
WHITENING = 1.0  # chosen: each output is divided by its variance to this power; 0.5 gives all the same weight
NEARNESS = 0.75  # chosen: a copy's weight is (1 - cosine) to minus this power
NEAR = 0.02  # chosen: smallest 1 - cosine in that weight

# The network
NUM_COMPOSED, NUM_MORE_DRAWN = 14_000, 4_000
CLIPART_COPIES, OTHER_COPIES = 16, 6
SHARES = {"clip art": 0.3, "composed": 0.35, "drawn": 0.1, "fashion": 0.25}  # of the batches
STEPS, WARMUP_STEPS = 3_500, 200
NEAREST = 32  # neighbours of each picture under the map
SEEDS, GROUP = 32, 8  # a batch: 32 pictures, each with seven of its neighbours
ORIGINAL_SHARE = 0.4  # of pairs: the picture itself and a copy; the others are two copies
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
SOFTNESS = 0.05  # of the limit, in cosine
FIRST_LIMIT = 0.85  # cosine
HARDEST = 8  # negatives of each picture in the loss: the most similar ones of the batch
SAME = 0.995  # cosine of the map: such pictures may be copies, so they are no negatives
AVERAGED_OVER = 500  # steps of the moving average of the weights
CORRECTION = 0.3  # chosen: factor of the network's output, because it was trained on few pictures
BATCH = 64


# The map


def pixels_of(pictures: Pictures) -> Tensor:
    """Return pixels (N, 3, 64, 64) in [0, 1], margins cropped."""
    pixels = torch.stack([crop_picture(picture, PREPROCESS) for picture in pictures])
    return crop_margins(normalise(pixels, PREPROCESS))


def map_inputs(descriptor: CopyDescriptor, pictures: Pictures) -> Tensor:
    """Return the input of the map, (N, E) float64."""
    batches = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    return torch.cat([descriptor.gabor_colour_features(*standardise(pixels_of(batch))).double() for batch in batches])


def discriminant_map(pictures: Tensor, copies: Tensor, weights: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return weight (D, E) and bias (D,) of the map.

    Args:
        pictures: (N, E).
        copies: (M, N, E), M copies of each.
        weights: (M, N), the weight of each copy, 1 on average.
        dim: D.
    """
    mean = pictures.mean(dim=0)
    between = torch.cov(pictures.T, correction=0)
    apart = ((copies - pictures) * weights.sqrt()[:, :, None]).flatten(0, 1)
    within = apart.T @ apart / len(apart) / 2  # both ends of a difference deviate
    scale = within.diag().sqrt() + 1e-4
    correlation = within / scale / scale[:, None] + SHRINKAGE * torch.eye(len(scale), dtype=torch.float64)
    variances, axes = torch.linalg.eigh(correlation)
    sphered = axes / variances.sqrt() / scale[:, None]  # copies have variance 1 in all directions
    ratios, axes = torch.linalg.eigh(sphered.T @ between @ sphered)
    weight = (sphered @ axes[:, -dim:] / ratios[-dim:] ** WHITENING).T.flip(0)
    weight = weight / weight.square().mean().sqrt() / 10  # float16 holds numbers of this size best
    return weight, -weight @ mean


def nearness(pictures: Tensor, copies: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the weights of copies, (M, N), 1 on average: larger, the nearer a map places them to their pictures."""
    mapped = F.normalize(F.linear(pictures, weight, bias), dim=-1)
    cosines = (F.normalize(F.linear(copies, weight, bias), dim=-1) * mapped).sum(dim=-1)
    near = (1 - cosines).clamp(min=NEAR) ** -NEARNESS
    return near / near.mean()


def make_map(descriptor: CopyDescriptor, pictures: Pictures, rng: Rng) -> None:
    """Set the descriptor's linear map."""
    with torch.inference_mode():
        copies = torch.stack(
            [
                map_inputs(descriptor, [copy_of(picture, rng, MAP_KINDS, MAP_COUNTS) for picture in pictures])
                for _ in range(COPIES)
            ]
        )
        originals = map_inputs(descriptor, pictures)
        weights, dim = torch.ones(copies.shape[:2], dtype=torch.float64), CopyDescriptor.embed_dim
        first = discriminant_map(originals, copies, weights, dim)
        weight, bias = discriminant_map(originals, copies, nearness(originals, copies, *first), dim)
    descriptor.head.load_state_dict({"weight": weight.half().float(), "bias": bias.half().float()})


# The network


class PictureSet(NamedTuple):
    """Pictures, then their copies, margins cropped."""

    pixels: Tensor  # (1 + C, N, 3, 64, 64) uint8
    mapped: Tensor  # (1 + C, N, D)
    neighbors: Tensor  # (N, 1 + NEAREST): the picture and its nearest under the map


def trimmed(job: tuple[Pictures, int | None]) -> np.ndarray:
    """Return the pixels of pictures, or of a copy of each by a seed, (N, 3, 64, 64) uint8."""
    torch.set_num_threads(1)
    pictures, seed = job
    if seed is not None:
        rng = np.random.default_rng((SEED, 3, seed))
        pictures = [copy_of(picture, rng, NETWORK_KINDS, NETWORK_COUNTS) for picture in pictures]
    return (pixels_of(pictures) * 255).round().byte().numpy()


def picture_set(descriptor: CopyDescriptor, pictures: Pictures, num_copies: int) -> PictureSet:
    """Return pictures and copies of them, made on all cores."""
    parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
    jobs = [
        (part, copy * len(parts) + place if copy else None)
        for copy in range(1 + num_copies)
        for place, part in enumerate(parts)
    ]
    with multiprocessing.get_context("fork").Pool() as pool:
        flat = torch.from_numpy(np.concatenate(pool.map(trimmed, jobs, chunksize=8)))
    with torch.no_grad():
        inputs = (descriptor.gabor_colour_features(*standardise(part / 255)) for part in flat.split(512))
        vectors = torch.cat([descriptor.project(features) for features in inputs])
        originals = vectors[: len(pictures)]
        neighbors = torch.cat(
            [(part @ originals.T).topk(1 + NEAREST, dim=1).indices for part in originals.split(1_000)]
        )
    shape = 1 + num_copies, len(pictures)
    return PictureSet(flat.view(*shape, *flat.shape[1:]), vectors.view(*shape, -1), neighbors)


def pairs(pictures: PictureSet, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
    """Return two versions each of P similar pictures.

    Returns:
        Pixels (2 P, 3, 64, 64) in [0, 1], first versions before second ones; their output of the map (2 P, D); which
        pictures may be the same (P, P).
    """
    num_copies, num_pictures = pictures.pixels.shape[0] - 1, pictures.pixels.shape[1]
    seeds = rng.choice(num_pictures, SEEDS, replace=False)
    beside = np.stack([rng.choice(np.arange(1, 1 + NEAREST), GROUP - 1, replace=False) for _ in seeds])
    rows = torch.cat(
        [pictures.neighbors[seeds, :1], pictures.neighbors[seeds].gather(1, torch.from_numpy(beside))], dim=1
    )
    rows = rows.unique()
    first = rng.integers(1, 1 + num_copies, len(rows)) * (rng.random(len(rows)) >= ORIGINAL_SHARE)
    second = rng.integers(1, 1 + num_copies, len(rows))
    forms, both = torch.from_numpy(np.concatenate([first, second])), rows.repeat(2)
    originals = pictures.mapped[0, rows]
    return pictures.pixels[forms, both] / 255, pictures.mapped[forms, both], originals @ originals.T > SAME


def loss_of(vectors: Tensor, same: Tensor, limit: Tensor) -> Tensor:
    """Return the softplus loss of copies below the limit and of the most similar other pictures above it.

    Args:
        vectors: (2 P, D) of length 1; row i and row P + i are of one picture.
        same: (P, P), pairs of pictures that are no negatives.
        limit: cosine.
    """
    half = len(same)
    cosines = vectors @ vectors.T
    copies = cosines.diagonal(half)  # (P,)
    others = cosines.masked_fill((same | torch.eye(half, dtype=torch.bool)).repeat(2, 2), -1)
    hardest = others.topk(HARDEST, dim=1).values  # (2 P, 8)
    return F.softplus((limit - copies) / SOFTNESS).mean() + F.softplus((hardest - limit) / SOFTNESS).mean()


def train_correction(descriptor: CopyDescriptor, sets: dict[str, PictureSet], rng: Rng) -> None:
    """Train the descriptor's network; the map is frozen."""
    network = descriptor.correction.to(memory_format=torch.channels_last).train()
    torch.nn.init.normal_(network.head.weight, std=0.002)  # at the start the output is nearly the map's
    torch.nn.init.zeros_(network.head.bias)
    limit = torch.nn.Parameter(torch.tensor(FIRST_LIMIT))
    groups = [{"params": network.parameters()}, {"params": [limit], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / AVERAGED_OVER), use_buffers=True)
    names, recent, start = list(SHARES), [], time.monotonic()
    for step in range(STEPS):
        rate = min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / STEPS)) / 2
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        pixels, mapped, same = pairs(sets[names[rng.choice(len(names), p=list(SHARES.values()))]], rng)
        standardised, plain = standardise(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            correction = network(standardised, plain)
        loss = loss_of(F.normalize(mapped + correction.float(), dim=1), same, limit)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
        recent.append(loss.item())
        if (step + 1) % 200 == 0:
            figures = f"loss {np.mean(recent[-200:]):.3f}, limit {limit.item():.3f}"
            print(f"step {step + 1:,} of {STEPS:,}, {figures}, {time.monotonic() - start:,.0f} s", flush=True)
    network.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        network.head.weight *= CORRECTION
        network.head.bias *= CORRECTION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart/png"))
    parser.add_argument("--output", type=Path, default=WEIGHTS_FILE)
    arguments = parser.parse_args()

    Image.MAX_IMAGE_PIXELS = 8_000_000  # a few sources have hundreds of millions
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    torch.manual_seed(SEED)
    rng = np.random.default_rng((SEED, 2))
    fashion, more_fashion, _ = read_fashion(arguments.fashion)
    clipart, sources = read_clipart(arguments.openclipart)
    descriptor = CopyDescriptor()
    drawings = [drawn(rng) for _ in range(NUM_DRAWN)]
    make_map(descriptor, [*fashion, *clipart, *drawings], rng)
    print("map computed", flush=True)

    drawings += [drawn(rng) for _ in range(NUM_MORE_DRAWN - NUM_DRAWN)]
    sets = {
        "clip art": picture_set(descriptor, clipart, CLIPART_COPIES),
        "composed": picture_set(descriptor, compose(sources, NUM_COMPOSED, rng), OTHER_COPIES),
        "drawn": picture_set(descriptor, drawings, OTHER_COPIES),
        "fashion": picture_set(descriptor, fashion + more_fashion, OTHER_COPIES),
    }
    print(", ".join(f"{name}: {each.pixels.shape[1]:,} pictures" for name, each in sets.items()), flush=True)
    train_correction(descriptor, sets, rng)
    small = {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in descriptor.state_dict().items()}
    small["head.bias"] = small["head.bias"].half()
    save_file({name: tensor.contiguous() for name, tensor in small.items()}, arguments.output)
    arguments.output.chmod(0o644)  # save_file makes it readable by its owner only
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    main()
