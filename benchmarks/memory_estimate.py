"""Compare the memory that `dinov2 train pretrain --dry-run` estimates with the run's, on a CPU.

    python benchmarks/memory_estimate.py

The settings differ in width, resolution, heads, stochastic depth, activation checkpointing and micro-batches. Fifty
steps of each, because tensors of changing sizes fragment the heap from step to step.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_toolkit.benchmarks.measured import assignments, write_result
from dinov2_toolkit.train.monitor.metrics import read_metrics

LARGER = {"patch_size": 8, "global_crop_size_px": 64, "local_crop_size_px": 32, "num_prototypes": 4096}
SETTINGS: dict[str, dict[str, object]] = {
    "tiny recipe, batch 64": {},
    "ViT-S, 6 blocks, 64 px, batch 32, drop path 0.2": {
        **LARGER,
        "arch": "vit_small",
        "depth": 6,
        "batch_size": 32,
        "drop_path": 0.2,
    },
    "ViT-B, 4 blocks, 64 px, batch 16, activation_checkpointing=selective": {
        **LARGER,
        "arch": "vit_base",
        "depth": 4,
        "batch_size": 16,
        "activation_checkpointing": "selective",
    },
    "ViT-S, 8 blocks, 64 px, batch 64, sequential views, micro-batch 32": {
        **LARGER,
        "arch": "vit_small",
        "depth": 8,
        "batch_size": 64,
        "sequential_views": "true",
        "micro_batch_size": 32,
    },
}


def main() -> None:
    """Measure all settings and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        (folder / "images").mkdir()
        for number in range(64):
            pixels = generator.integers(0, 256, (128, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        _dinov2(folder, "curate", "embed", "images", "-o", "images.parquet", "--model", "pixels")
        for number, (title, settings) in enumerate(SETTINGS.items()):
            given = assignments({"steps": args.steps, "log_every": 1, **settings})
            command = ["train", "pretrain", "images.parquet", "-o", f"run-{number}", "--recipe", "tiny", *given]
            stderr = _dinov2(folder, *command, "--dry-run")
            found = re.search(r"about ([\d,]+) MiB", stderr)
            assert found is not None, stderr
            estimated = int(found[1].replace(",", ""))
            _dinov2(folder, *command)
            measured = read_metrics(folder / f"run-{number}")[-1]["peak_memory_mib"]
            rows.append((title, f"{estimated:,}", f"{measured:,.0f}", f"{estimated / measured - 1:+.0%}"))
    header = ("settings", "estimated MiB", "measured MiB", "difference")
    notes = "The factor of the allocator (1.2) in the formula was fitted to these settings."
    write_result("memory_estimate", "Estimated and measured memory", header, rows, notes)


def _dinov2(folder: Path, *arguments: str) -> str:
    """Run a command in the folder and return its stderr."""
    command = [sys.executable, "-m", "dinov2_toolkit", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr


if __name__ == "__main__":
    main()
