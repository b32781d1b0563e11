import math

import pytest
import torch
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.block import Ffn
from dinov2_toolkit.models.build import ARCHITECTURES, build_vit
from dinov2_toolkit.models.selected import selected_patches
from dinov2_toolkit.models.vit import Features, VisionTransformer


def tiny_vit(
    *,
    ffn: Ffn = "mlp",
    num_register_tokens: int = 2,
    in_chans: int = 3,
    layer_scale: float = 1.0,
    drop_path: float = 0.0,
) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=3,
        ffn=ffn,
        num_register_tokens=num_register_tokens,
        in_chans=in_chans,
        img_size=16,
        layer_scale=layer_scale,
        drop_path=drop_path,
    ).eval()


def assert_same(actual: Features, expected: Features) -> None:
    for name in ("cls_token", "register_tokens", "patch_tokens"):
        torch.testing.assert_close(getattr(actual, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "ffn", "registers", "expected"),
    [
        ("vit_small", None, 0, 22_056_576),
        ("vit_small", None, 4, 22_058_112),
        ("vit_base", None, 0, 86_580_480),
        ("vit_base", None, 4, 86_583_552),
        ("vit_large", None, 0, 304_368_640),
        ("vit_large", None, 4, 304_372_736),
        ("vit_large", "swiglu", 0, 304_794_880),
        ("vit_giant2", None, 0, 1_136_480_768),
        ("vit_giant2", None, 4, 1_136_486_912),
    ],
)
def test_parameter_counts_are_those_of_the_released_models(
    arch: str, ffn: Ffn | None, registers: int, expected: int
) -> None:
    with torch.device("meta"):
        backbone = build_vit(arch, ffn=ffn, num_register_tokens=registers)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == expected


def test_state_dict_has_the_official_names_and_shapes() -> None:
    with torch.device("meta"):
        small, giant = build_vit("vit_small", num_register_tokens=4), build_vit("vit_giant2", num_register_tokens=4)
    expected = {
        "cls_token": (1, 1, 384),
        "pos_embed": (1, 1370, 384),
        "register_tokens": (1, 4, 384),
        "mask_token": (1, 384),
        "patch_embed.proj.weight": (384, 3, 14, 14),
        "patch_embed.proj.bias": (384,),
        "norm.weight": (384,),
        "norm.bias": (384,),
    }
    for i in range(12):
        expected |= {f"blocks.{i}.{norm}.{kind}": (384,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        expected |= {f"blocks.{i}.{scale}.gamma": (384,) for scale in ("ls1", "ls2")}
        shapes = {"attn.qkv": (1152, 384), "attn.proj": (384, 384), "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536)}
        expected |= {f"blocks.{i}.{name}.weight": shape for name, shape in shapes.items()}
        expected |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()} == expected
    assert len(expected) == 176
    giant_shapes = {name: tuple(tensor.shape) for name, tensor in giant.state_dict().items()}
    assert len(giant_shapes) == 568
    assert giant_shapes["blocks.39.mlp.w12.weight"] == (8192, 1536)
    assert giant_shapes["blocks.39.mlp.w3.weight"] == (1536, 4096)


def test_every_architecture_has_heads_of_64() -> None:
    assert {arch.embed_dim / arch.num_heads for arch in ARCHITECTURES.values()} == {64}


def test_initialisation_is_the_official_one() -> None:
    torch.manual_seed(0)
    backbone = build_vit("vit_tiny", patch_size=8, depth=2, num_register_tokens=64, img_size=128)
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert backbone.register_tokens is not None
    assert backbone.register_tokens.std().item() == pytest.approx(1e-6, rel=0.1)
    assert 0 < backbone.cls_token.std().item() < 1e-5
    assert not backbone.mask_token.any()
    for block in ("blocks.0", "blocks.1"):
        assert backbone.get_parameter(f"{block}.attn.qkv.weight").std().item() == pytest.approx(0.02, rel=0.05)
        assert not backbone.get_parameter(f"{block}.mlp.fc1.bias").any()
        torch.testing.assert_close(backbone.get_parameter(f"{block}.ls1.gamma"), torch.full((192,), 1e-5))
    bound = (3 * 8 * 8) ** -0.5  # Conv2d's own: uniform within 1 / sqrt(fan in)
    assert bound * 0.98 < backbone.patch_embed.proj.weight.abs().max().item() <= bound


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_packed_pass_equals_separate_passes(ffn: Ffn) -> None:
    backbone = tiny_vit(ffn=ffn)
    large, small, wide = torch.randn(4, 3, 16, 16), torch.randn(3, 3, 8, 8), torch.randn(2, 3, 4, 20)
    masks = torch.rand(4, 16) < 0.5
    with torch.no_grad():
        packed = backbone.forward_features([large, small, wide], [masks, None, None])
        separate = [
            backbone.forward_features(large, masks),
            backbone.forward_features(small),
            backbone.forward_features(wide),
        ]
    assert [features.patch_tokens.shape for features in packed] == [(4, 16, 24), (3, 4, 24), (2, 5, 24)]
    for actual, expected in zip(packed, separate, strict=True):
        assert_same(actual, expected)


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    backbone, images = tiny_vit(), torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert_same(
            backbone.forward_features(images[2:3]),
            Features(*(tokens[2:3] for tokens in vars(backbone.forward_features(images)).values())),
        )


def test_a_masked_patch_shows_its_position_and_not_its_pixels() -> None:
    backbone = tiny_vit()
    torch.nn.init.normal_(backbone.mask_token)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 5] = True
    embedded = backbone.embed(torch.randn(1, 3, 16, 16), masks)[0]
    torch.testing.assert_close(embedded[3 + 5], backbone.mask_token[0] + backbone.pos_embed[0, 1 + 5])
    images = torch.randn(1, 3, 16, 16)
    repainted = images.clone()
    repainted[..., 4:8, 4:8] = 9.0  # patch 5 is row 1, column 1
    assert_same(backbone.forward_features(repainted, masks), backbone.forward_features(images, masks))


def test_registers_follow_the_class_token_and_have_no_position() -> None:
    backbone = tiny_vit()
    embedded = backbone.embed(torch.randn(2, 3, 16, 16), None)
    assert backbone.register_tokens is not None
    assert embedded.shape == (2, 1 + 2 + 16, 24)
    torch.testing.assert_close(embedded[1, 1:3], backbone.register_tokens[0])
    torch.testing.assert_close(embedded[1, 0], backbone.cls_token[0, 0] + backbone.pos_embed[0, 0])


def test_a_model_without_registers_returns_none_of_them() -> None:
    features = tiny_vit(num_register_tokens=0).forward_features(torch.randn(2, 3, 8, 12))
    assert features.register_tokens.shape == (2, 0, 24)
    assert features.patch_tokens.shape == (2, 6, 24)


def test_intermediate_layers_end_with_the_final_features() -> None:
    backbone, images = tiny_vit(), torch.randn(2, 3, 16, 8)
    with torch.no_grad():
        (first, first_cls), (last, last_cls) = backbone.get_intermediate_layers(images, [2, 0], return_class_token=True)
        (only,) = backbone.get_intermediate_layers(images)
        final = backbone.forward_features(images)
        (plain,) = backbone.get_intermediate_layers(images, [0], norm=False)
        (grid,) = backbone.get_intermediate_layers(images, 1, reshape=True)
    torch.testing.assert_close(last, final.patch_tokens)
    torch.testing.assert_close(last_cls, final.cls_token)
    torch.testing.assert_close(only, final.patch_tokens)
    assert grid.shape == (2, 24, 4, 2)
    torch.testing.assert_close(grid[1, :, 3, 1], final.patch_tokens[1, 3 * 2 + 1])
    # Block 0 by hand, and the final norm applied.
    tokens = backbone.blocks[0](backbone.embed(images, None).flatten(0, 1), [(2, 1 + 2 + 8)]).view(2, 11, 24)
    torch.testing.assert_close(plain, tokens[:, 3:])
    torch.testing.assert_close(first, backbone.norm(tokens)[:, 3:])
    torch.testing.assert_close(first_cls, backbone.norm(tokens)[:, 0])
    for layers in (4, 0, [3], [-1], []):
        with pytest.raises(ToolkitError, match="within the model's 3 blocks"):
            backbone.get_intermediate_layers(images, layers)


def test_stochastic_depth_updates_an_exact_number_of_sequences_and_scales_them() -> None:
    block = tiny_vit(drop_path=0.4).blocks[0].train()
    block.get_parameter("ls2.gamma").data.zero_()  # only the attention branch acts
    groups = [(5, 3), (2, 4)]
    tokens = torch.randn(5 * 3 + 2 * 4, 24)
    change = block(tokens, groups) - tokens
    full = block.eval()(tokens, groups) - tokens
    # floor(5 * 0.6) = 3 of 5 and floor(2 * 0.6) = 1 of 2 sequences, each scaled by all / kept.
    starts = [(3 * i, 3, 5 / 3) for i in range(5)] + [(15 + 4 * i, 4, 2 / 1) for i in range(2)]
    kept = []
    for start, length, scale in starts:
        rows = slice(start, start + length)
        kept.append(bool(change[rows].any()))
        if kept[-1]:
            torch.testing.assert_close(change[rows], full[rows] * scale, rtol=1e-4, atol=1e-5)
    assert sum(kept[:5]) == 3 and sum(kept[5:]) == 1


def test_stochastic_depth_keeps_at_least_one_sequence_and_rests_in_evaluation() -> None:
    block = tiny_vit(drop_path=0.9).blocks[0]
    tokens = torch.randn(2 * 3, 24)
    plain = tiny_vit(drop_path=0.0).blocks[0]
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(tokens, [(2, 3)]), plain(tokens, [(2, 3)]), rtol=0, atol=0)
    block.train().get_parameter("ls2.gamma").data.zero_()
    change = (block(tokens, [(2, 3)]) - tokens).view(2, 3 * 24).abs().sum(1)
    assert (change > 0).sum() == 1


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_selected_tokens_are_those_of_a_whole_pass(drop_path: float) -> None:
    backbone = tiny_vit(drop_path=drop_path).train()
    images = [torch.randn(4, 3, 16, 16), torch.randn(5, 3, 8, 8), torch.randn(2, 3, 4, 8)]
    masks = [torch.rand(4, 16) < 0.5, None, None]
    selected = [torch.rand(4, 16) < 0.3, None, torch.tensor([[False, False], [True, True]])]
    torch.manual_seed(1)  # both passes drop the same sequences
    whole = backbone.forward_features(images, masks)
    torch.manual_seed(1)
    parts = backbone.forward_selected(images, masks, [None if it is None else selected_patches(it) for it in selected])
    for features, (cls_tokens, patch_tokens), wanted in zip(whole, parts, selected, strict=True):
        torch.testing.assert_close(cls_tokens, features.cls_token)
        expected = features.patch_tokens[:0, 0] if wanted is None else features.patch_tokens[wanted]
        torch.testing.assert_close(patch_tokens, expected)


def test_a_position_grid_of_the_offset_kind_samples_by_the_scale_factor() -> None:
    backbone = tiny_vit()  # offset 0.1, no antialias
    ramp = torch.arange(4.0)
    backbone.pos_embed.data[0, 1:, 0] = ramp[None].expand(4, 4).flatten()  # a ramp along the columns in channel 0
    row = backbone.interpolated_pos_embed(2, 2)[0, 1:3, 0]
    # Output j lies at input (j + 0.5) / scale - 0.5, with scale (2 + 0.1) / 4; bicubic at the ramp's clamped ends.
    positions = [(j + 0.5) * 4 / 2.1 - 0.5 for j in range(2)]
    expected = [sum(w * min(max(p, 0), 3) for p, w in cubic_weights(position)) for position in positions]
    torch.testing.assert_close(row, torch.tensor(expected))


@pytest.mark.parametrize(("antialias", "offset"), [(False, 0.1), (True, 0.0)])
def test_the_deterministic_resize_of_the_position_grid_is_the_same(antialias: bool, offset: float) -> None:
    backbone = tiny_vit()
    backbone.pos_embed_antialias, backbone.pos_embed_offset = antialias, offset
    found = []
    for is_deterministic in (False, True):
        torch.use_deterministic_algorithms(is_deterministic)
        try:
            position = backbone.interpolated_pos_embed(3, 2)
            (gradient,) = torch.autograd.grad((position * position.detach()).sum(), backbone.pos_embed)
        finally:
            torch.use_deterministic_algorithms(False)
        found.append((position, gradient))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def cubic_weights(position: float) -> list[tuple[int, float]]:
    """Return the four neighbours of a position and their weights in torch's bicubic kernel (a = -0.75)."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)

    start = math.floor(position) - 1
    return [(p, kernel(position - p)) for p in range(start, start + 4)]


def test_images_may_have_any_number_of_channels() -> None:
    assert tiny_vit(in_chans=5).forward_features(torch.randn(1, 5, 8, 8)).cls_token.shape == (1, 24)


def test_a_loaded_half_precision_model_stays_half() -> None:
    features = tiny_vit().bfloat16().forward_features([torch.randn(1, 3, 8, 8).bfloat16()])[0]
    assert features.cls_token.dtype == torch.bfloat16


def test_sizes_that_do_not_fit_are_one_line_errors() -> None:
    backbone = tiny_vit()
    cases: list[tuple[Tensor, str]] = [
        (torch.randn(1, 3, 10, 16), "10 x 16 pixels are not a multiple of the patch size 4"),
        (torch.randn(1, 1, 16, 16), "images have 1 channels, the model takes 3"),
    ]
    for images, message in cases:
        with pytest.raises(ToolkitError, match=message):
            backbone.forward_features(images)
    with pytest.raises(ToolkitError, match="embed_dim 10 is not a multiple of num_heads 3"):
        VisionTransformer(patch_size=4, embed_dim=10, depth=1, num_heads=3, img_size=16)
    with pytest.raises(ToolkitError, match="image size 30 is not a multiple of patch size 4; use 28"):
        VisionTransformer(patch_size=4, embed_dim=12, depth=1, num_heads=3, img_size=30)
    with pytest.raises(
        ToolkitError, match="no architecture named 'vit_smal' .did you mean 'vit_small'..; choose one of"
    ):
        build_vit("vit_smal")
