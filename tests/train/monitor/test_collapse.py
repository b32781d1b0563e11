"""Runs that are made to collapse give a warning within 200 steps, a healthy one does not."""

from pathlib import Path

import pytest
import torch

from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.small_run import noise_images, settings
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.pretrain import pretrain

CHANGES = (
    "depth=1",
    "embed_dim=64",
    "num_heads=1",
    "layer_scale=1.0",
    "steps=120",
    "checkpoint_every=1000",
    "log_every=10",
    "num_prototypes=64",
    "hidden_dim=32",
    "bottleneck_dim=16",
    "num_local_crops=0",
    "drop_path=0",
    "jitter=0",
    "grayscale=0",
    "warmup_steps=5",
    "freeze_last_layer_steps=0",
)


def warnings_of(folder: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> list[str]:
    torch.set_num_threads(1)
    pretrain(noise_images(folder, 40, heights=(14,)), str(folder / "run"), settings(*CHANGES, *changes), Options())
    assert len(read_metrics(folder / "run")) == 12
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


@pytest.mark.slow
def test_a_healthy_run_gives_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warnings_of(tmp_path, capsys, "centering=sinkhorn_knopp", "teacher_temp=[0.02, 0.02]") == []


def test_a_teacher_with_uniform_outputs_gives_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (said,) = warnings_of(tmp_path, capsys, "teacher_temp=[2.0, 2.0]")
    assert "step 110: the teacher's outputs are uniform" in said and "lower teacher_temp" in said


def test_a_teacher_that_gives_all_images_one_prototype_gives_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["koleo_weight=0", "teacher_temp=[0.001, 0.001]", "momentum=[0.9, 0.9]", "base_lr=0.05"]
    (said,) = warnings_of(tmp_path, capsys, *changes)
    assert "step 110: the teacher gives all images the same prototype (1.0 in use)" in said
    assert "set centering to sinkhorn_knopp, lower base_lr, or raise momentum" in said
