"""Released weights: their layouts load strictly, and `pull` fetches exactly them, from a server that misbehaves."""

import hashlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.models.architecture import backbone_settings
from dinov2_toolkit.models.build import ARCHITECTURES
from dinov2_toolkit.models.released import RELEASED, ReleasedWeights, cached_weights, find_released, pull
from dinov2_toolkit.models.weights import load_backbone, load_model

CONTENT = bytes(range(256)) * 9000  # 2.3 MB: more than two chunks


# The names and the eight layouts


def test_names_and_addresses_are_those_of_the_hub() -> None:
    assert list(RELEASED) == [f"dinov2_vit{size}14{kind}" for kind in ("", "_reg") for size in "sblg"]
    assert RELEASED["dinov2_vitl14_reg"].address == (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth"
    )
    for name, weights in RELEASED.items():
        assert re.fullmatch("[0-9a-f]{64}", weights.sha256)
        assert weights.licence == "Apache-2.0"
        shape = ARCHITECTURES[weights.arch]
        with torch.device("meta"):
            numbers = sum(tensor.numel() for tensor in official_layout(name).values())
        assert 0 < weights.size - 4 * numbers < 200_000  # names and alignment
        assert shape.embed_dim == official_layout(name)["cls_token"].shape[-1]


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}


def official_layout(name: str, device: str = "meta") -> dict[str, Tensor]:
    """Return half-precision tensors of the names and shapes of a released file, written out from its key list."""
    dim, depth, _ = SIZES[name.removeprefix("dinov2_vit")[0]]
    registers = 4 if name.endswith("_reg") else 0
    layout: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, dim), "pos_embed": (1, 1370, dim), "mask_token": (1, dim)}
    if registers:
        layout["register_tokens"] = (1, 4, dim)
    layout |= {"patch_embed.proj.weight": (dim, 3, 14, 14), "patch_embed.proj.bias": (dim,)}
    for block in (f"blocks.{number}" for number in range(depth)):
        for norm in ("norm1", "norm2"):
            layout |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
        layout |= {f"{block}.attn.qkv.weight": (3 * dim, dim), f"{block}.attn.qkv.bias": (3 * dim,)}
        layout |= {f"{block}.attn.proj.weight": (dim, dim), f"{block}.attn.proj.bias": (dim,)}
        layout |= {f"{block}.ls1.gamma": (dim,), f"{block}.ls2.gamma": (dim,)}
        if dim == 1536:
            layout |= {f"{block}.mlp.w12.weight": (8192, dim), f"{block}.mlp.w12.bias": (8192,)}
            layout |= {f"{block}.mlp.w3.weight": (dim, 4096), f"{block}.mlp.w3.bias": (dim,)}
        else:
            layout |= {f"{block}.mlp.fc1.weight": (4 * dim, dim), f"{block}.mlp.fc1.bias": (4 * dim,)}
            layout |= {f"{block}.mlp.fc2.weight": (dim, 4 * dim), f"{block}.mlp.fc2.bias": (dim,)}
    layout |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return {key: torch.empty(shape, dtype=torch.float16, device=device) for key, shape in layout.items()}


def hugging_face_layout(official: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of facebook/dinov2-* and facebook/dinov2-with-registers-* on the Hub."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in official.items():
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        if ".attn.qkv." in name:
            prefix, kind = name.split(".attn.qkv.")
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[f"{prefix}.attention.attention.{part}.{kind}"] = rows.clone()
            continue
        name = re.sub(r"^(cls_token|mask_token|register_tokens)$", r"embeddings.\1", name)
        name = re.sub(r"^pos_embed$", "embeddings.position_embeddings", name)
        name = re.sub(r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection.", name)
        name = re.sub(r"^norm\.", "layernorm.", name)
        name = re.sub(r"\.attn\.proj\.", ".attention.output.dense.", name)
        name = re.sub(r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1", name)
        renamed[name.replace(".w12.", ".weights_in.").replace(".w3.", ".weights_out.")] = tensor
    return renamed


def assert_is(name: str, source: Path | dict[str, Tensor]) -> None:
    settings = backbone_settings(load_backbone(source))
    dim, depth, heads = SIZES[name.removeprefix("dinov2_vit")[0]]
    assert (settings.embed_dim, settings.depth, settings.num_heads) == (dim, depth, heads)
    assert settings.ffn == ("swiglu" if dim == 1536 else "mlp")
    with_registers = name.endswith("_reg")
    assert (settings.num_register_tokens, settings.img_size, settings.patch_size) == (4 * with_registers, 518, 14)
    assert (settings.pos_embed_antialias, settings.pos_embed_offset) == (
        (True, 0.0) if with_registers else (False, 0.1)
    )


@pytest.mark.parametrize("name", RELEASED)
def test_all_eight_layouts_load_strictly_at_full_shape_official_and_hugging_face(name: str) -> None:
    # On the meta device: names and shapes of all blocks, no memory. The test below reads real files.
    official = official_layout(name)
    assert len(official) == {"s": 175, "b": 175, "l": 343, "g": 567}[name.removeprefix("dinov2_vit")[0]] + (
        name.endswith("_reg")
    )
    for layout in (official, hugging_face_layout(official)):
        assert_is(name, layout)
        *kept, last = layout
        with pytest.raises(ToolkitError, match="missing"):
            load_backbone({key: layout[key] for key in kept})
        with pytest.raises(ToolkitError, match=r"1 unexpected \(more\)"):
            load_backbone({**layout, "more": layout[last]})


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_all_eight_layouts_load_from_files(tmp_path: Path, name: str) -> None:
    official = {key: tensor.fill_(0.25) for key, tensor in official_layout(name, device="cpu").items()}
    torch.save(official, tmp_path / "released.pth")
    assert_is(name, tmp_path / "released.pth")
    (tmp_path / "released.pth").unlink()
    save_file(hugging_face_layout(official), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    del official
    assert_is(name, tmp_path)


# Pulling


@dataclass
class Behaviour:
    """What the server does, and what it was asked."""

    content: bytes = CONTENT
    ranges: bool = True
    break_off_after: list[int] = field(default_factory=list)  # bytes of each answer's body, then whole answers
    status: int = 200
    asked: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[tuple[str, Behaviour]]:
    behaviour = Behaviour()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            behaviour.asked.append(dict(self.headers))
            if behaviour.status != 200:
                self.send_error(behaviour.status)
                return
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            first = int(start[1]) if start and behaviour.ranges else 0
            body = behaviour.content[first:]
            self.send_response(206 if start and behaviour.ranges else 200)
            if start and behaviour.ranges:
                total = len(behaviour.content)
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body[: behaviour.break_off_after.pop(0)] if behaviour.break_off_after else body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Loopback(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that hangs up

    with Loopback(("127.0.0.1", 0), Handler) as loopback:
        thread = Thread(target=loopback.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{loopback.server_address[1]}", behaviour
        loopback.shutdown()
        thread.join()


def weights_at(address: str, content: bytes = CONTENT) -> ReleasedWeights:
    digest = hashlib.sha256(content).hexdigest()
    return replace(RELEASED["dinov2_vits14"], address=f"{address}/x.pth", size=len(content), sha256=digest)


def fetch(weights: ReleasedWeights, file: Path) -> int:
    """Pull, and return how many bytes were reported in all."""
    reported: list[int] = []
    pull(weights, file, reported.append)
    return sum(reported)


def test_weights_are_fetched_whole_and_nothing_else_is_left(tmp_path: Path, server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    assert fetch(weights_at(address), tmp_path / "models" / "x.pth") == len(CONTENT)
    assert (tmp_path / "models" / "x.pth").read_bytes() == CONTENT
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["x.pth"]
    assert len(behaviour.asked) == 1


def test_a_connection_that_breaks_off_goes_on_where_it_was(tmp_path: Path, server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.break_off_after = [1_500_000, 100_000]
    assert fetch(weights_at(address), tmp_path / "x.pth") == len(CONTENT)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT
    assert [asked.get("Range") for asked in behaviour.asked] == ["bytes=0-", "bytes=1500000-", "bytes=1600000-"]


def test_a_pull_that_was_given_up_goes_on_next_time(tmp_path: Path, server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.break_off_after = [300_000, 1, 1, 1, 1]
    with pytest.raises(ToolkitError, match=r"broke off 5 times .*, 300,004 of 2,304,000 bytes are kept; run the comm"):
        fetch(weights_at(address), tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
    assert fetch(weights_at(address), tmp_path / "x.pth") == len(CONTENT)
    assert behaviour.asked[-1]["Range"] == "bytes=300004-"
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_everything_again(tmp_path: Path, server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.ranges = False
    (tmp_path / "x.pth.part").write_bytes(CONTENT[:1000])
    assert fetch(weights_at(address), tmp_path / "x.pth") == len(CONTENT)
    assert (tmp_path / "x.pth").read_bytes() == CONTENT


def test_a_part_of_other_contents_is_removed_and_the_next_pull_is_whole(
    tmp_path: Path, server: tuple[str, Behaviour]
) -> None:
    address, _ = server
    (tmp_path / "x.pth.part").write_bytes(b"\x01" * 1000)
    with pytest.raises(ToolkitError, match="is not what was released: .*; removed, pull again"):
        fetch(weights_at(address), tmp_path / "x.pth")
    assert list(tmp_path.glob("x.pth*")) == []
    assert fetch(weights_at(address), tmp_path / "x.pth") == len(CONTENT)


def test_a_file_of_another_size_is_refused_before_it_is_fetched(tmp_path: Path, server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.content = CONTENT[:-1]
    with pytest.raises(ToolkitError, match="has 2,303,999 bytes instead of 2,304,000: not the weights"):
        fetch(weights_at(address), tmp_path / "x.pth")
    assert list(tmp_path.glob("x.pth*")) == []


def test_other_bytes_of_the_same_size_are_removed(tmp_path: Path, server: tuple[str, Behaviour]) -> None:
    address, behaviour = server
    behaviour.content = CONTENT[:-1] + b"?"
    with pytest.raises(ToolkitError, match="is not what was released: .*; removed, pull again") as problem:
        fetch(weights_at(address), tmp_path / "x.pth")
    assert "\n" not in str(problem.value)
    assert list(tmp_path.glob("x.pth*")) == []


@pytest.mark.parametrize(("status", "reason"), [(404, "404 Not Found"), (503, "503 Service Unavailable")])
def test_a_server_without_the_file_is_said_in_one_line(
    tmp_path: Path, server: tuple[str, Behaviour], status: int, reason: str
) -> None:
    address, behaviour = server
    behaviour.status = status
    with pytest.raises(ToolkitError, match=f"{address}/x.pth: the server answers {reason}; check the address"):
        fetch(weights_at(address), tmp_path / "x.pth")
    assert list(tmp_path.glob("x.pth*")) == []


def test_offline_is_said_in_one_line(tmp_path: Path) -> None:
    with socket.socket() as closed:  # a port that nobody listens on
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(
        ToolkitError, match=f"cannot reach 127.0.0.1:{port} .*; pull dinov2_vits14 when online"
    ) as problem:
        fetch(weights_at(f"http://127.0.0.1:{port}"), tmp_path / "x.pth")
    assert "\n" not in str(problem.value)
    with pytest.raises(ToolkitError, match="cannot reach no-such-host.invalid .*offline"):
        fetch(weights_at("http://no-such-host.invalid"), tmp_path / "x.pth")


# Names


def test_a_name_that_was_not_pulled_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path))
    for load in (load_backbone, load_model):
        with pytest.raises(
            ToolkitError, match="not in the cache .*; fetch it with `dinov2 models pull dinov2_vitb14_reg`"
        ):
            load("dinov2_vitb14_reg")


def test_the_cache_is_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached_weights("dinov2_vits14") == tmp_path / "xdg" / "dinov2-toolkit" / "models" / "dinov2_vits14.pth"
    monkeypatch.setenv("DINOV2_CACHE", str(tmp_path / "own"))
    assert cached_weights("dinov2_vits14") == tmp_path / "own" / "models" / "dinov2_vits14.pth"


def test_a_mirror_stands_in_for_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_MIRROR", "http://mirror/weights/")
    found = find_released("dinov2_vits14_reg")
    assert found.address == "http://mirror/weights/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    assert found.sha256 == RELEASED["dinov2_vits14_reg"].sha256
    with pytest.raises(
        ToolkitError, match="named 'dinov2_vits16' .did you mean 'dinov2_vits14'..; choose one of dinov2_vits14, "
    ):
        find_released("dinov2_vits16")
