"""Runs that are made to collapse are told from one that is not, within 200 steps."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.train.config import TrainConfig, resolve
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.pretrain import pretrain

SETTINGS = [
    "arch=vit_tiny",
    "depth=1",
    "embed_dim=64",
    "num_heads=1",
    "layer_scale=1.0",
    "steps=120",
    "batch_size=8",
    "checkpoint_every=1000",
    "patch_size=4",
    "num_prototypes=64",
    "hidden_dim=32",
    "bottleneck_dim=16",
    "global_crop_size_px=12",
    "local_crop_size_px=8",
    "num_local_crops=0",
    "drop_path=0",
    "jitter=0",
    "grayscale=0",
    "mixed_precision=no",
    "num_workers=0",
    "warmup_steps=5",
    "freeze_last_layer_steps=0",
]


def warnings_of(folder: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> list[str]:
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(generator.integers(0, 256, (14, 14, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    uris = [str(folder / f"{number}.png") for number in range(40)]
    pq.write_table(pa.table({"uri": uris}), folder / "images.parquet")
    config = resolve(TrainConfig, assignments=[*SETTINGS, *changes])
    pretrain(folder / "images.parquet", str(folder / "run"), config, Options())
    assert len(read_metrics(folder / "run")) == 12
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


@pytest.mark.slow
def test_a_healthy_run_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings_of(tmp_path, capsys, "centering=sinkhorn_knopp", "teacher_temp=[0.02, 0.02]") == []


def test_a_teacher_too_hot_to_say_anything_is_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (said,) = warnings_of(tmp_path, capsys, "teacher_temp=[2.0, 2.0]")
    assert "step 110: the teacher's outputs are uniform" in said and "lower teacher_temp" in said


def test_a_teacher_that_gives_all_images_one_prototype_is_recognised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["koleo_weight=0", "teacher_temp=[0.001, 0.001]", "momentum=[0.9, 0.9]", "base_lr=0.05"]
    (said,) = warnings_of(tmp_path, capsys, *changes)
    assert "step 110: the teacher gives all images the same prototype (1.0 in use)" in said
    assert "set centering to sinkhorn_knopp, lower base_lr, or raise momentum" in said
