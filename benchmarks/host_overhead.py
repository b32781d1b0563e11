"""Time what the host does in a training step beside the model: the loop of `vits16-1gpu`, whose model only sleeps.

    git worktree add --detach out/before 6444aab^
    python benchmarks/host_overhead.py --folder out/host --before out/before

Crops are of 14 and 6 px, from images of 14 px, so that an operation costs little beside what it costs the host; as many
are drawn and masked as in ViT-S, and images of 500 x 400 are decoded and packed beside them.
parts: each part of making a batch's views, in one thread; of this commit and of the one in `--before`.
loop: `train` itself. A thread makes the views of the next batch, as for a GPU, and the model sleeps for as long as a
GPU would compute.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from torch import Tensor

from dinov2_toolkit import console
from dinov2_toolkit.benchmarks.embedding import make_images
from dinov2_toolkit.benchmarks.measured import made_folder, table, write_page
from dinov2_toolkit.store.manifest import Provenance
from dinov2_toolkit.train import pretrain
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.data import multicrop
from dinov2_toolkit.train.data.images import Batch, ImageSet, image_set, read_batches
from dinov2_toolkit.train.engine.build import build_model
from dinov2_toolkit.train.objective.micro_batch import MicroBatch, whole_step
from dinov2_toolkit.train.run import Run

CPU = torch.device("cpu")
OWN, NUM_RANKS = 64, 64  # images of a rank, and ranks: a batch of 4,096
NARROW = (
    "embed_dim=32",
    "num_heads=2",
    "num_prototypes=16",
    "ibot_num_prototypes=16",
    "hidden_dim=16",
    "compile=false",
)
SMALL = ("patch_size=1", "global_crop_size_px=14", "local_crop_size_px=6")  # as many patches as ViT-S sees
SIDE_PX = 448  # of decoded images, at most
IMAGES_PER_S = 1500  # chosen: of the GPU that the model stands for, which sleeps for as long
PARTS = {
    "batch": "a batch of decoded images, ready to be copied",
    "crops": "draws and operations of all crops",
    "masks": "masks",
    "rank crops": "draws of one rank's 64 images of 4,096",
    "rank masks": "masks of one rank's 64 images of 4,096",
}
LEFT = {
    "everything": "everything",
    "views": "of that: crops and masks, taken from the thread that made them",
    "update": "of that: clipping, AdamW and the teacher's average",
}

code: Any = multicrop  # of this commit or of an earlier one


def settings(batch_size: int, steps: int) -> TrainConfig:
    """Return the recipe, with a narrow model of as many weights and blocks, and small crops."""
    changes = [f"batch_size={batch_size}", f"steps={steps}", "num_workers=2", "cache_mib=4096", "log_every=10"]
    return resolve(TrainConfig, "vits16-1gpu", assignments=[*NARROW, *SMALL, *changes])


def with_small_images(batch: Any) -> Any:
    """Return a batch of as many images of 14 x 14."""
    pixels = np.zeros((len(batch.samples), 14, 14, 3), np.uint8)
    if is_on_canvas(batch):
        return replace(batch, images=torch.from_numpy(pixels), sizes=np.full((len(pixels), 2), 14))
    from dinov2_toolkit.train.data.packed import packed

    return replace(batch, images=packed(list(pixels)))


def is_on_canvas(batch: Any) -> bool:
    """Return whether a batch is one of an earlier commit, whose masks are drawn by batch, too."""
    return hasattr(batch, "sizes")


def parts(config: TrainConfig, images: ImageSet, steps: int) -> dict[str, float]:
    """Return the milliseconds of one thread's time for each of PARTS: medians of the later two thirds of the steps."""
    size = int(str(config.batch_size))
    ranges = (range(step * size, (step + 1) * size) for step in range(steps))
    batches = read_batches(
        images, seed=0, batches=ranges, short_side_px=SIDE_PX, num_workers=2, cache_bytes=config.cache_mib << 20
    )
    kinds = [(name, view) for name, view in zip(("a", "b"), multicrop.view_settings(config), strict=True) if view]
    own, sizes = np.arange(0, OWN * NUM_RANKS, NUM_RANKS), np.tile([[400, 500]], (OWN, 1))
    taken: dict[str, list[float]] = {name: [] for name in PARTS}

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.thread_time()
        result = function(*arguments)
        taken[name].append(1000 * (time.thread_time() - start))
        return result

    def draws() -> None:
        for name, view in kinds:
            code.draw_crops(0, name, own, sizes, view)

    def crops(batch: Any) -> None:
        drawn = (batch, batch.images) if is_on_canvas(batch) else (batch.images, batch.samples)
        for name, view in kinds:
            code.make_crops(*drawn, 0, name, view)

    for step in range(steps):
        batch: Any = timed("batch", next, batches)
        timed("rank crops", draws)
        if is_on_canvas(batch):
            timed("masks", code.make_masks, step, size, config, 0, 1)
            timed("rank masks", code.make_masks, step, OWN * NUM_RANKS, config, 0, NUM_RANKS)
        else:
            timed("masks", code.make_masks, batch.samples, config)
            timed("rank masks", code.make_masks, own, config)
        timed("crops", crops, with_small_images(batch))
    return {name: statistics.median(values[steps // 3 :]) for name, values in taken.items()}


class _OverError(Exception):
    """As many steps as wanted are done."""


def loop(config: TrainConfig, images: ImageSet, folder: Path, steps: int) -> dict[str, list[float]]:
    """Return what a step takes of the main thread beyond the model, in milliseconds: of its CPU time, and by the clock.

    Medians over the later two thirds of the steps, for the views, the update of the weights, and everything together.
    """
    from dinov2_toolkit.train.data.loader import made_ahead
    from dinov2_toolkit.train.objective.masks import placed_masks

    model: Any = build_model(config)
    accelerator: Any = Accelerator(cpu=True)
    loops: Any = pretrain
    weights = list(model.student.parameters())
    spent = {name: np.zeros(2) for name in ("model", "views", "update")}
    marks: list[list[np.ndarray]] = []  # at the start of each step: now, and what was spent so far

    def now() -> np.ndarray:
        return np.array([time.thread_time(), time.monotonic()])

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = now()
            try:
                return function(*arguments, **named)
            finally:
                spent[name] = spent[name] + now() - start

        return run

    def forward(batch: MicroBatch) -> dict[str, Tensor]:
        time.sleep(sum(len(crops) * crops.shape[-1] ** 2 for crops, _ in batch.crops) / pixels / IMAGES_PER_S)
        total = torch.stack([weight.sum() for weight in weights]).sum()
        return {"total": total, "student_cls_tokens": torch.randn(batch.num_images, 384)}

    def teacher_targets(global_crops: Tensor, local_crops: Tensor, masks: Any, **_: float) -> MicroBatch:
        placed = placed_masks(masks, CPU, model.padding)
        probs = torch.full((len(masks), 16), 1 / 16)
        return whole_step(global_crops, local_crops, placed, probs, probs.new_zeros(len(placed.patches), 16))

    def apply_rates(*arguments: Any) -> None:
        marks.append([now(), *spent.values()])
        if len(marks) > steps:
            raise _OverError
        rates(*arguments)

    def load_views(batches: Any, config: TrainConfig, _: torch.device) -> Generator[multicrop.Views, None, None]:
        def make(batch: Batch) -> multicrop.Views:
            return multicrop.make_views(with_small_images(batch), config, CPU)

        ahead = made_ahead(batches, make, lambda _: lambda: None)
        take = counted("views", lambda: next(ahead))
        while True:
            yield take()

    sides = [(2, config.global_crop_size_px), (config.num_local_crops, config.local_crop_size_px)]
    pixels = sum(views * side**2 for views, side in sides)  # of the crops of an image
    rates, model.forward, model.teacher_targets = (
        loops.apply_rates,
        counted("model", forward),
        teacher_targets,
    )
    accelerator.backward = counted("model", accelerator.backward)
    replaced: dict[str, Any] = {
        "apply_rates": apply_rates,
        "load_views": load_views,
        "decoded_side_px": lambda _: SIDE_PX,
    }
    for name in ("clip_gradients", "step_unless", "update_teacher"):
        replaced[name] = counted("update", getattr(pretrain, name))
    run = Run(folder, config, Provenance("run", "benchmark", {}), images, None)
    with patch.multiple(pretrain, **replaced), suppress(_OverError):
        pretrain.train(model, run, accelerator)
    taken = 1000 * np.diff(np.array(marks), axis=0)[steps // 3 :]  # (steps, all and parts, CPU and clock)
    everything = taken[:, 0] - taken[:, 1]
    medians = {"everything": everything, "views": taken[:, 2], "update": taken[:, 3]}
    return {name: np.median(values, axis=0).tolist() for name, values in medians.items()}


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where the images and the run are kept")
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--batch", type=int, default=256, help="default 256")
    parser.add_argument("--steps", type=int, default=30, help="default 30")
    parser.add_argument("--parts", action="store_true", help="print the parts as JSON, and end")
    args = parser.parse_args()
    console.set_verbosity(quiet=True, verbose=0)
    files = args.folder / "images"
    if not files.exists():
        make_images(files, args.batch)
    images = image_set(pa.table({"uri": sorted(map(str, files.iterdir()))}))
    config = settings(args.batch, args.steps + 1)
    if args.parts:
        print(json.dumps(parts(config, images, args.steps)))
        return
    found = {"after": parts(config, images, args.steps)}
    if args.before is not None:
        environment = {**os.environ, "PYTHONPATH": str(args.before.resolve() / ".types")}
        words = [sys.executable, __file__, *sys.argv[1:], "--parts"]
        printed = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
        found = {"before": json.loads(printed), **found}
    left = loop(config, images, args.folder / "run", args.steps)
    rows = [[PARTS[name], *(values[name] for values in found.values())] for name in PARTS]
    body = f"""Milliseconds a step of {args.batch} images, 2 global and 8 local crops of each. The parts, in one thread:

{table(["", *found], rows)}

Before, the main thread did all of them. Now other threads do, a batch ahead. What is left for the main thread in the
loop of `train`, beyond the model, whose narrow weights are as many as ViT-S has, while those threads make the next
batch on the same cores:

{table(["", "its CPU time", "by the clock"], [[LEFT[name], *values] for name, values in left.items()])}"""
    print(body)
    write_page("host_overhead", "What the host does in a step beside the model", body)


if __name__ == "__main__":
    main()
