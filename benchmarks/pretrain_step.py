"""Time the training step that `dinov2 train pretrain` runs: images/s and peak memory, on random crops.

    python benchmarks/pretrain_step.py --batch 8 --steps 5

A timed step = student and teacher forward, losses, backward, clipping, AdamW, EMA. Crops and masks are made between
the steps, outside the timer, because training makes them ahead. The result is the median step. Ends with one JSON
line. Defaults: ViT-S/16, 2 x 224 + 8 x 96 px, 8,192 prototypes, one shared head, softmax centering, float32,
2 threads, drop path 0.3, KoLeo 0.1; views and checkpointing as the recipe `vits16-1gpu` sets them.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from typing import get_args

import torch
from accelerate import Accelerator

from dinov2_toolkit.benchmarks.step import random_batch, training_step
from dinov2_toolkit.models.block import ActivationCheckpointing
from dinov2_toolkit.models.cpu import keep_freed_memory
from dinov2_toolkit.train.config import TrainConfig, resolve

NUMBERS = {
    "batch": 4,
    "steps": 5,
    "warmup": 2,
    "threads": 2,
    "seed": 0,
    "dim": 384,
    "depth": 12,
    "heads": 6,
    "patch": 16,
    "global-size": 224,
    "local-size": 96,
    "local-crops": 8,
    "prototypes": 8192,
    "micro-batch": 0,
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag, default in NUMBERS.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--drop-path", type=float, default=0.3, help="default 0.3")
    recipe = resolve(TrainConfig, "vits16-1gpu")
    parser.add_argument(
        "--sequential-views",
        action=argparse.BooleanOptionalAction,
        default=recipe.sequential_views,
        help="local crops in two halves, then each global view",
    )
    kinds = get_args(ActivationCheckpointing)
    parser.add_argument("--activation-checkpointing", choices=kinds, default=recipe.activation_checkpointing)
    parser.add_argument("--separate-head", action="store_true", help="separate heads for class and patch tokens")
    parser.add_argument("--centering", choices=["centering", "sinkhorn_knopp"], default="centering")
    return parser.parse_args()


def settings(args: argparse.Namespace) -> TrainConfig:
    """Return the recipe's keys that the command line stands for."""
    return TrainConfig(
        patch_size=args.patch,
        depth=args.depth,
        embed_dim=args.dim,
        num_heads=args.heads,
        global_crop_size_px=args.global_size,
        num_local_crops=args.local_crops,
        local_crop_size_px=args.local_size,
        drop_path=args.drop_path,
        separate_heads=args.separate_head,
        num_prototypes=args.prototypes,
        ibot_num_prototypes=args.prototypes,
        centering="softmax_center" if args.centering == "centering" else "sinkhorn_knopp",
        sequential_views=args.sequential_views,
        micro_batch_size=args.micro_batch,
        activation_checkpointing=args.activation_checkpointing,
        mixed_precision="no",
        seed=args.seed,
    )


def main() -> None:
    """Time the steps and print the figures."""
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = settings(args)
    step = training_step(config, Accelerator(cpu=True), args.batch)
    losses, seconds = [], []
    for number in range(args.warmup + args.steps):
        batch = random_batch(config, args.batch, torch.device("cpu"), number)
        start = time.perf_counter()
        loss = step(batch)
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        print(f"loss {losses[-1]:.4f}, {seconds[-1]:.3f} s", file=sys.stderr)
    step_s = statistics.median(seconds[args.warmup :])
    figures = {
        "batch": args.batch,
        "img_per_s": round(args.batch / step_s, 4),
        "step_s": round(step_s, 4),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
