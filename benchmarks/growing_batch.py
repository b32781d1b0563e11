"""A batch that grows while the learning rate is held, against half a cosine of the rate, at equal images.

    python benchmarks/growing_batch.py --folder out/growing

The recipe `tiny` on the example pool of 12,000 images of clothes, three seeds an arm, two commands of one thread at a
time. Scored by k-NN and a linear probe on 1,000 + 2,000 official test images, which nothing was trained on. A folder
that is given again goes on where it stopped.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dinov2_toolkit.benchmarks.measured import K, dinov2, probed, write_result
from dinov2_toolkit.train.engine.schedules import batch_sizes

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
IMAGES = 32_000
WARMUP_STEPS = 50  # of the first batch, in every arm
METHODS = ("knn", "linear")
SEEDS = range(3)

# name: batch (as in a recipe), whether the rate is held after the warm-up
ARMS: dict[str, tuple[int | list[list[int]], bool]] = {
    "cosine": (64, False),
    "held": (64, True),
    "grown": ([[0, 64], [12_800, 128], [21_760, 256]], True),
}
WORDS = {
    "cosine": "batch 64, half a cosine of the rate (the recipe)",
    "held": "batch 64, rate held",
    "grown": "batch 64, 128, 256, rate held",
}


def num_steps(arm: str) -> int:
    """Return after how many steps an arm has seen IMAGES images."""
    sizes = batch_sizes(ARMS[arm][0])
    return next(step for step in range(IMAGES) if sizes.images_until(step) >= IMAGES)


def train(folder: Path, arm: str, seed: int) -> None:
    """Train one run, unless it is there, and keep its seconds."""
    run = folder / f"{arm}-{seed}"
    if (run / "seconds.json").exists():
        return
    batch, is_held = ARMS[arm]
    settings = {
        "steps": num_steps(arm),
        "warmup_steps": WARMUP_STEPS,
        "batch_size": json.dumps(batch),
        "hold_lr": str(is_held).lower(),
    }
    assigned = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    start = time.monotonic()
    pool, recipe = str(DATA / "fashion_pool.parquet"), ["--recipe", "tiny", *assigned, "--seed", str(seed)]
    dinov2(folder, "train", "pretrain", pool, "-o", run.name, *recipe, "--resume", "-q", threads=1)
    (run / "seconds.json").write_text(json.dumps(time.monotonic() - start))
    print(f"{run.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def main() -> None:
    """Train all arms, score them, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where runs are kept")
    folder: Path = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(arm, seed) for seed in SEEDS for arm in ARMS]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: train(folder, *run), runs))
    sets = DATA / "fashion_probe_train.parquet", DATA / "fashion_probe_test.parquet"
    scores = probed(folder, sets, [f"{arm}-{seed}" for arm, seed in runs], METHODS)
    rows = []
    for arm in ARMS:
        names = [f"{arm}-{seed}" for seed in SEEDS]
        found = {method: [100 * scores[name, method]["value"] for name in names] for method in METHODS}
        seconds = [json.loads((folder / name / "seconds.json").read_text()) for name in names]
        rows.append(
            (
                WORDS[arm],
                num_steps(arm),
                *(f"{score:.1f}" for score in found["knn"]),
                f"{statistics.mean(found['knn']):.1f}",
                f"{statistics.mean(found['linear']):.1f}",
                f"{statistics.mean(seconds):.0f}",
            )
        )
    header = ("", "steps", *(f"k-NN, seed {seed}" for seed in SEEDS), "k-NN, mean", "linear, mean", "seconds")
    notes = (
        f"{IMAGES:,} images in every arm, {WARMUP_STEPS} steps of warm-up. Top-1 in percent, k = {K}, class tokens;"
        " a single score is known to about 2 points. Rate: 0.004 sqrt(64 / 1,024) at its peak."
    )
    write_result("growing_batch", "A batch that grows, and a learning rate that falls", header, rows, notes)


if __name__ == "__main__":
    main()
