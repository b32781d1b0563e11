import io

import pytest
import torch
from torch import nn

from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.train.engine.optimizer import (
    Multipliers,
    apply_schedules,
    build_optimizer,
    clip_gradients,
    parameter_multipliers,
)


def tiny_parts() -> nn.ModuleDict:
    torch.manual_seed(0)
    backbone = VisionTransformer(
        patch_size=2, embed_dim=4, depth=2, num_heads=2, img_size=4, num_register_tokens=1, layer_scale=1.0
    )
    return nn.ModuleDict({"backbone": backbone, "dino_head": ProjectionHead(4, 6, hidden_dim=5, bottleneck_dim=3)})


def test_multipliers_of_each_kind_of_parameter() -> None:
    def multipliers(name: str) -> Multipliers:
        return parameter_multipliers(name, depth=12, layerwise_decay=0.9, patch_embed_lr_mult=0.2)

    assert multipliers("pos_embed") == (0.9**13, 1.0, False, False)
    assert multipliers("patch_embed.proj.weight") == (0.9**13 * 0.2, 1.0, False, False)
    assert multipliers("blocks.0.attn.qkv.weight") == (0.9**12, 1.0, False, False)
    assert multipliers("blocks.11.norm1.weight") == (0.9, 0.0, False, False)
    assert multipliers("blocks.10.ls1.gamma") == (0.9**2, 0.0, False, False)
    assert multipliers("norm.bias") == (1.0, 0.0, False, False)
    assert parameter_multipliers("last_layer.weight_g", depth=0) == (1.0, 1.0, True, True)


def test_every_trained_parameter_is_in_one_group_with_its_own_rates() -> None:
    parts = tiny_parts()
    parts["backbone"].get_parameter("mask_token").requires_grad_(False)
    optimizer = build_optimizer(parts, layerwise_decay=0.8)
    apply_schedules(optimizer, lr=1.0, last_layer_lr=0.25, weight_decay=0.5)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rates)
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            if name == "mask_token":
                assert id(parameter) not in rates
                continue
            expected = parameter_multipliers(name, depth=2 if part == "backbone" else 0, layerwise_decay=0.8)
            lr = 0.25 if expected.is_last_layer else 1.0
            assert rates[id(parameter)] == (lr * expected.lr_multiplier, 0.5 * expected.wd_multiplier)
    assert len(optimizer.param_groups) < 14  # grouped, not one a parameter


def test_a_frozen_last_layer_does_not_move() -> None:
    parts = tiny_parts()
    optimizer = build_optimizer(parts)
    for parameter in parts.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in parts.named_parameters()}
    apply_schedules(optimizer, lr=0.1, last_layer_lr=0.0, weight_decay=0.1)
    optimizer.step()
    for name, parameter in parts.named_parameters():
        assert torch.equal(parameter, before[name]) == ("last_layer" in name), name


def test_a_frozen_backbone_does_not_move_while_the_heads_learn() -> None:
    parts = tiny_parts()
    optimizer = build_optimizer(parts)
    for parameter in parts.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in parts.named_parameters()}
    apply_schedules(optimizer, lr=0.1, last_layer_lr=0.1, weight_decay=0.1, backbone_lr=0.0)
    optimizer.step()
    for name, parameter in parts.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name


def test_the_first_step_of_adamw_by_hand() -> None:
    parts = tiny_parts()
    optimizer = build_optimizer(parts, layerwise_decay=0.5)
    weight = parts["backbone"].get_parameter("blocks.1.mlp.fc1.weight")
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    apply_schedules(optimizer, lr=0.1, last_layer_lr=0.1, weight_decay=0.2)
    optimizer.step()
    lr = 0.1 * 0.5  # the last block
    expected = before * (1 - lr * 0.2) - lr * weight.grad / (weight.grad.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected)


def test_the_state_survives_a_checkpoint_without_code() -> None:
    parts = tiny_parts()
    optimizer = build_optimizer(parts)
    for parameter in parts.parameters():
        parameter.grad = torch.ones_like(parameter)
    apply_schedules(optimizer, lr=0.1, last_layer_lr=0.2, weight_decay=0.3)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = build_optimizer(parts)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    apply_schedules(resumed, lr=1.0, last_layer_lr=2.0, weight_decay=0.0)
    assert {group["lr"] for group in resumed.param_groups if group["is_last_layer"]} == {2.0}
    assert resumed.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_each_part_is_clipped_by_itself() -> None:
    parts = tiny_parts()
    for part, size in zip(parts.values(), (10.0, 0.001), strict=True):
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, size)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    norms = clip_gradients(parts, 3.0)
    assert norms["backbone"].item() == pytest.approx(10 * counts["backbone"] ** 0.5, rel=1e-5)
    assert norms["dino_head"].item() == pytest.approx(0.001 * counts["dino_head"] ** 0.5, rel=1e-5)
    grads = [p.grad for p in parts["backbone"].parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(3.0, rel=1e-4)
    untouched = parts["dino_head"].get_parameter("mlp.0.bias").grad
    assert untouched is not None and (untouched == 0.001).all()
