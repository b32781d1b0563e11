"""Distillation: one step against the paper's sums written out, and whole runs."""

import copy
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
from dinov2_toolkit.models.export_hf import write_hugging_face
from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_heads, load_model
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.train.config import resolve
from dinov2_toolkit.train.distill import DistillConfig, build_distill_model, distill, distill_config
from dinov2_toolkit.train.objective.distill_model import DistillModel
from dinov2_toolkit.train.objective.frozen_teacher import FrozenTeacher
from dinov2_toolkit.train.objective.networks import update_teacher

SETTINGS = [
    "arch=vit_tiny",
    "depth=1",
    "steps=4",
    "batch_size=4",
    "checkpoint_every=2",
    "log_every=1",
    "patch_size=4",
    "global_crop_size_px=12",
    "local_crop_size_px=8",
    "num_local_crops=2",
    "drop_path=0.0",
    "mixed_precision=no",
    "num_workers=0",
    "warmup_steps=1",
    "teacher_temp_warmup_steps=2",
    "freeze_last_layer_steps=0",
]


def backbone(embed_dim: int, patch_size: int = 4) -> VisionTransformer:
    return VisionTransformer(
        patch_size=patch_size, embed_dim=embed_dim, depth=2, num_heads=2, img_size=12, layer_scale=1.0
    )


def teacher(separate: bool) -> dict[str, torch.nn.Module]:
    heads: dict[str, torch.nn.Module] = {"dino_head": ProjectionHead(24, 10, hidden_dim=16, bottleneck_dim=6)}
    if separate:
        heads["ibot_head"] = ProjectionHead(24, 12, hidden_dim=16, bottleneck_dim=5)
    return {"backbone": backbone(24), **heads}


def slow_sinkhorn(logits: Tensor, temperature: float) -> Tensor:
    scores = (logits / temperature).exp().T
    for _ in range(3):
        scores = scores / scores.sum(1, keepdim=True) / scores.shape[0]
        scores = scores / scores.sum(0, keepdim=True) / scores.shape[1]
    return (scores * scores.shape[1]).T


def cross_entropy(student_logits: Tensor, probs: Tensor) -> Tensor:
    return -(probs * (student_logits / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("separate", [False, True])
def test_a_step_is_the_sum_over_all_pairs_and_all_patches(separate: bool) -> None:
    torch.manual_seed(0)
    frozen = teacher(separate)
    model = DistillModel(backbone(16), FrozenTeacher(frozen)).train()
    num_images, num_local = 3, 2
    global_crops, local_crops = torch.randn(2 * num_images, 3, 12, 12), torch.randn(num_local * num_images, 3, 8, 8)
    masks = torch.rand(2 * num_images, 9) < 0.5
    losses = model(model.teacher_targets(global_crops, local_crops, masks, teacher_temp=0.05))

    student, student_backbone = model.student, model.student["backbone"]
    assert isinstance(student_backbone, VisionTransformer)
    patch_head = "ibot_head" if separate else "dino_head"
    features = frozen["backbone"].forward_features(global_crops)  # type: ignore[operator]
    cls_probs = slow_sinkhorn(frozen["dino_head"](features.cls_token), 0.05)
    patch_probs = slow_sinkhorn(frozen[patch_head](features.patch_tokens.reshape(-1, 24)), 0.05)
    features = student_backbone.forward_features(global_crops)
    views = [student["dino_head"](part) for part in features.cls_token.chunk(2)]
    local_tokens = student_backbone.forward_features(local_crops).cls_token
    views += [student["dino_head"](part) for part in local_tokens.chunk(num_local)]
    pairs = [
        cross_entropy(view, probs).mean()
        for number, view in enumerate(views)
        for other, probs in enumerate(cls_probs.chunk(2))
        if number != other
    ]
    patches = student[patch_head](features.patch_tokens.reshape(-1, 16))
    koleo = torch.tensor(0.0)
    for part in features.cls_token.chunk(2):
        normed = part / part.norm(dim=1, keepdim=True)
        distances = torch.cdist(normed, normed) + 9 * torch.eye(num_images)
        koleo = koleo - distances.min(1).values.log().mean()
    expected = torch.stack(pairs).mean() + cross_entropy(patches, patch_probs).mean() + 0.1 * koleo

    assert len(pairs) == 2 + 2 * num_local
    torch.testing.assert_close(losses["total"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["ibot"], cross_entropy(patches, patch_probs).mean(), rtol=1e-5, atol=1e-5)


def test_only_the_student_learns_and_its_average_follows() -> None:
    torch.manual_seed(0)
    model = DistillModel(backbone(16), FrozenTeacher(teacher(False))).train()
    losses = model(
        model.teacher_targets(torch.randn(4, 3, 12, 12), None, torch.zeros(4, 9, dtype=torch.bool), teacher_temp=0.05)
    )
    losses["total"].backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.student.parameters())
    assert [name for name, weight in model.student.named_parameters() if not weight.requires_grad] == [
        "backbone.mask_token"
    ]
    assert all(weight.grad is None for part in (model.teacher, model.frozen) for weight in part.parameters())
    name = "backbone.norm.weight"
    before = model.teacher.get_parameter(name).clone()
    with torch.no_grad():
        model.student.get_parameter(name).add_(1.0)
    update_teacher(model.teacher, model.student, 0.75)
    torch.testing.assert_close(model.teacher.get_parameter(name), before + 0.25)


def test_a_teacher_of_another_patch_size_sees_the_crops_at_the_size_of_the_same_grid() -> None:
    torch.manual_seed(0)
    frozen = teacher(False)
    model = DistillModel(backbone(16, patch_size=6), FrozenTeacher(frozen)).train()
    crops = torch.randn(4, 3, 18, 18)  # 3 x 3 patches of 6 px for the student, so 12 px for the teacher's of 4 px
    step = model.teacher_targets(crops, None, torch.zeros(4, 9, dtype=torch.bool), teacher_temp=0.05)
    smaller = torch.nn.functional.interpolate(crops, size=(12, 12), mode="bicubic", antialias=True)
    with torch.no_grad():
        features = frozen["backbone"].forward_features(smaller)  # type: ignore[operator]
        logits = frozen["dino_head"](features.patch_tokens.reshape(-1, 24))
    torch.testing.assert_close(step.patch_targets, slow_sinkhorn(logits, 0.05), rtol=1e-4, atol=1e-6)
    assert torch.equal(step.global_crops, crops)
    assert model(step)["total"].isfinite()


def test_the_teacher_sees_pixels_normalised_by_its_own_numbers() -> None:
    pixels = torch.rand(2, 3, 12, 12)
    own_mean, own_std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    parts = teacher(False)
    frozen = FrozenTeacher(parts, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    theirs = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.25, 0.2]).view(3, 1, 1)
    with torch.no_grad():
        expected = parts["backbone"].forward_features(theirs).cls_token  # type: ignore[operator]
        found = frozen((pixels - own_mean) / own_std, 4).cls_token
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_kept_in_half_precision_has_bit_for_bit_the_features_under_autocast() -> None:
    torch.manual_seed(0)
    parts = teacher(True)
    crops, masks = torch.randn(6, 3, 12, 12), torch.zeros(6, 9, dtype=torch.bool)
    targets = []
    for half in (None, torch.bfloat16):
        frozen = FrozenTeacher({name: copy.deepcopy(part) for name, part in parts.items()}, half=half)
        assert frozen.backbone.patch_embed.proj.weight.dtype == (half or torch.float32)
        assert frozen.backbone.norm.weight.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step = DistillModel(backbone(16), frozen).teacher_targets(crops, None, masks, teacher_temp=0.05)
        targets.append((step.cls_targets, step.patch_targets))
    assert all(torch.equal(first, second) for first, second in zip(*targets, strict=True))


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    uris = [str(tmp_path / f"{number}.png") for number in range(8)]
    for uri in uris:
        Image.fromarray(generator.integers(0, 256, (14, 14, 3), dtype=np.uint8)).save(uri)
    pq.write_table(pa.table({"uri": uris}), tmp_path / "images.parquet")
    return tmp_path / "images.parquet"


@pytest.fixture
def teacher_run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    parts = teacher(True)
    vit = parts.pop("backbone")
    assert isinstance(vit, VisionTransformer)
    heads = {name: head for name, head in parts.items() if isinstance(head, ProjectionHead)}
    save_model(tmp_path / "teacher", backbone=vit, heads=heads, preprocess=Preprocess(12, 1.0, (0.5,) * 3, (0.5,) * 3))
    return tmp_path / "teacher"


def test_a_run_leaves_the_students_average_and_its_lineage(manifest: Path, teacher_run: Path) -> None:
    config = resolve(DistillConfig, recipe=None, environment={}, flags={}, assignments=SETTINGS)
    output = manifest.parent / "student"
    frozen_before = load_file(teacher_run / "teacher.safetensors")
    distill(manifest, str(output), config, Options(), teacher=str(teacher_run))
    assert load_backbone(output).embed_dim == 192
    assert {name: head.num_prototypes for name, head in load_heads(output).items()} == {
        "dino_head": 10,
        "ibot_head": 12,
    }
    roles = {source.role: source.path for source in catalog.inputs_of(catalog.find("student"))}
    assert roles == {"images": str(manifest), "teacher": str(teacher_run)}
    saved = load_file(output / "checkpoints" / "step-0000004" / "buffers.safetensors")
    assert not [name for name in saved if name.startswith("frozen")]
    after = load_file(teacher_run / "teacher.safetensors")
    assert all(torch.equal(frozen_before[name], after[name]) for name in after)


def test_stopped_and_resumed_equals_uninterrupted(manifest: Path, teacher_run: Path) -> None:
    config = resolve(DistillConfig, recipe=None, environment={}, flags={}, assignments=SETTINGS)
    whole, parts = manifest.parent / "whole", manifest.parent / "parts"
    distill(manifest, str(whole), config, Options(), teacher=str(teacher_run))
    distill(manifest, str(parts), config, Options(), teacher=str(teacher_run))
    for made_after in ("model.json", "checkpoints/step-0000004/state.json"):
        (parts / made_after).unlink()
    for file in (parts / "checkpoints" / "step-0000004").iterdir():
        file.unlink()
    (parts / "checkpoints" / "step-0000004").rmdir()
    distill(manifest, str(parts), config, Options(), teacher=str(teacher_run), resume=True)
    first, second = (load_file(run / "teacher.safetensors") for run in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_recipe_is_the_teachers_own_unless_given(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(
        "steps = 200_000\npatch_size = 4\nglobal_crop_size_px = 12\nlocal_crop_size_px = 8\n"
    )
    made = distill_config("out", str(tmp_path), ["vit_small"], None, ["batch_size=6"], resume=False, seed=3)
    assert (made.arch, made.steps, made.batch_size, made.seed, made.drop_path) == ("vit_small", 200_000, 6, 3, 0.0)
    assert (made.objective, made.momentum) == ("heads", (0.99, 0.99))
    made = distill_config("out", str(tmp_path), [], "tiny", [], objective="features", resume=False, seed=None)
    assert (made.arch, made.objective) == ("vit_tiny", "features")
    assert made.base_lr == pytest.approx(3 * 4e-3)  # three times the recipe's


def test_a_teacher_without_heads_is_one_clear_line(manifest: Path, tmp_path: Path) -> None:
    torch.save(backbone(24).state_dict(), tmp_path / "released.pth")
    config = resolve(DistillConfig, recipe=None, environment={}, flags={}, assignments=SETTINGS)
    with pytest.raises(ToolkitError, match="released.pth has no heads; .*--objective features"):
        build_distill_model(config, str(tmp_path / "released.pth"))


def test_every_form_of_a_teacher_gives_the_same_targets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = VisionTransformer(patch_size=4, embed_dim=64, depth=1, num_heads=1, img_size=12, layer_scale=1.0)
    heads = {"dino_head": ProjectionHead(64, 10, hidden_dim=16, bottleneck_dim=6)}
    run, backbone_file, checkpoint, folder = (tmp_path / name for name in ("run", "b.pth", "teacher.pth", "hf"))
    save_model(run, backbone=vit, heads=heads, preprocess=Preprocess(12, 1.0, IMAGENET_MEAN, IMAGENET_STD))
    torch.save(vit.state_dict(), backbone_file)
    parts = {"backbone": vit, **heads}
    named = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
    torch.save({"teacher": named}, checkpoint)
    folder.mkdir()
    write_hugging_face(load_model(run), folder)

    crops, masks = torch.randn(4, 3, 12, 12), torch.zeros(4, 9, dtype=torch.bool)

    def targets(source: Path, objective: str) -> tuple[Tensor, Tensor]:
        assignments = [*SETTINGS, f"objective={objective}"]
        config = resolve(DistillConfig, recipe=None, environment={}, flags={}, assignments=assignments)
        step = build_distill_model(config, str(source)).teacher_targets(crops, None, masks, teacher_temp=0.05)
        return step.cls_targets, step.patch_targets

    for objective, sources in {"heads": [checkpoint], "features": [checkpoint, backbone_file, folder]}.items():
        expected = targets(run, objective)
        for source in sources:
            for found, wanted in zip(targets(source, objective), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
