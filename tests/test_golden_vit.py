"""The backbone and the head give the numbers of the official modules (relative difference under 1e-5)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.vit import Features, VisionTransformer

GOLDEN = Path(os.environ.get("DINOV2_GOLDEN", Path(__file__).parent / "golden"))
META = json.loads((GOLDEN / "meta.json").read_text())
BACKBONES = [path.name.removesuffix(".weights.safetensors") for path in sorted(GOLDEN.glob("*.weights.safetensors"))]


def golden_backbone(name: str) -> VisionTransformer:
    dims, settings = META["dims"], META[name]
    backbone = VisionTransformer(
        patch_size=dims["patch"],
        embed_dim=dims["dim"],
        depth=dims["depth"],
        num_heads=dims["heads"],
        ffn="swiglu" if settings["ffn_layer"].startswith("swiglu") else "mlp",
        num_register_tokens=settings["num_register_tokens"],
        img_size=dims["img"],
        pos_embed_antialias=settings["interpolate_antialias"],
        pos_embed_offset=settings["interpolate_offset"],
    )
    backbone.load_state_dict(load_file(GOLDEN / f"{name}.weights.safetensors"))
    return backbone.eval()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


def assert_features(features: Features, io: dict[str, Tensor], prefix: str) -> None:
    assert_close(features.cls_token, io[f"{prefix}.cls"])
    assert_close(features.patch_tokens, io[f"{prefix}.patch"])
    if f"{prefix}.reg" in io:
        assert_close(features.register_tokens, io[f"{prefix}.reg"])


@pytest.mark.parametrize("size", ["native", "smaller", "larger"])
@pytest.mark.parametrize("name", BACKBONES)
def test_features_equal_the_official_ones_at_any_size(name: str, size: str) -> None:
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    with torch.no_grad():
        features = golden_backbone(name).forward_features(io[f"{size}.images"])
    assert_features(features, io, size)
    assert features.register_tokens.shape[1] == META[name]["num_register_tokens"]


@pytest.mark.parametrize("size", ["native", "smaller", "larger"])
@pytest.mark.parametrize("name", BACKBONES)
def test_intermediate_layers_equal_the_official_ones(name: str, size: str) -> None:
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    num_layers = len([key for key in io if key.startswith(f"{size}.intermediate") and key.endswith(".cls")])
    with torch.no_grad():
        layers = golden_backbone(name).get_intermediate_layers(
            io[f"{size}.images"], num_layers, return_class_token=True
        )
    assert len(layers) == num_layers > 0
    for number, (patch_tokens, cls_token) in enumerate(layers):
        assert_close(patch_tokens, io[f"{size}.intermediate{number}.patch"])
        assert_close(cls_token, io[f"{size}.intermediate{number}.cls"])


@pytest.mark.parametrize("name", BACKBONES)
def test_masked_features_equal_the_official_ones(name: str) -> None:
    io = load_file(GOLDEN / f"{name}.io.safetensors")
    with torch.no_grad():
        features = golden_backbone(name).forward_features(io["masked.images"], io["masked.masks"])
    assert_features(features, io, "masked")


def test_head_logits_equal_the_official_ones() -> None:
    golden = load_file(GOLDEN / "head.safetensors")
    state = {name.removeprefix("state."): tensor for name, tensor in golden.items() if name.startswith("state.")}
    hidden_dim, in_dim = state["mlp.0.weight"].shape
    num_prototypes, bottleneck_dim = state["last_layer.weight_v"].shape
    head = ProjectionHead(in_dim, num_prototypes, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim)
    head.load_state_dict(state)
    with torch.no_grad():
        assert_close(head(golden["input"]), golden["output"])
