"""Does a student half as wide learn more from a teacher than from the images alone, in as many steps?

    python benchmarks/distill.py --steps 400 --output benchmarks/results/distill.md

For each seed: a teacher (192 numbers an image) is pretrained by the recipe `tiny` on the example pool of 12,000 images
of clothes; then a student of 96 is trained for as many steps three times: pretrained from nothing, distilled from the
teacher (`--objective heads`), and distilled from the teacher after its heads were taken away (`--objective features`).
Each is scored by k-NN (k = 20) on class tokens of 1,000 + 2,000 official test images, which nothing was trained on.
All by the commands, as a user runs them. A folder that is given again goes on where it stopped. Prints a table;
--output writes it as Markdown. Ends with one JSON line.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from dinov2_toolkit.models.weights import load_model, save_model

DATA = Path(__file__).resolve().parents[1] / "examples" / "data"
HALF = ["--set", "embed_dim=96"]
K = 20


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag, default in {"steps": 400, "seeds": 3, "threads": 2}.items():
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--folder", type=Path, help="where runs are kept; default a temporary one")
    parser.add_argument("--output", type=Path, help="Markdown file")
    return parser.parse_args()


def dinov2(folder: Path, threads: int, *arguments: str) -> tuple[str, float]:
    """Run a command in the folder; return its stdout and its seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DINOV2_CATALOG": str(folder / "catalog.duckdb")}
    start = time.perf_counter()
    command = [sys.executable, "-m", "dinov2_toolkit", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - start


def strip_heads(run: Path, folder: Path) -> None:
    """Write a run's backbone alone, as released weights are."""
    model = load_model(run)
    save_model(
        folder,
        backbone=model.backbone,
        heads={},
        image_size=model.image_size,
        crop_ratio=model.crop_ratio,
        mean=model.mean,
        std=model.std,
    )


def train(folder: Path, threads: int, steps: int, seed: int) -> dict[str, float]:
    """Train teacher and students of a seed; return the seconds each took, a moment for one that is there already."""
    pool = str(DATA / "fashion_pool.parquet")
    shared = ["--recipe", "tiny", "--set", f"steps={steps}", "--seed", str(seed), "--resume"]
    teacher, stripped = f"teacher-{seed}", f"stripped-{seed}"
    seconds = {}

    def run(name: str, *arguments: str) -> None:
        _, seconds[name] = dinov2(folder, threads, "train", *arguments, "-o", f"{name}-{seed}", *shared)

    run("teacher", "pretrain", pool)
    if not (folder / stripped / "model.json").exists():
        strip_heads(folder / teacher, folder / stripped)
    run("scratch", "pretrain", pool, *HALF)
    run("heads", "distill", pool, "--teacher", teacher, "--objective", "heads", *HALF)
    run("features", "distill", pool, "--teacher", stripped, "--objective", "features", *HALF)
    return seconds


def accuracies(folder: Path, threads: int, models: list[str]) -> list[float]:
    """Return the k-NN accuracy of each model in percent."""
    sets = ["--train", str(DATA / "fashion_probe_train.parquet"), "--test", str(DATA / "fashion_probe_test.parquet")]
    named = [argument for model in models for argument in ("--model", model)]
    printed, _ = dinov2(folder, threads, "evaluate", "probe", *sets, "--method", "knn", *named, "--json", "--force")
    rows = [row for row in json.loads(printed)["rows"] if row["metric"] == "top1" and row["parameters"]["k"] == K]
    found = {row["model"]: 100 * row["value"] for row in rows}
    return [found[model] for model in models]


def main() -> None:
    """Train all seeds, score them, print and write the table."""
    args = parse_arguments()
    kinds = {
        "teacher": "teacher, 192 wide, pretrained",
        "scratch": "student, 96 wide, pretrained from nothing",
        "heads": "student, 96 wide, `distill --objective heads`",
        "features": "student, 96 wide, `distill --objective features`, teacher without heads",
    }
    scores: dict[str, list[float]] = {kind: [] for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(args.seeds):
            for kind, taken in train(folder, args.threads, args.steps, seed).items():
                seconds[kind].append(taken)
            for kind, score in zip(
                kinds, accuracies(folder, args.threads, [f"{kind}-{seed}" for kind in kinds]), strict=True
            ):
                scores[kind].append(score)
        (untrained,) = accuracies(folder, args.threads, ["random:scratch-0"])
    load = os.getloadavg()[0]
    means = {kind: statistics.mean(values) for kind, values in scores.items()}
    lines = [
        "# A student half as wide: distilled, or pretrained for as many steps",
        "",
        f"`python benchmarks/distill.py --steps {args.steps} --seeds {args.seeds}`, {date.today()},"
        f" {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads,"
        f" torch {torch.__version__}, load {load:.1f} at the end.",
        "",
        f"Recipe `tiny` (3 blocks, 28 px, batch 64), {args.steps} steps for teacher and students alike, on the 12,000"
        " long-tailed images of `examples/data/fashion_pool.parquet`; every seed has a teacher of its own. Score:"
        f" k-NN, k = {K}, class tokens, 1,000 training and 2,000 test images from the official test set, in percent.",
        "",
        f"| model | {' | '.join(f'seed {seed}' for seed in range(args.seeds))} | mean |",
        f"|---|{'---|' * args.seeds}---|",
        f"| student, untrained (seed 0) | {untrained:.1f} | {'| ' * args.seeds}|",
    ]
    lines += [
        f"| {kinds[kind]} | {' | '.join(f'{score:.1f}' for score in scores[kind])} | {means[kind]:.1f} |"
        for kind in kinds
    ]
    gains = {kind: means[kind] - means["scratch"] for kind in ("heads", "features")}
    lines += ["", *(f"`{kind}` over pretraining from nothing: {gain:+.1f} points." for kind, gain in gains.items())]
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")
    rounded = {kind: [round(value) for value in values] for kind, values in seconds.items()}
    print(json.dumps({"steps": args.steps, "scores": scores, "means": means, "gains": gains, "seconds": rounded}))


if __name__ == "__main__":
    main()
