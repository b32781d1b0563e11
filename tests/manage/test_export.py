"""Exports are read by the libraries they are for, or held to their names and shapes; a wrong one never stays."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage import catalog as catalog_commands
from dinov2_toolkit.manage import export as export_command
from dinov2_toolkit.manage.export import export_model
from dinov2_toolkit.models.block import Ffn
from dinov2_toolkit.models.export import Format, all_tokens
from dinov2_toolkit.models.preprocess import Preprocess, crop_picture, normalise
from dinov2_toolkit.models.saved import save_model
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone, load_model
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options, Result, write_run_provenance
from dinov2_toolkit.store.manifest import Provenance, Source
from dinov2_toolkit.store.places import catalog_path

KINDS: list[tuple[Ffn, int]] = [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 2)]
DIM, HIDDEN = 64, {"mlp": 256, "swiglu": 176}  # 176: two thirds of 256, up to a multiple of 8


def run_folder(folder: Path, ffn: Ffn = "mlp", registers: int = 0, in_chans: int = 3) -> VisionTransformer:
    """Save a tiny run whose tensors all differ, interpolated as the released weights of its kind are."""
    torch.manual_seed(1)
    backbone = VisionTransformer(
        patch_size=7,
        embed_dim=DIM,
        depth=2,
        num_heads=2,  # 32 wide, which no file shows: every format must be told
        ffn=ffn,
        num_register_tokens=registers,
        in_chans=in_chans,
        img_size=28,
        pos_embed_antialias=registers > 0,
        pos_embed_offset=0.0 if registers else 0.1,
    ).eval()
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    values = tuple(0.4 + 0.1 * channel for channel in range(in_chans))
    save_model(folder, backbone=backbone, heads={}, preprocess=Preprocess(28, 0.875, values, values))
    return backbone


def export(source: Path, output: Path, to: Format, image_size: int | None = None, **options: bool) -> Result:
    result = export_model(str(source), str(output), to, image_size, Options(**options))
    assert result is not None
    return result


def images(size: int, num: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(7))


def official_layout(ffn: Ffn, registers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the official code's model, written out: strictly loaded means these, in any order."""
    layout: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, DIM), "pos_embed": (1, 17, DIM), "mask_token": (1, DIM)}
    if registers:
        layout["register_tokens"] = (1, registers, DIM)
    layout |= {"patch_embed.proj.weight": (DIM, 3, 7, 7), "patch_embed.proj.bias": (DIM,)}
    wide = 2 * HIDDEN[ffn] if ffn == "swiglu" else HIDDEN[ffn]
    into, out = ("w12", "w3") if ffn == "swiglu" else ("fc1", "fc2")
    for block in ("blocks.0", "blocks.1"):
        for norm in ("norm1", "norm2"):
            layout |= {f"{block}.{norm}.weight": (DIM,), f"{block}.{norm}.bias": (DIM,)}
        layout |= {f"{block}.attn.qkv.weight": (3 * DIM, DIM), f"{block}.attn.qkv.bias": (3 * DIM,)}
        layout |= {f"{block}.attn.proj.weight": (DIM, DIM), f"{block}.attn.proj.bias": (DIM,)}
        layout |= {f"{block}.ls1.gamma": (DIM,), f"{block}.ls2.gamma": (DIM,)}
        layout |= {f"{block}.mlp.{into}.weight": (wide, DIM), f"{block}.mlp.{into}.bias": (wide,)}
        layout |= {f"{block}.mlp.{out}.weight": (DIM, HIDDEN[ffn]), f"{block}.mlp.{out}.bias": (DIM,)}
    return layout | {"norm.weight": (DIM,), "norm.bias": (DIM,)}


def timm_layout(ffn: Ffn, registers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of timm 1.0's vit_*_patch14[_reg4]_dinov2 at this size, num_classes=0."""
    layout = {
        name.replace(".w12.", ".fc1.").replace(".w3.", ".fc2."): shape
        for name, shape in official_layout(ffn, registers).items()
        if name not in ("mask_token", "register_tokens")
    }
    return layout | {"reg_token": (1, registers, DIM), "pos_embed": (1, 16, DIM)} if registers else layout


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# Official, safetensors, timm


@pytest.mark.parametrize(("ffn", "registers"), KINDS)
def test_official_has_the_official_layout_and_comes_back_bit_for_bit(tmp_path: Path, ffn: Ffn, registers: int) -> None:
    backbone = run_folder(tmp_path / "run", ffn, registers)
    result = export(tmp_path / "run", tmp_path / "vit.pth", "official")
    tensors = torch.load(tmp_path / "vit.pth", weights_only=True)
    assert shapes(tensors) == official_layout(ffn, registers)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in backbone.state_dict().items())
    assert result.figures["largest_difference"] == 0.0

    back = load_backbone(tmp_path / "vit.pth", num_heads=2)
    save_model(tmp_path / "again", backbone=back, heads={}, preprocess=Preprocess(28, 1.0, (0.5,) * 3, (0.5,) * 3))
    export(tmp_path / "again", tmp_path / "again.pth", "official")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_safetensors_is_a_model_by_itself_with_its_preprocessing(tmp_path: Path) -> None:
    backbone = run_folder(tmp_path / "run", registers=2)
    export(tmp_path / "run", tmp_path / "vit.safetensors", "safetensors")
    assert shapes(load_file(tmp_path / "vit.safetensors")) == official_layout("mlp", 2)
    alone, run = load_model(tmp_path / "vit.safetensors"), load_model(tmp_path / "run")
    assert alone.preprocess == run.preprocess
    assert torch.equal(all_tokens(alone.backbone, images(35)), all_tokens(backbone, images(35)))


@pytest.mark.parametrize(("ffn", "registers"), KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timm_has_timms_layout_and_its_tokens_come_back(tmp_path: Path, ffn: Ffn, registers: int, suffix: str) -> None:
    backbone = run_folder(tmp_path / "run", ffn, registers)
    file = tmp_path / f"timm{suffix}"
    export(tmp_path / "run", file, "timm")
    tensors = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert shapes(tensors) == timm_layout(ffn, registers)
    if registers:  # timm adds no position to the class token, so it must be in the token
        assert torch.equal(tensors["cls_token"], backbone.cls_token + backbone.pos_embed[:, :1])
    loaded = load_backbone(file, num_heads=2)
    assert torch.equal(all_tokens(loaded, images(28)), all_tokens(backbone, images(28)))


def test_position_embeddings_are_stored_for_the_size_asked(tmp_path: Path) -> None:
    backbone = run_folder(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "large.pth", "official", image_size=42)
    large = load_backbone(tmp_path / "large.pth", num_heads=2)
    assert large.pos_embed.shape == (1, 37, DIM)
    assert torch.equal(all_tokens(large, images(42)), all_tokens(backbone, images(42)))
    with pytest.raises(ToolkitError, match="--image-size 40 is not a multiple of the model's patch size 7; use 35"):
        export(tmp_path / "run", tmp_path / "other.pth", "official", image_size=40)


# Hugging Face


@pytest.mark.parametrize(("ffn", "registers"), KINDS)
def test_transformers_loads_the_folder_and_gives_the_same_tokens_and_images(
    tmp_path: Path, ffn: Ffn, registers: int
) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = run_folder(tmp_path / "run", ffn, registers)
    result = export(tmp_path / "run", tmp_path / "hf", "hf")
    model, report = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    with torch.no_grad():
        tokens = model(images(28)).last_hidden_state
        others = model(images(49)).last_hidden_state
    assert (tokens - all_tokens(backbone, images(28))).abs().max() < 1e-5
    # Position policy: with registers transformers interpolates as the released weights were made, without it does not.
    difference = (others - all_tokens(backbone, images(49))).abs().max()
    assert difference < 1e-5 if registers else difference > 1e-2
    assert (result.figures["other_difference"] < 1e-5) == (registers > 0)  # type: ignore[operator]

    run = load_model(tmp_path / "run")
    preprocess = run.preprocess
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    for width, shift in ((64, 0), (90, 1)):  # resized to 32 and 47 by 32: 4 and 19 pixels are cut away
        pixels = np.random.default_rng(0).integers(0, 256, (61, width, 3), dtype=np.uint8)
        prepared = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        ours = normalise(crop_picture(Image.fromarray(pixels), preprocess)[None], preprocess)
        assert torch.allclose(prepared[..., shift:], ours[..., : 28 - shift], atol=1e-6)


def test_at_a_size_that_is_asked_for_transformers_agrees_without_registers_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = run_folder(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "hf", "hf", image_size=49)
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        tokens = model(images(49)).last_hidden_state
    assert (tokens - all_tokens(backbone, images(49))).abs().max() < 1e-5


@pytest.mark.parametrize(("ffn", "registers"), [("mlp", 0), ("swiglu", 2)])
def test_a_folder_that_transformers_writes_again_loads_here(tmp_path: Path, ffn: Ffn, registers: int) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = run_folder(tmp_path / "run", ffn, registers)
    export(tmp_path / "run", tmp_path / "hf", "hf")
    transformers.AutoModel.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "again")  # its names by now
    for folder in ("hf", "again"):
        loaded = load_backbone(tmp_path / folder)
        assert all(torch.equal(tensor, backbone.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        assert (loaded.pos_embed_antialias, loaded.pos_embed_offset) == (registers > 0, 0.0 if registers else 0.1)


def test_a_model_of_other_channels_is_exported_without_an_image_processor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = run_folder(tmp_path / "run", in_chans=5)
    export(tmp_path / "run", tmp_path / "hf", "hf")
    assert "takes 5 channels, which no image processor of transformers makes" in capsys.readouterr().err
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()
    assert "takes 5 channels" in (tmp_path / "hf" / "README.md").read_text()
    model = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        tokens = model(images(28, channels=5)).last_hidden_state
    assert (tokens - all_tokens(backbone, images(28, channels=5))).abs().max() < 1e-5


def test_sixteen_bits_are_kept_where_the_format_has_a_place_and_said_where_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = run_folder(tmp_path / "run")
    half = (0.5,) * 3
    save_model(tmp_path / "run", backbone=backbone, heads={}, preprocess=Preprocess(28, 1, half, half, bit_depth=16))
    export(tmp_path / "run", tmp_path / "kept.safetensors", "safetensors")
    assert load_model(tmp_path / "kept.safetensors").preprocess.bit_depth == 16
    assert "16 bits" not in capsys.readouterr().err
    export(tmp_path / "run", tmp_path / "weights.pth", "official")
    assert "no official file says that the model takes 16 bits" in capsys.readouterr().err
    pytest.importorskip("transformers")
    export(tmp_path / "run", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf" / "preprocessor_config.json").exists()
    assert "takes 3 channels of 16 bits, which no image processor" in (tmp_path / "hf" / "README.md").read_text()


def test_the_interpolation_of_a_run_survives_the_hugging_face_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    backbone = run_folder(tmp_path / "run", registers=4)
    backbone.pos_embed_antialias, backbone.pos_embed_offset = False, 0.1  # unlike released weights with registers
    save_model(tmp_path / "run", backbone=backbone, heads={}, preprocess=Preprocess(28, 1, (0,) * 3, (1,) * 3))
    export(tmp_path / "run", tmp_path / "hf", "hf")
    assert torch.equal(all_tokens(load_backbone(tmp_path / "hf"), images(49)), all_tokens(backbone, images(49)))


def test_the_model_card_tells_where_the_model_is_from_and_no_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run_folder(tmp_path / "secret-customer" / "run")
    manifest = Source("images", str(tmp_path / "secret-customer" / "photos.parquet"), "abcdef0123456789")
    parameters: dict[str, object] = {
        "arch": "vit_tiny",
        "steps": 700,
        "start": str(tmp_path / "secret-customer" / "w.pth"),
    }
    provenance = Provenance("run", "train pretrain", parameters, seed=3, inputs=(manifest,), figures={"total": 8.5})
    write_run_provenance(tmp_path / "secret-customer" / "run", provenance)
    export(tmp_path / "secret-customer" / "run", tmp_path / "hf", "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for told in (
        "images: photos.parquet, content id abcdef0123456789",
        '"steps": 700',
        "seed 3",
        '"w.pth"',
        "| total | 8.5 |",
    ):
        assert told in card
    assert "secret-customer" not in card
    for file in ("config.json", "preprocessor_config.json"):
        assert "secret-customer" not in (tmp_path / "hf" / file).read_text()


# ONNX


@pytest.mark.parametrize(
    ("ffn", "registers"), [("swiglu", 2), pytest.param("mlp", 0, marks=pytest.mark.slow)]
)  # each takes seconds
def test_onnxruntime_gives_the_same_tokens_for_any_number_of_images(tmp_path: Path, ffn: Ffn, registers: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone = run_folder(tmp_path / "run", ffn, registers)
    export(tmp_path / "run", tmp_path / "vit.onnx", "onnx", image_size=35)  # not the size of the stored embedding
    assert sorted(file.name for file in tmp_path.glob("*vit.onnx*")) == ["vit.onnx", "vit.onnx.provenance.json"]
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["cls_token", "patch_tokens"]
    assert [output.shape[1:] for output in session.get_outputs()] == [[DIM], [25, DIM]]
    for num in (1, 3):
        cls_token, patch_tokens = session.run(None, {"images": images(35, num).numpy()})
        expected = all_tokens(backbone, images(35, num))
        assert np.abs(cls_token - expected[:, 0].numpy()).max() < 1e-4
        assert np.abs(patch_tokens - expected[:, 1 + registers :].numpy()).max() < 1e-4


# What stands at the output


def test_an_export_that_differs_is_removed_and_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "run")
    write, compare = export_command.STEPS["timm"]

    def write_wrongly(model: object, file: Path) -> None:
        write(model, file)  # type: ignore[arg-type]
        tensors = torch.load(file, weights_only=True)
        torch.save({**tensors, "cls_token": 1.1 * tensors["cls_token"]}, file)

    monkeypatch.setitem(export_command.STEPS, "timm", (write_wrongly, compare))
    (tmp_path / "timm.pth").write_text("old")
    with pytest.raises(ToolkitError, match=r"timm.pth was not written: .* tokens differ by \d") as problem:
        export(tmp_path / "run", tmp_path / "timm.pth", "timm", force=True)
    assert "\n" not in str(problem.value)
    assert (tmp_path / "timm.pth").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".dinov2") == ["run", "timm.pth"]
    assert catalog.artifacts() == []


def test_the_same_export_again_is_up_to_date_and_another_asks_for_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "run")
    first = export(tmp_path / "run", tmp_path / "vit.pth", "official")
    content = (tmp_path / "vit.pth").read_bytes()
    capsys.readouterr()
    assert export(tmp_path / "run", tmp_path / "vit.pth", "official").figures == first.figures
    assert capsys.readouterr().err == f"{tmp_path / 'vit.pth'} is up to date\n"
    with pytest.raises(ToolkitError, match=r"was made differently \(image_size 28, now 14\); .* --force"):
        export(tmp_path / "run", tmp_path / "vit.pth", "official", image_size=14)
    assert (tmp_path / "vit.pth").read_bytes() == content
    export(tmp_path / "run", tmp_path / "vit.pth", "official", image_size=14, force=True)
    assert load_backbone(tmp_path / "vit.pth", num_heads=2).img_size == 14
    (tmp_path / "other.pth").write_text("somebody's")
    with pytest.raises(ToolkitError, match="is no export of ours"):
        export(tmp_path / "run", tmp_path / "other.pth", "official")


@pytest.mark.parametrize("name", ["vit.pth.provenance.json", "vit.pth.data"])
def test_what_stands_beside_an_export_asks_for_force(tmp_path: Path, name: str) -> None:
    run_folder(tmp_path / "run")
    beside = tmp_path / name
    beside.write_text("[1]")
    for dry_run in (False, True):
        with pytest.raises(ToolkitError, match=f"{name}, which goes with .*--force"):
            export(tmp_path / "run", tmp_path / "vit.pth", "official", dry_run=dry_run)
    assert beside.read_text() == "[1]"
    export(tmp_path / "run", tmp_path / "vit.pth", "official", force=True)
    (tmp_path / "vit.pth").unlink()
    export(tmp_path / "run", tmp_path / "vit.pth", "official")
    beside.unlink()
    beside.mkdir()
    with pytest.raises(ToolkitError, match="is a folder"):
        export(tmp_path / "run", tmp_path / "vit.pth", "official", force=True, image_size=14)


def test_force_replaces_a_folder_of_ours_and_never_somebodys(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run_folder(tmp_path / "run")
    (tmp_path / "hf").mkdir()
    export(tmp_path / "run", tmp_path / "hf", "hf")
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(ToolkitError, match="hf holds 'notes.txt', which no export wrote; move it away"):
        export(tmp_path / "run", tmp_path / "hf", "hf", force=True)
    (tmp_path / "hf" / "notes.txt").unlink()
    export(tmp_path / "run", tmp_path / "hf", "hf", force=True)
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "provenance.json",
    ]
    with pytest.raises(ToolkitError, match="exists and is no export of ours"):
        export(tmp_path / "run", tmp_path / "run", "hf", force=True)
    assert (tmp_path / "run" / "model.json").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "run")
    output = str(tmp_path / "a" / "v.pth")
    assert export_model(str(tmp_path / "run"), output, "official", None, Options(dry_run=True)) is None
    assert "would write" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("to", "output", "message"),
    [
        ("official", "folder", "is a folder; --to official writes a file"),
        ("official", "v.safetensors", "the official code reads .pth"),
        ("safetensors", "v.pth", "does not end in .safetensors"),
        ("onnx", "v.pth", "does not end in .onnx"),
        ("hf", "file", "is a file; --to hf writes a folder"),
    ],
)
def test_an_output_of_the_wrong_kind_is_said_before_anything_is_read(
    tmp_path: Path, to: Format, output: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ToolkitError, match=message):
        export(tmp_path / "no run", tmp_path / output, to)


def test_a_missing_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run_folder(tmp_path / "run")
    with pytest.raises(ToolkitError, match=r"needs transformers, .* `pip install 'dinov2-toolkit\[hf\]'`"):
        export(tmp_path / "run", tmp_path / "hf", "hf")
    with pytest.raises(ToolkitError, match=r"needs onnx, onnxscript, onnxruntime, .*\[onnx\]"):
        export(tmp_path / "run", tmp_path / "vit.onnx", "onnx")


def test_the_catalog_knows_an_export_and_finds_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "vit.safetensors", "safetensors")
    (made,) = catalog.artifacts()
    assert (made.kind, made.command, made.path) == ("export", "export", str(tmp_path / "vit.safetensors"))
    assert [(source.role, source.path) for source in catalog.inputs_of(made)] == [("model", str(tmp_path / "run"))]
    assert dict(catalog.metrics_of(made))["largest_difference"] == 0.0
    catalog_commands.verify([], as_json=False)
    catalog_path().unlink()
    catalog_commands.rebuild([tmp_path])
    (again,) = catalog.artifacts()
    assert (again.kind, again.path, again.digest) == (made.kind, made.path, made.digest)
    with safe_open(tmp_path / "vit.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["dinov2_toolkit"])["preprocessing"]["image_size"] == 28


def test_the_command_prints_the_path_and_the_difference(tmp_path: Path) -> None:
    run_folder(tmp_path / "run")
    dinov2 = [sys.executable, "-m", "dinov2_toolkit", "export", "run", "--to", "official"]
    done = subprocess.run([*dinov2, "-o", "./out//v.pth"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "./out//v.pth\n"), done.stderr
    assert "largest difference of all tokens 0.0e+00 at 28 px" in done.stderr
