"""Distillation by features: one step against its sums written out, and whole runs from a teacher without heads."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_heads
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.train.config import resolve
from dinov2_toolkit.train.distill import DistillConfig, distill
from dinov2_toolkit.train.engine.accumulate import microbatch_backward, sum_outputs
from dinov2_toolkit.train.objective.feature_distill_model import FeatureDistillModel, standardise
from dinov2_toolkit.train.objective.frozen_teacher import FrozenTeacher
from dinov2_toolkit.train.objective.micro_batch import split_microbatches
from dinov2_toolkit.train.objective.networks import backbone_of
from dinov2_toolkit.train.objective.ssl_model import LossSettings

NUM_IMAGES, NUM_LOCAL = 3, 2


def backbone(embed_dim: int) -> VisionTransformer:
    return VisionTransformer(patch_size=4, embed_dim=embed_dim, depth=2, num_heads=2, img_size=12, layer_scale=1.0)


def model_and_crops(koleo_weight: float = 0.1) -> tuple[FeatureDistillModel, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = FeatureDistillModel(
        backbone(16), FrozenTeacher({"backbone": backbone(24)}), LossSettings(koleo_weight=koleo_weight)
    )
    global_crops = torch.randn(2 * NUM_IMAGES, 3, 12, 12)
    local_crops = torch.randn(NUM_LOCAL * NUM_IMAGES, 3, 8, 8)
    return model.train(), global_crops, local_crops, torch.rand(2 * NUM_IMAGES, 9) < 0.5


def slow_standardised(rows: list[Tensor]) -> list[Tensor]:
    mean = sum(rows, torch.zeros(24)) / len(rows)
    variance = sum(((row - mean) ** 2 for row in rows), torch.zeros(24)) / len(rows)
    return [(row - mean) / variance.sqrt() for row in rows]


def slow_smooth_l1(first: Tensor, second: Tensor) -> float:
    distances = [abs(float(a) - float(b)) for a, b in zip(first.flatten(), second.flatten(), strict=True)]
    return sum(d * d / 2 if d < 1 else d - 0.5 for d in distances) / len(distances)


def test_a_step_is_the_sum_over_all_tokens_one_by_one() -> None:
    model, global_crops, local_crops, masks = model_and_crops()
    losses = model(model.teacher_targets(global_crops, local_crops, masks, teacher_temp=0.05))

    student, teacher = backbone_of(model.student), model.frozen.backbone
    project_cls, project_patch = model.student["cls_projector"], model.student["patch_projector"]
    with torch.no_grad():
        ours = [student.forward_features(crop[None]) for crop in global_crops]
        theirs = [teacher.forward_features(crop[None]) for crop in global_crops]
        local = [student.forward_features(crop[None]).cls_token[0] for crop in local_crops]
        cls_targets = slow_standardised([features.cls_token[0] for features in theirs])
        patch_targets = slow_standardised([patch for features in theirs for patch in features.patch_tokens[0]])
        own_cls = [features.cls_token[0] for features in ours]
        of_cls = [slow_smooth_l1(project_cls(c), t) for c, t in zip(own_cls, cls_targets, strict=True)]
        of_local = [
            slow_smooth_l1(
                project_cls(token), (cls_targets[row % NUM_IMAGES] + cls_targets[NUM_IMAGES + row % NUM_IMAGES]) / 2
            )
            for row, token in enumerate(local)
        ]
        of_patches = [
            slow_smooth_l1(project_patch(patch), target)
            for patch, target in zip(
                (patch for features in ours for patch in features.patch_tokens[0]), patch_targets, strict=True
            )
        ]
        koleo = 0.0
        for view in (own_cls[:NUM_IMAGES], own_cls[NUM_IMAGES:]):
            normed = [token / token.norm() for token in view]
            nearest = [min(float((a - b).norm()) for b in normed if b is not a) for a in normed]
            koleo -= float(np.mean(np.log(nearest)))

    expected = {
        "cls_global": float(np.mean(of_cls)),
        "cls_local": float(np.mean(of_local)),
        "patch": float(np.mean(of_patches)),
        "koleo": koleo,
    }
    assert len(of_patches) == 2 * NUM_IMAGES * 9
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5, abs=1e-5)
    total = expected["cls_global"] + expected["cls_local"] + expected["patch"] + 0.1 * koleo
    assert losses["total"].item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("by_view", "num_images"), [(True, 0), (True, 1), (False, 2)])
def test_micro_batches_add_up_to_the_step(by_view: bool, num_images: int) -> None:
    model, *crops_and_masks = model_and_crops(koleo_weight=0.0)
    step = model.teacher_targets(*crops_and_masks, teacher_temp=0.05)
    whole = model(step)
    pieces = sum_outputs(
        [model(part) for part in split_microbatches(step, sequential_views=by_view, num_images=num_images)]
    )
    for name in ("cls_global", "cls_local", "patch", "total"):
        torch.testing.assert_close(pieces[name], whole[name])
    at_once = microbatch_backward(model, step, Tensor.backward, seed=0)
    torch.testing.assert_close(at_once["total"], whole["total"].detach())


def test_a_channel_that_never_changes_becomes_zero() -> None:
    tokens = torch.tensor([[1.0, 7.0], [3.0, 7.0]])
    torch.testing.assert_close(standardise(tokens), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


def test_every_weight_of_the_student_learns_and_no_other() -> None:
    model, *crops_and_masks = model_and_crops()
    model(model.teacher_targets(*crops_and_masks, teacher_temp=0.05))["total"].backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.student.parameters())
    assert [name for name, weight in model.student.named_parameters() if not weight.requires_grad] == [
        "backbone.mask_token"
    ]
    assert all(weight.grad is None for part in (model.teacher, model.frozen) for weight in part.parameters())


SETTINGS = """objective=features embed_dim=12 num_heads=2 arch=vit_tiny depth=1 steps=4 batch_size=4 checkpoint_every=2
log_every=1 patch_size=4 global_crop_size_px=12 local_crop_size_px=8 num_local_crops=2 drop_path=0.0
mixed_precision=no num_workers=0 warmup_steps=1 freeze_last_layer_steps=0""".split()


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
    folder = tmp_path / "stripped"
    headless: dict[str, ProjectionHead] = {}
    save_model(folder, backbone=backbone(24), heads=headless, preprocess=Preprocess(12, 1.0, (0.5,) * 3, (0.5,) * 3))
    return str(folder)


def settings() -> DistillConfig:
    return resolve(DistillConfig, recipe=None, environment={}, flags={}, assignments=SETTINGS)


def test_a_run_leaves_a_backbone_without_projectors_and_only_figures_that_apply(manifest: Path, teacher: str) -> None:
    output = manifest.parent / "student"
    distill(manifest, str(output), settings(), Options(), teacher=teacher)
    assert load_backbone(output).embed_dim == 12
    assert load_heads(output) == {}
    assert all(name.startswith("backbone.") for name in load_file(output / "teacher.safetensors"))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"cls_global", "cls_local", "patch", "koleo", "total", "feature_std"} <= rows[0].keys()
    assert "rank_me" in rows[-1]  # and every 100 steps
    weighted = [value for name, value in rows[0].items() if name.endswith("_weighted")]
    assert len(weighted) == 4 and sum(weighted) == pytest.approx(rows[0]["total"], rel=1e-5)
    assert not [name for name in rows[0] if "entropy" in name or "perplexity" in name or "uniform" in name]
    roles = {source.role: source.path for source in catalog.inputs_of(catalog.find("student"))}
    assert roles == {"images": str(manifest), "teacher": teacher}


def test_stopped_and_resumed_equals_uninterrupted(manifest: Path, teacher: str) -> None:
    whole, resumed = manifest.parent / "whole", manifest.parent / "resumed"
    for output in (whole, resumed):
        distill(manifest, str(output), settings(), Options(), teacher=teacher)
    (resumed / "model.json").unlink()
    last = resumed / "checkpoints" / "step-0000004"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    distill(manifest, str(resumed), settings(), Options(), teacher=teacher, resume=True)
    first, second = (load_file(run / "teacher.safetensors") for run in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
