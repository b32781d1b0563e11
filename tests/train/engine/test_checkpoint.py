from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_heads
from dinov2_toolkit.train.engine.checkpoint import TrainedModel, checkpoints, load_checkpoint, save_checkpoint
from dinov2_toolkit.train.engine.optimizer import apply_schedules, build_optimizer
from dinov2_toolkit.train.objective.distill_model import DistillModel
from dinov2_toolkit.train.objective.frozen_teacher import FrozenTeacher
from dinov2_toolkit.train.objective.networks import update_teacher
from dinov2_toolkit.train.objective.ssl_model import SSLModel

PREPROCESS = Preprocess(8, 0.5, (0.5,) * 3, (0.25,) * 3)


def small_model(seed: int, embed_dim: int = 16) -> SSLModel:
    torch.manual_seed(seed)
    backbone = VisionTransformer(patch_size=4, embed_dim=embed_dim, depth=2, num_heads=2, img_size=8)
    heads = [ProjectionHead(embed_dim, 12, hidden_dim=8, bottleneck_dim=4) for _ in range(2)]
    return SSLModel(backbone, *heads, centering="softmax_center")


def one_step(model: SSLModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    masks = torch.rand(6, 4) < 0.3
    losses = model(model.teacher_targets(torch.randn(6, 3, 8, 8), torch.randn(3, 3, 4, 4), masks, teacher_temp=0.05))
    losses["total"].backward()
    apply_schedules(optimizer, lr=1e-2, last_layer_lr=1e-2, weight_decay=0.1)
    optimizer.step()
    optimizer.zero_grad()
    update_teacher(model.teacher, model.student, 0.9)


def save(folder: Path, step: int, model: TrainedModel, optimizer: torch.optim.Optimizer, keep: int = 2) -> Path:
    return save_checkpoint(folder, model, optimizer.state_dict(), {"step": step}, PREPROCESS, keep=keep)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_loaded_checkpoint_continues_exactly_as_the_run_would_have(tmp_path: Path) -> None:
    model = small_model(0).train()
    optimizer = build_optimizer(model.student)
    one_step(model, optimizer, 1)
    path = save(tmp_path, 1, model, optimizer)
    one_step(model, optimizer, 2)

    other = small_model(99).train()
    other_optimizer = build_optimizer(other.student)
    assert load_checkpoint(path, other, other_optimizer) == {"step": 1}
    assert other.dino_center.abs().max() > 0
    one_step(other, other_optimizer, 2)
    assert equal(other.state_dict(), model.state_dict())


def test_the_frozen_teacher_of_a_distillation_is_not_saved(tmp_path: Path) -> None:
    backbone = VisionTransformer(patch_size=4, embed_dim=8, depth=1, num_heads=2, img_size=8)
    model = DistillModel(backbone, FrozenTeacher(dict(small_model(0).teacher.items())))
    optimizer = build_optimizer(model.student)
    path = save(tmp_path, 1, model, optimizer)
    names = [name for file in path.glob("*.safetensors") for name in load_file(file)]
    assert len(names) == len(model.student.state_dict()) + len(model.teacher.state_dict())
    frozen = model.frozen.backbone.state_dict()["cls_token"].clone()
    load_checkpoint(path, model, optimizer)
    assert torch.equal(model.frozen.backbone.state_dict()["cls_token"], frozen)


def test_a_checkpoint_folder_is_a_model(tmp_path: Path) -> None:
    model = small_model(0)
    path = save(tmp_path / "checkpoints", 7, model, build_optimizer(model.student))
    for source in (path, tmp_path):
        assert equal(load_backbone(source).state_dict(), model.teacher["backbone"].state_dict())
        assert set(load_heads(source)) == {"dino_head", "ibot_head"}


def test_the_last_few_are_kept_and_leftovers_of_a_crash_removed(tmp_path: Path) -> None:
    model = small_model(0)
    optimizer = build_optimizer(model.student)
    (tmp_path / ".step-0000009").mkdir()
    (tmp_path / ".step-0000009" / "optimizer.pt").write_bytes(b"half")
    for step in (8, 9, 10, 10):
        save(tmp_path, step, model, optimizer)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000009", "step-0000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000009", "step-0000010"]
    assert checkpoints(tmp_path / "none") == []


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("step-9999999", "step-10000000", ".step-99999999"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9999999", "step-10000000"]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model = small_model(0)
    path = save(tmp_path, 1, model, build_optimizer(model.student))
    wider = small_model(0, embed_dim=32)
    with pytest.raises(ToolkitError, match=r"of another model: student.backbone.* is \(.*\), wanted \("):
        load_checkpoint(path, wider, build_optimizer(wider.student))
