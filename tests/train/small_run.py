"""A training run that takes a second on one core: its settings and its images."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.monitor.metrics import read_metrics

SETTINGS = (
    "arch=vit_tiny",
    "depth=2",
    "steps=6",
    "batch_size=8",
    "checkpoint_every=2",
    "keep_checkpoints=9",
    "log_every=1",
    "patch_size=4",
    "num_prototypes=32",
    "hidden_dim=16",
    "bottleneck_dim=8",
    "global_crop_size_px=12",
    "local_crop_size_px=8",
    "num_local_crops=2",
    "drop_path=0.3",
    "mixed_precision=no",
    "num_workers=0",
    "warmup_steps=2",
    "teacher_temp_warmup_steps=3",
    "freeze_last_layer_steps=1",
)
CLOCK = ("images_per_s", "tflop_per_s", "data_wait", "peak_memory_mib")  # metrics that differ between equal runs


def settings(*changes: str) -> TrainConfig:
    """The settings above with changes like steps=9."""
    return resolve(TrainConfig, assignments=[*SETTINGS, *changes])


def noise_images(folder: Path, num_images: int = 20, heights: tuple[int, ...] = (12, 13, 14, 15, 16)) -> Path:
    """A manifest of noise images of several sizes in a folder."""
    generator = np.random.default_rng(0)
    uris = [str(folder / f"{number}.png") for number in range(num_images)]
    for number, uri in enumerate(uris):
        Image.fromarray(generator.integers(0, 256, (heights[number % len(heights)], 14, 3), dtype=np.uint8)).save(uri)
    pq.write_table(pa.table({"uri": uris}), folder / "images.parquet")
    return folder / "images.parquet"


def repeatable_metrics(run_folder: Path) -> list[dict[str, float]]:
    """The metrics without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in read_metrics(run_folder)]
