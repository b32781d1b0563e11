"""`dinov2 models`: what it lists is right, and what it pulls is a model everywhere."""

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from PIL import Image
from torch import Tensor

from dinov2_toolkit.curate.embed.embed import EmbedSettings, embed_images
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.extract.extract import open_model
from dinov2_toolkit.manage.models import architecture_cost, kept_activations, list_models, pull_model
from dinov2_toolkit.models.block import Ffn
from dinov2_toolkit.models.build import ARCHITECTURES
from dinov2_toolkit.models.released import RELEASED, cached_weights
from dinov2_toolkit.models.vit import VisionTransformer
from dinov2_toolkit.models.weights import load_backbone
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest

DINOV2 = [sys.executable, "-m", "dinov2_toolkit"]


def small_vit(ffn: Ffn = "mlp", depth: int = 2, device: str = "cpu", registers: int = 0) -> VisionTransformer:
    with torch.device(device):
        return VisionTransformer(
            patch_size=7, embed_dim=64, depth=depth, num_heads=1, ffn=ffn, img_size=28, num_register_tokens=registers
        )


# What is listed


@pytest.mark.parametrize("name", ["vit_small", "vit_base", "vit_large", "vit_giant2"])
def test_the_parameters_are_those_of_the_released_models(name: str) -> None:
    known = {"vit_small": 22_056_576, "vit_base": 86_580_480, "vit_large": 304_368_640, "vit_giant2": 1_136_480_768}
    cost = architecture_cost(name)
    assert cost.parameters == known[name]
    assert cost.weights_mib == 4 * known[name] / 2**20


def test_the_operations_are_those_of_the_matrix_products() -> None:
    tokens, dim, depth = 1 + 256, 384, 12
    block = 2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim  # linear layers; query-key and weight-value products
    patches = 2 * 256 * 3 * 14**2 * dim
    assert architecture_cost("vit_small").gflop == (depth * block + patches) / 1e9


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_activations_are_those_that_autograd_keeps(ffn: Ffn) -> None:
    def kept(depth: int, images: int) -> int:
        backbone = small_vit(ffn, depth)
        weights = {weight.untyped_storage().data_ptr() for weight in backbone.parameters()}
        alive: list[Tensor] = []  # or memory would be used again, and counted once
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            alive.append(tensor)
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            backbone.forward_features(torch.randn(images, 3, 56, 56))
        return sum(sizes.values())

    of_a_block = [kept(2, images) - kept(1, images) for images in (1, 2)]
    measured = (of_a_block[1] - of_a_block[0]) / 4  # numbers of one image more, in one block more
    assert kept_activations(small_vit(ffn), 56) == pytest.approx(measured, rel=0.15)


def test_the_listing_has_every_architecture_and_every_released_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    file = cached_weights("dinov2_vitl14")
    file.parent.mkdir(parents=True)
    file.touch()
    list_models(as_json=False)
    lines = capsys.readouterr().out.splitlines()
    for name in ARCHITECTURES:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    for name, weights in RELEASED.items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.endswith(weights.address) and weights.licence in line
        assert (" yes " in line) == (name == "dinov2_vitl14")
    list_models(as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed["architectures"]] == list(ARCHITECTURES)
    assert [each["name"] for each in listed["weights"] if each["pulled"]] == ["dinov2_vitl14"]
    assert listed["weights"][0]["size"] == 88_283_115


def test_help_and_listing_are_commands_and_help_imports_no_torch() -> None:
    code = "import sys; from dinov2_toolkit.cli import app; assert not {'torch', 'duckdb', 'faiss'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    done = subprocess.run([*DINOV2, "models"], capture_output=True, text=True)
    assert done.returncode == 0 and "dinov2_vitg14_reg" in done.stdout and done.stderr == ""


# Pulling


@pytest.fixture
def released_tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VisionTransformer]:
    """Serve a tiny backbone on the loopback as if it were dinov2_vits14."""
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "cache"))
    backbone = small_vit()
    (tmp_path / "served").mkdir()
    torch.save(backbone.state_dict(), tmp_path / "served" / "tiny.pth")
    content = (tmp_path / "served" / "tiny.pth").read_bytes()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served"))) as loopback:
        thread = Thread(target=loopback.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{loopback.server_address[1]}/tiny.pth"
        digest = hashlib.sha256(content).hexdigest()
        tiny = replace(RELEASED["dinov2_vits14"], address=address, size=len(content), sha256=digest)
        monkeypatch.setitem(RELEASED, "dinov2_vits14", tiny)
        yield backbone
        loopback.shutdown()
        thread.join()


def test_a_pulled_name_is_a_model_everywhere(
    tmp_path: Path, released_tiny: VisionTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pull_model("dinov2_vits14", force=False, dry_run=False)
    assert result is not None and result.output == str(cached_weights("dinov2_vits14"))
    said = capsys.readouterr().err
    for word in (RELEASED["dinov2_vits14"].address, f"{RELEASED['dinov2_vits14'].size:,} bytes", "Apache-2.0"):
        assert word in said
    assert torch.equal(load_backbone("dinov2_vits14").pos_embed, released_tiny.pos_embed)
    assert open_model("dinov2_vits14").source.path == "dinov2_vits14"
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 40), "teal").save(tmp_path / "photos" / "a.png")
    embed_images(
        [str(tmp_path / "photos")], str(tmp_path / "a.parquet"), EmbedSettings(model="dinov2_vits14"), Options()
    )
    assert open_manifest(tmp_path / "a.parquet").num_rows == 1


def test_pulling_again_fetches_nothing_and_a_dry_run_neither(
    released_tiny: VisionTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pull_model("dinov2_vits14", force=False, dry_run=True) is None
    assert "would fetch it to" in capsys.readouterr().err
    assert not cached_weights("dinov2_vits14").exists()
    pull_model("dinov2_vits14", force=False, dry_run=False)
    first = cached_weights("dinov2_vits14").stat().st_mtime_ns
    capsys.readouterr()
    again = pull_model("dinov2_vits14", force=False, dry_run=False)
    assert again is not None and "is up to date" in capsys.readouterr().err
    assert cached_weights("dinov2_vits14").stat().st_mtime_ns == first
    pull_model("dinov2_vits14", force=True, dry_run=False)
    assert cached_weights("dinov2_vits14").stat().st_mtime_ns > first


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ToolkitError, match=r"named 'dinov3_vits16' \(did you mean .*; choose one of dinov2_vits14"):
        pull_model("dinov3_vits16", force=False, dry_run=False)


def test_offline_a_pull_is_one_line_and_exit_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("DINOV2_MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    done = subprocess.run([*DINOV2, "models", "pull", "dinov2_vits14", "-q"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: cannot reach 127.0.0.1:")
