"""Several students from one pass of the teacher: each is what it would be alone, in a run folder of its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import Features, VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_heads
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.train.config import resolve
from dinov2_toolkit.train.distill import DistillConfig, distill, distill_config
from dinov2_toolkit.train.objective.frozen_teacher import FrozenTeacher
from dinov2_toolkit.train.objective.multi_student import student_figures

SETTINGS = """depth=1 steps=4 batch_size=4 checkpoint_every=2 log_every=1 patch_size=4 global_crop_size_px=12
local_crop_size_px=8 num_local_crops=1 drop_path=0.0 mixed_precision=no num_workers=0 warmup_steps=1
teacher_temp_warmup_steps=2 freeze_last_layer_steps=0""".split()
BOTH = "vit_small,vit_tiny"


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    uris = [str(tmp_path / f"{number}.png") for number in range(8)]
    for uri in uris:
        Image.fromarray(generator.integers(0, 256, (14, 14, 3), dtype=np.uint8)).save(uri)
    pq.write_table(pa.table({"uri": uris}), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    torch.manual_seed(0)
    vit = VisionTransformer(patch_size=4, embed_dim=24, depth=2, num_heads=2, img_size=12, layer_scale=1.0)
    heads = {"dino_head": ProjectionHead(24, 10, hidden_dim=16, bottleneck_dim=6)}
    save_model(tmp_path / "large", backbone=vit, heads=heads, preprocess=Preprocess(12, 1.0, (0.5,) * 3, (0.5,) * 3))
    return str(tmp_path / "large")


def settings(arch: str, objective: str = "heads") -> DistillConfig:
    assignments = [*SETTINGS, f"arch={arch}", f"objective={objective}"]
    return resolve(DistillConfig, recipe=None, environment={}, flags={}, assignments=assignments)


@pytest.mark.parametrize("objective", ["heads", "features"])
def test_each_student_is_bit_for_bit_what_it_is_alone(objective: str, manifest: Path, teacher: str) -> None:
    together, alone = manifest.parent / "together", manifest.parent / "alone"
    distill(manifest, str(together), settings(BOTH, objective), Options(), teacher=teacher)
    distill(manifest, str(alone), settings("vit_tiny", objective), Options(), teacher=teacher)
    ours, its = (load_file(folder / "teacher.safetensors") for folder in (together / "vit_tiny", alone))
    assert ours.keys() == its.keys()
    assert all(torch.equal(ours[name], its[name]) for name in its)
    assert load_backbone(together / "vit_small").embed_dim == 384
    assert bool(load_heads(together / "vit_small")) == (objective == "heads")
    shown, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (together / "vit_tiny", alone)
    )
    for row, alike in zip(shown, expected, strict=True):
        assert row.keys() == alike.keys()
        measured = {"images_per_s", "tflop_per_s", "data_wait", "peak_memory_mib"}
        assert {name: row[name] for name in alike.keys() - measured if row[name] != alike[name]} == {}


def test_the_teacher_runs_once_a_step(manifest: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    answer = FrozenTeacher.forward

    def counted(frozen: FrozenTeacher, crops: Tensor, patch_size: int) -> Features:
        calls.append(len(crops))
        return answer(frozen, crops, patch_size)

    monkeypatch.setattr(FrozenTeacher, "forward", counted)
    distill(manifest, str(manifest.parent / "together"), settings(BOTH), Options(), teacher=teacher)
    assert calls == [8] * 4  # both global crops of 4 images, in each of 4 steps


def test_each_students_folder_is_a_run_and_the_outer_folder_names_them(manifest: Path, teacher: str) -> None:
    together = manifest.parent / "together"
    distill(manifest, str(together), settings(BOTH), Options(), teacher=teacher)
    found = {path.name for path in (together / "vit_tiny").iterdir()}
    assert found >= {"config.toml", "provenance.json", "metrics.jsonl", "metrics.parquet", "model.json"}
    roles = {source.role: source.path for source in catalog.inputs_of(catalog.find(str(together / "vit_tiny")))}
    assert roles == {"images": str(manifest), "teacher": teacher}
    with pytest.raises(ToolkitError, match="holds several models; name one of .*vit_small, .*vit_tiny"):
        load_backbone(together)
    # The folder's own settings, run again into it, are the same work.
    own = distill_config(
        str(together / "vit_tiny"), teacher, [], str(together / "vit_tiny" / "config.toml"), [], resume=False, seed=None
    )
    before = (together / "vit_tiny" / "metrics.jsonl").read_bytes()
    distill(manifest, str(together / "vit_tiny"), own, Options(), teacher=teacher)
    assert (together / "vit_tiny" / "metrics.jsonl").read_bytes() == before
    distill(manifest, str(together), settings(BOTH), Options(), teacher=teacher)  # up to date


def test_all_students_resume_from_one_checkpoint(manifest: Path, teacher: str) -> None:
    whole, resumed = manifest.parent / "whole", manifest.parent / "resumed"
    for output in (whole, resumed):
        distill(manifest, str(output), settings(BOTH), Options(), teacher=teacher)
    (resumed / "model.json").unlink()
    for folder in ("checkpoints/step-0000004", "vit_small", "vit_tiny"):
        shutil.rmtree(resumed / folder)
    assert load_backbone(resumed / "checkpoints" / "step-0000002" / "vit_tiny").embed_dim == 192
    distill(manifest, str(resumed), settings(BOTH), Options(), teacher=teacher, resume=True)
    for student in ("vit_small", "vit_tiny"):
        first, second = (load_file(run / student / "teacher.safetensors") for run in (whole, resumed))
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_student_named_twice_is_an_error() -> None:
    with pytest.raises(ToolkitError, match="vit_tiny,vit_tiny names a student twice"):
        settings("vit_tiny,vit_tiny")


def test_figures_of_one_student_leave_out_the_others_and_the_sum() -> None:
    figures = {
        "step": 3.0,
        "total": 9.0,
        "vit_small_total": 4.0,
        "vit_tiny_total": 5.0,
        "grad_norm_vit_tiny_backbone": 1.0,
    }
    assert student_figures(figures, "vit_tiny", ["vit_small", "vit_tiny"]) == {
        "step": 3.0,
        "total": 5.0,
        "grad_norm_backbone": 1.0,
    }
