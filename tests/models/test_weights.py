import json
import os
import pickle
import re
import time
from hashlib import blake2b
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.architecture import backbone_settings
from dinov2_toolkit.models.block import Attention, Ffn
from dinov2_toolkit.models.build import ARCHITECTURES, build_vit
from dinov2_toolkit.models.formats import MODEL_METADATA
from dinov2_toolkit.models.head import ProjectionHead
from dinov2_toolkit.models.preprocess import Preprocess
from dinov2_toolkit.models.saved import read_model_json, save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_heads, load_model, model_content_id

DEEP = Preprocess(28, 1.0, (0.1, 0.2), (0.3, 0.4), bit_depth=16)
PREPROCESS = Preprocess(28, 1.0, (0.2, 0.3, 0.4), (0.5, 0.6, 0.7))


def tiny_vit(
    *, ffn: Ffn = "mlp", num_register_tokens: int = 0, embed_dim: int = 64, in_chans: int = 3
) -> VisionTransformer:
    """Return a ViT whose tensors all differ from one another."""
    torch.manual_seed(0)
    backbone = VisionTransformer(
        patch_size=7,
        embed_dim=embed_dim,
        depth=3,
        num_heads=max(embed_dim // 64, 1),
        ffn=ffn,
        num_register_tokens=num_register_tokens,
        in_chans=in_chans,
        img_size=28,
        pos_embed_antialias=num_register_tokens > 0,
        pos_embed_offset=0.0 if num_register_tokens else 0.1,
    )
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter)
    return backbone.eval()


def tiny_head(bottleneck_dim: int = 5) -> ProjectionHead:
    return ProjectionHead(64, 11, hidden_dim=9, bottleneck_dim=bottleneck_dim)


def to_hugging_face(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename official weights by the table of Hugging Face's conversion script, written out again here."""
    renamed = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            prefix, kind = name.replace("blocks.", "encoder.layer.").split(".attn.qkv.")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{prefix}.attention.attention.{part}.{kind}"] = rows.clone()
            continue
        for ours, theirs in (
            (r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1"),
            (r"^pos_embed$", "embeddings.position_embeddings"),
            (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
            (r"^norm\.", "layernorm."),
            (r"^blocks\.", "encoder.layer."),
            (r"\.attn\.proj\.", ".attention.output.dense."),
            (r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1"),
            (r"\.mlp\.w12\.", ".mlp.weights_in."),
            (r"\.mlp\.w3\.", ".mlp.weights_out."),
        ):
            name = re.sub(ours, theirs, name)
        renamed[name] = tensor.clone()
    return renamed


def with_block_chunks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename blocks as training with block_chunks does: chunk, then the number counted over all chunks."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda found: f"blocks.{int(found[1]) // 2}.{found[1]}.", name): tensor
        for name, tensor in weights.items()
    }


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


def assert_same_backbone(loaded: VisionTransformer, original: VisionTransformer) -> None:
    assert backbone_settings(loaded) == backbone_settings(original)
    assert not loaded.training
    expected = original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    images = torch.randn(2, 3, 35, 21)
    assert torch.equal(loaded.forward_features(images).patch_tokens, original.forward_features(images).patch_tokens)


# Official and other files


@pytest.mark.parametrize(("ffn", "registers"), [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)])
def test_an_official_file_loads_without_being_told_its_architecture(tmp_path: Path, ffn: Ffn, registers: int) -> None:
    original = tiny_vit(ffn=ffn, num_register_tokens=registers)
    torch.save(original.state_dict(), tmp_path / "released.pth")
    assert_same_backbone(load_backbone(tmp_path / "released.pth"), original)
    assert load_heads(tmp_path / "released.pth") == {}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("arch", ["vit_small", "vit_base", "vit_large", "vit_giant2"])
def test_the_architecture_of_all_eight_released_layouts_is_recognised(arch: str, registers: int) -> None:
    # One block of the full width: the depth is counted, not looked up.
    with torch.device("meta"):
        original = build_vit(arch, depth=1, num_register_tokens=registers)
    weights = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in original.state_dict().items()}
    settings = backbone_settings(load_backbone(weights))
    assert settings.num_heads == ARCHITECTURES[arch].num_heads
    assert settings.ffn == ARCHITECTURES[arch].ffn
    assert (settings.patch_size, settings.img_size, settings.num_register_tokens) == (14, 518, registers)
    assert (settings.pos_embed_antialias, settings.pos_embed_offset) == ((True, 0.0) if registers else (False, 0.1))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "teacher.backbone._orig_mod."])
def test_names_with_prefixes_and_block_chunks_load(prefix: str) -> None:
    original = tiny_vit(num_register_tokens=1)
    assert_same_backbone(load_backbone(prefixed(prefix, with_block_chunks(original.state_dict()))), original)


def test_an_official_teacher_checkpoint_gives_backbone_and_heads(tmp_path: Path) -> None:
    original, dino_head, ibot_head = tiny_vit(), tiny_head(), tiny_head(bottleneck_dim=4)
    teacher = (
        prefixed("backbone.", with_block_chunks(original.state_dict()))
        | prefixed("dino_head.", dino_head.state_dict())
        | prefixed("ibot_head.", ibot_head.state_dict())
    )
    torch.save({"teacher": teacher, "iteration": 12}, tmp_path / "teacher_checkpoint.pth")
    assert_same_backbone(load_backbone(tmp_path / "teacher_checkpoint.pth"), original)
    heads = load_heads(tmp_path / "teacher_checkpoint.pth")
    rows = torch.randn(3, 64)
    assert heads.keys() == {"dino_head", "ibot_head"}
    assert torch.equal(heads["dino_head"](rows), dino_head(rows))
    assert torch.equal(heads["ibot_head"](rows), ibot_head(rows))


def test_of_student_and_teacher_the_teacher_is_taken() -> None:
    student, teacher = tiny_vit(), tiny_vit()
    torch.nn.init.zeros_(teacher.cls_token)
    weights = prefixed("student.backbone.", student.state_dict()) | prefixed("teacher.backbone.", teacher.state_dict())
    assert_same_backbone(load_backbone(weights), teacher)


def test_a_loaded_backbone_shares_nothing_with_its_source() -> None:
    original = tiny_vit()
    loaded = load_backbone(original.state_dict())
    loaded.cls_token.data.add_(1)
    assert not torch.equal(loaded.cls_token, original.cls_token)


def test_loading_draws_no_random_numbers_and_gives_float32() -> None:
    weights = {name: tensor.half() for name, tensor in tiny_vit().state_dict().items()}
    torch.manual_seed(5)
    loaded = load_backbone(weights)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert loaded.cls_token.dtype == torch.float32 and loaded.cls_token.requires_grad


def test_what_cannot_be_inferred_comes_by_keyword() -> None:
    weights = tiny_vit(embed_dim=48).state_dict()
    with pytest.raises(
        ToolkitError, match="does not show how many attention heads its 48 channels have .* give num_heads"
    ):
        load_backbone(weights)
    loaded = load_backbone(weights, num_heads=3, pos_embed_antialias=True, pos_embed_offset=0.0)
    assert (loaded.num_heads, loaded.pos_embed_antialias, loaded.pos_embed_offset) == (3, True, 0.0)


@pytest.mark.parametrize(("ffn", "registers"), [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)])
def test_a_hugging_face_folder_loads(tmp_path: Path, ffn: Ffn, registers: int) -> None:
    original = tiny_vit(ffn=ffn, num_register_tokens=registers)
    save_file(to_hugging_face(original.state_dict()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 1, "patch_size": 7}))
    assert_same_backbone(load_backbone(tmp_path), original)
    assert load_model(tmp_path).preprocess.image_size == 28  # its own grid, smaller than 224
    processor = {
        "crop_size": {"height": 21, "width": 21},
        "size": {"shortest_edge": 28},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = load_model(tmp_path)
    assert model.preprocess == Preprocess(21, 0.75, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_hugging_face_classifier_gives_its_backbone_and_config_its_heads(tmp_path: Path) -> None:
    original = tiny_vit(embed_dim=128, num_register_tokens=4)
    weights = prefixed("dinov2_with_registers.", to_hugging_face(original.state_dict()))
    save_file(weights | {"classifier.weight": torch.zeros(5, 256)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert load_backbone(tmp_path).num_heads == 4
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    assert_same_backbone(load_backbone(tmp_path), original)


# What is wrong is said in one line


def test_a_state_dict_that_does_not_fit_names_what_is_missing_unexpected_and_misshaped() -> None:
    weights = tiny_vit().state_dict()
    del weights["blocks.1.norm1.bias"]
    weights["head.weight"] = torch.zeros(3)
    weights["norm.weight"] = torch.zeros(7)
    with pytest.raises(ToolkitError) as problem:
        load_backbone(weights)
    assert str(problem.value) == (
        "the state dict does not fit: 1 missing (blocks.1.norm1.bias); 1 unexpected (head.weight); "
        "1 of another shape (norm.weight (7,) instead of (64,)). Name weights of this architecture"
    )


def test_a_whole_missing_block_is_noticed() -> None:
    weights = {name: tensor for name, tensor in tiny_vit().state_dict().items() if not name.startswith("blocks.1.")}
    with pytest.raises(ToolkitError, match=r"14 missing \(blocks.1.norm1.weight, .*, \.\.\.\)"):
        load_backbone(weights)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("was-run",)


def write_bad_files(folder: Path) -> dict[str, str]:
    """Write files that are no weights; return what the message about each must say."""
    weights = tiny_vit().state_dict()
    torch.save(weights, folder / "whole.pth")
    save_file(weights, folder / "whole.safetensors")
    for name in ("whole.pth", "whole.safetensors"):
        content = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(content[: len(content) // 2])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 86\n"
    (folder / "pointer.pth").write_text(pointer)
    (folder / "pointer.safetensors").write_text(pointer)
    (folder / "page.pth").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "picture.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (folder / "empty.pth").write_bytes(b"")
    (folder / "code.pth").write_bytes(pickle.dumps({"cls_token": Evil()}, protocol=2))
    (folder / "newer_code.pth").write_bytes(pickle.dumps({"cls_token": Evil()}))
    torch.save({"cls_token": torch.zeros(1), "settings": Evil()}, folder / "settings.pth")
    torch.save([torch.zeros(2)], folder / "list.pth")
    torch.save({name: weights[name] for name in weights if "blocks" not in name}, folder / "no_blocks.pth")
    torch.save({**weights, "pos_embed": weights["pos_embed"][:, :0]}, folder / "no_positions.pth")
    torch.save({**weights, "pos_embed": weights["pos_embed"][:, :1]}, folder / "one_position.pth")
    torch.save({**weights, "patch_embed.proj.weight": torch.zeros(24, 3, 0, 0)}, folder / "no_pixels.pth")
    torch.save({"weight": torch.zeros(10, 20), "bias": torch.zeros(10)}, folder / "linear_head.pth")
    return {
        "cut-whole.pth": "is cut off or no weights file",
        "cut-whole.safetensors": "is no whole safetensors file",
        "pointer.pth": "is a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
        "pointer.safetensors": "is a Git LFS pointer",
        "page.pth": "is no weights file; name a .pth or .safetensors",
        "picture.safetensors": "is no whole safetensors file",
        "empty.pth": "is cut off or no weights file",
        "code.pth": r"holds a Python object \(posix.mkdir\) besides tensors, which is not loaded",
        "newer_code.pth": "is no weights file",
        "settings.pth": r"holds a Python object \(posix.mkdir\)",
        "list.pth": "holds a list, not a state dict",
        "no_blocks.pth": "holds no DINOv2 backbone: blocks.0.norm1.weight missing",
        "no_positions.pth": "holds no DINOv2 backbone: pos_embed missing or not of its form",
        "one_position.pth": "holds no DINOv2 backbone: pos_embed missing or not of its form",
        "no_pixels.pth": "holds no DINOv2 backbone: patch_embed.proj.weight missing or not of its form",
        "linear_head.pth": "holds no DINOv2 backbone: cls_token, pos_embed, patch_embed.proj.weight, blocks.0.norm1",
        "absent.pth": "no model .*absent.pth'; give a run folder, a weights file, a Hugging Face folder or random:ARCH",
        ".": "holds no model: no model.json",
    }


def test_a_pickle_with_a_wrong_instruction_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save(tiny_vit().state_dict(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    for place in range(0, 400, 7):
        (tmp_path / "a.pth").write_bytes(data[:place] + b"t" + data[place + 1 :])  # a tuple of what is not there
        try:
            load_backbone(tmp_path / "a.pth")
        except ToolkitError as problem:
            assert "\n" not in str(problem), place


def test_a_description_within_weights_that_is_none_is_said_in_one_line(tmp_path: Path) -> None:
    for text in ("{", "[]", "[" * 5_000):
        save_file(tiny_vit().state_dict(), tmp_path / "a.safetensors", {MODEL_METADATA: text})
        with pytest.raises(ToolkitError, match=r"a.safetensors has a description of its model that is no JSON object"):
            load_backbone(tmp_path / "a.safetensors")


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, message in write_bad_files(tmp_path).items():
        with pytest.raises(ToolkitError, match=message) as problem:
            load_backbone(tmp_path / name)
        assert "\n" not in str(problem.value)
    assert not (tmp_path / "was-run").exists()


# Run folders


def saved_run(folder: Path, *, num_register_tokens: int = 2) -> VisionTransformer:
    backbone = tiny_vit(num_register_tokens=num_register_tokens)
    # Neither can be told from the weights: heads 32 wide, and a policy unlike that of released weights with registers.
    backbone.num_heads, backbone.pos_embed_offset, backbone.pos_embed_antialias = 2, 0.1, False
    for module in backbone.modules():
        if isinstance(module, Attention):
            module.num_heads = 2
    heads = {"dino_head": tiny_head(), "ibot_head": tiny_head(bottleneck_dim=4)}
    save_model(folder, backbone=backbone, heads=heads, preprocess=PREPROCESS)
    return backbone


def test_a_run_folder_gives_back_all_that_was_saved(tmp_path: Path) -> None:
    backbone = saved_run(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["model.json", "teacher.safetensors"]
    assert_same_backbone(load_backbone(tmp_path / "run"), backbone)
    saved = read_model_json(tmp_path / "run")
    assert saved.preprocess == PREPROCESS
    described = json.loads((tmp_path / "run" / "model.json").read_text())
    assert described["heads"]["ibot_head"]["bottleneck_dim"] == 4
    assert described["preprocessing"]["image_size"] == 28
    heads = load_heads(tmp_path / "run")
    assert {name: head.bottleneck_dim for name, head in heads.items()} == {"dino_head": 5, "ibot_head": 4}


def test_the_weights_file_of_a_run_is_enough(tmp_path: Path) -> None:
    backbone = saved_run(tmp_path / "run")
    (tmp_path / "run" / "teacher.safetensors").rename(tmp_path / "alone.safetensors")
    assert_same_backbone(load_backbone(tmp_path / "alone.safetensors"), backbone)
    assert load_model(tmp_path / "alone.safetensors").preprocess.mean == (0.2, 0.3, 0.4)


def test_a_run_loads_as_a_frozen_model_with_its_preprocessing(tmp_path: Path) -> None:
    saved_run(tmp_path / "run")
    model = load_model(str(tmp_path / "run"))
    assert model.preprocess == PREPROCESS
    assert model.name == str(tmp_path / "run")
    assert not model.backbone.training and not any(p.requires_grad for p in model.backbone.parameters())
    content = (tmp_path / "run" / "teacher.safetensors").read_bytes()
    assert model.content_id == model_content_id(tmp_path / "run") == blake2b(content, digest_size=16).hexdigest()


def test_saving_again_replaces_whole_files_and_repeats_the_bytes(tmp_path: Path) -> None:
    saved_run(tmp_path)
    first = model_content_id(tmp_path)
    saved_run(tmp_path)
    assert model_content_id(tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unfinished_run_stands_for_its_latest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (9, 10, 100):
        backbone = saved_run(tmp_path / "run" / "checkpoints" / f"step-{step:07d}")
    (tmp_path / "run" / "checkpoints" / "step-0000100" / "model.json").unlink()  # killed before it was whole
    torch.nn.init.constant_(backbone.cls_token, 2.0)
    heads = {"dino_head": tiny_head()}
    latest = tmp_path / "run" / "checkpoints" / "step-0000010"
    save_model(latest, backbone=backbone, heads=heads, preprocess=PREPROCESS)
    model = load_model(tmp_path / "run")
    assert_same_backbone(model.backbone, backbone)
    assert model.preprocess == PREPROCESS
    said = capsys.readouterr().err
    assert said == f"{tmp_path / 'run'} is not finished: taking the teacher of its latest checkpoint, step-0000010\n"


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "[" * 5_000, '{"backbone": {}}', '{"backbone": {"depth": 1}, "heads": {}, "preprocessing": {}}'],
)
def test_a_broken_model_json_is_said_in_one_line(tmp_path: Path, content: str) -> None:
    saved_run(tmp_path)
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(ToolkitError, match=r"model\.json") as problem:
        load_model(tmp_path)
    assert "\n" not in str(problem.value)


# Random models


def test_a_random_model_is_seeded_and_its_layer_scale_is_1() -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    first, again, other = (load_model("random:vit_tiny/7", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.backbone.pos_embed, again.backbone.pos_embed)
    assert not torch.equal(first.backbone.pos_embed, other.backbone.pos_embed)
    assert first.content_id == again.content_id != other.content_id
    assert (first.backbone.patch_size, first.backbone.pos_grid, first.preprocess.image_size) == (7, 32, 224)
    assert first.backbone.get_parameter("blocks.0.ls1.gamma").eq(1).all()
    plain = load_model("random:vit_tiny")
    assert (plain.backbone.patch_size, plain.preprocess.image_size) == (14, 224)


def test_a_random_model_can_have_the_architecture_of_a_run(tmp_path: Path) -> None:
    backbone = saved_run(tmp_path / "run")
    model = load_model(f"random:{tmp_path / 'run'}")
    assert backbone_settings(model.backbone) == backbone_settings(backbone)
    assert not torch.equal(model.backbone.cls_token, backbone.cls_token)
    assert model.backbone.get_parameter("blocks.0.ls1.gamma").eq(1).all()
    assert model.preprocess.image_size == 28


@pytest.mark.parametrize("name", ["random:vit_smal", "random:", "random:vit_tiny/0"])
def test_an_unknown_random_architecture_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ToolkitError, match="choose one of vit_tiny, vit_small, vit_base, vit_large, vit_giant2"):
        load_model(name)


def test_a_run_says_how_deep_its_pixels_are_and_an_older_one_means_eight_bits(tmp_path: Path) -> None:
    save_model(tmp_path, backbone=tiny_vit(in_chans=2), heads={}, preprocess=DEEP)
    model = load_model(tmp_path)
    assert model.preprocess == DEEP
    described = json.loads((tmp_path / "model.json").read_text())
    del described["preprocessing"]["bit_depth"]
    (tmp_path / "model.json").write_text(json.dumps(described))
    assert load_model(tmp_path).preprocess.bit_depth == 8


def test_a_model_of_other_channels_says_how_it_normalises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(tiny_vit(in_chans=5).state_dict(), tmp_path / "five.pth")
    assert load_model(tmp_path / "five.pth").preprocess.mean == (0.5,) * 5
    assert "nothing says how to normalise 5 channels" in capsys.readouterr().err


# What a file declares is checked before it is built or allocated


def declared(folder: Path, **changes: object) -> Path:
    """Save a model, and return the folder with other numbers in its description."""
    save_model(folder, backbone=tiny_vit(), heads={}, preprocess=PREPROCESS)
    description = json.loads((folder / "model.json").read_text())
    description["backbone"] |= changes
    (folder / "model.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [("depth", 100_000), ("depth", -1), ("depth", "3"), ("depth", True), ("embed_dim", 10**9), ("num_heads", 0)]
    + [("patch_size", 0), ("img_size", 10**12), ("num_register_tokens", 10**9), ("in_chans", 10**7)],
)
def test_numbers_that_no_backbone_has_are_refused_at_once(tmp_path: Path, key: str, value: object) -> None:
    folder, start = declared(tmp_path, **{key: value}), time.monotonic()
    for name in (str(folder), f"random:{folder}"):
        with pytest.raises(ToolkitError, match=f"declares {key} {value!r}, not a whole number from"):
            load_model(name)
    assert time.monotonic() - start < 20


def test_other_words_of_a_description_are_refused(tmp_path: Path) -> None:
    for key, value in [("ffn", "moe"), ("pos_embed_offset", "x"), ("pos_embed_antialias", 1)]:
        with pytest.raises(ToolkitError, match="declares"):
            load_model(declared(tmp_path, **{key: value}))
    declared(tmp_path)
    for size in (10**9, 0, 2.5):
        description = json.loads((tmp_path / "model.json").read_text())
        description["preprocessing"]["image_size"] = size
        (tmp_path / "model.json").write_text(json.dumps(description))
        with pytest.raises(ToolkitError, match="is not in 1 to 16384"):
            load_model(tmp_path)


def test_a_block_of_a_high_number_is_refused_at_once(tmp_path: Path) -> None:
    weights = tiny_vit().state_dict()
    weights["blocks.200000.norm1.weight"] = torch.zeros(64)
    save_file(weights, tmp_path / "weights.safetensors")
    start = time.monotonic()
    with pytest.raises(ToolkitError, match="declares depth 200001"):
        load_backbone(tmp_path / "weights.safetensors")
    assert time.monotonic() - start < 20


def test_one_number_that_stands_for_many_is_refused(tmp_path: Path) -> None:
    weights = tiny_vit().state_dict() | {"norm.weight": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ToolkitError, match=r"holds fewer numbers of norm.weight than its shape \(1000000, 1000000\)"):
        load_backbone(tmp_path / "weights.pth")


def test_a_pipe_is_no_weights_file(tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ToolkitError, match="cannot read weights .*: a named pipe; check the path"):
            load_backbone(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    tensors = {key: tensor.clone() for key, tensor in build_vit("vit_tiny", patch_size=4).state_dict().items()}
    tensors["blocks.1.attn.qkv.weight"][5, 7] = value
    with pytest.raises(ToolkitError, match=r"holds numbers that are not finite \(blocks\.1\.attn\.qkv\.weight\)"):
        load_backbone(tensors)
