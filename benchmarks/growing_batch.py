"""Compare a growing batch at a constant learning rate with the cosine schedule, at equal numbers of images.

    python benchmarks/growing_batch.py --folder out/growing

The recipe `tiny` on the example pool of 12,000 images of clothes, three seeds for each schedule, two commands of one
thread at a time. Scored by k-NN and a linear probe on 1,000 + 2,000 official test images, on which nothing was trained.
With the same folder an interrupted run resumes.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import (
    FASHION_POOL,
    FASHION_PROBE,
    K,
    assignments,
    dinov2,
    made_folder,
    probed,
    write_result,
)
from dinov2_toolkit.train.engine.schedules import batch_sizes

IMAGES = 32_000
WARMUP_STEPS = 50  # of the first batch size, in every schedule
METHODS = ("knn", "linear")
SEEDS = range(3)

# name: batch size (as in a recipe), whether the rate is constant after the warm-up
SCHEDULES: dict[str, tuple[int | list[list[int]], bool]] = {
    "cosine": (64, False),
    "held": (64, True),
    "grown": ([[0, 64], [12_800, 128], [21_760, 256]], True),
}
DESCRIPTIONS = {
    "cosine": "batch 64, cosine schedule (the recipe)",
    "held": "batch 64, constant rate",
    "grown": "batch 64, 128, 256, constant rate",
}


def num_steps(schedule: str) -> int:
    """Return after how many steps a schedule has seen IMAGES images."""
    sizes = batch_sizes(SCHEDULES[schedule][0])
    return next(step for step in range(IMAGES) if sizes.images_until(step) >= IMAGES)


def train(folder: Path, schedule: str, seed: int) -> None:
    """Train one run, unless it is done, and record its seconds."""
    run = folder / f"{schedule}-{seed}"
    if (run / "seconds.json").exists():
        return
    batch, is_held = SCHEDULES[schedule]
    settings = {
        "steps": num_steps(schedule),
        "warmup_steps": WARMUP_STEPS,
        "batch_size": json.dumps(batch),
        "hold_lr": str(is_held).lower(),
    }
    start = time.monotonic()
    pool, recipe = str(FASHION_POOL), ["--recipe", "tiny", *assignments(settings), "--seed", str(seed)]
    dinov2(folder, "train", "pretrain", pool, "-o", run.name, *recipe, "--resume", "-q", threads=1)
    (run / "seconds.json").write_text(json.dumps(time.monotonic() - start))
    print(f"{run.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    """Train with all schedules, score the runs, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=made_folder, required=True, help="where runs are kept")
    folder: Path = parser.parse_args().folder
    runs = [(schedule, seed) for seed in SEEDS for schedule in SCHEDULES]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: train(folder, *run), runs))
    scores = probed(folder, FASHION_PROBE, [f"{schedule}-{seed}" for schedule, seed in runs], METHODS)
    rows = []
    for schedule in SCHEDULES:
        names = [f"{schedule}-{seed}" for seed in SEEDS]
        found = {method: [100 * scores[name, method]["value"] for name in names] for method in METHODS}
        seconds = [json.loads((folder / name / "seconds.json").read_text()) for name in names]
        rows.append(
            (
                DESCRIPTIONS[schedule],
                num_steps(schedule),
                *(f"{score:.1f}" for score in found["knn"]),
                f"{statistics.mean(found['knn']):.1f}",
                f"{statistics.mean(found['linear']):.1f}",
                f"{statistics.mean(seconds):.0f}",
            )
        )
    header = ("", "steps", *(f"k-NN, seed {seed}" for seed in SEEDS), "k-NN, mean", "linear, mean", "seconds")
    notes = (
        f"Every row: {IMAGES:,} images, {WARMUP_STEPS} steps of warm-up. Top-1 in percent, k = {K}, class tokens;"
        " a single score is known to about 2 points. Rate: 0.004 sqrt(64 / 1,024) at its peak."
    )
    write_result("growing_batch", "A growing batch, and a falling learning rate", header, rows, notes)


if __name__ == "__main__":
    main()
