"""Weight files as they come (official .pth, training checkpoints, Hugging Face, safetensors), under official names.

The official names are those of the released backbones: `cls_token`, `pos_embed`, `patch_embed.proj.weight`,
`blocks.{i}.attn.qkv.weight`, ..., `norm.bias`; heads are `dino_head.mlp.0.weight`, ..., `ibot_head.*`.
"""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ToolkitError

MODEL_METADATA = "dinov2_toolkit"  # the key in a safetensors file's metadata that holds its model.json

# Official name -> name in Hugging Face's Dinov2Model and Dinov2WithRegistersModel. qkv is apart: three there, one here.
HUGGING_FACE_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
HUGGING_FACE_BLOCK_NAMES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return all tensors of a weights file by name, and the model.json that one of our own files carries, else None.

    Nested dictionaries, as in {"teacher": {...}}, become dotted names. Code in a pickle is never run.

    Raises:
        ToolkitError: if there is no such file, or it is a Git LFS pointer, cut off, no weights, or needs code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as problem:
        raise ToolkitError(f"cannot read weights {path}: {problem.strerror}; check the path") from None
    if start.startswith(b"version https://git-lfs"):
        raise ToolkitError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path), None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            return tensors, (file.metadata() or {}).get(MODEL_METADATA)
    except SafetensorError as problem:
        raise ToolkitError(
            f"{path} is no whole safetensors file ({_one_line(problem)}); fetch or write it again"
        ) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on pickles of other makers
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as problem:
        code = re.search(r"GLOBAL ([\w.]+)", str(problem))
        if code:
            raise ToolkitError(
                f"{path} holds a Python object ({code[1]}) besides tensors, which is not loaded because it can run "
                "code; save the state dict alone"
            ) from None
        raise ToolkitError(f"{path} is no weights file; name a .pth or .safetensors that holds tensors alone") from None
    except (EOFError, RuntimeError, ValueError) as problem:
        raise ToolkitError(f"{path} is cut off or no weights file ({_one_line(problem)}); fetch it again") from None
    if not isinstance(content, dict):
        raise ToolkitError(f"{path} holds a {type(content).__name__}, not a state dict; save the model's state dict")
    return dict(_flattened(content, ""))


def _flattened(content: Mapping[object, object], prefix: str) -> list[tuple[str, Tensor]]:
    """Return the tensors of nested dictionaries under dotted names; what is no tensor is left out."""
    found: list[tuple[str, Tensor]] = []
    for name, value in content.items():
        if isinstance(value, Tensor):
            found.append((f"{prefix}{name}", value))
        elif isinstance(value, Mapping):
            found += _flattened(value, f"{prefix}{name}.")
    return found


def _one_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:120]


def official_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the backbone's tensors and the heads' tensors of a state dict in any known naming, by official names.

    Wrappers' prefixes (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, `model.`, `state_dict.`) are taken off; of a
    teacher and a student the teacher is taken; `blocks.{chunk}.{i}` becomes `blocks.{i}`; Hugging Face's names are
    translated. Names that mean nothing here stay among the backbone's, for the strict check to report.
    """
    names = {name: re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module)\.", "", name) for name in tensors}
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    for prefix in ("model.", "state_dict.", "teacher.", "student."):
        inner = {name.removeprefix(prefix): tensor for name, tensor in renamed.items() if name.startswith(prefix)}
        renamed = inner or renamed
    if any(name.endswith("embeddings.cls_token") for name in renamed):
        return _from_hugging_face(renamed), {}
    is_head = re.compile(r"(dino|ibot)_head\.")
    heads = {name: tensor for name, tensor in renamed.items() if is_head.match(name)}
    backbone = {name.removeprefix("backbone."): renamed[name] for name in renamed if name not in heads}
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): backbone[name] for name in backbone}, heads


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Dinov2 or Dinov2WithRegisters model's tensors by official names; a classifier's are left out."""
    tensors = {re.sub(r"^dinov2(_with_registers)?\.", "", name): tensor for name, tensor in tensors.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = re.match(r"encoder\.layer\.(\d+)\.", name)
        qkv = re.search(r"\.attention\.attention\.(query|key|value)\.(weight|bias)$", name)
        if block and qkv:
            parts = [name.replace(f".{qkv[1]}.", f".{part}.") for part in ("query", "key", "value")]
            if all(part in tensors for part in parts):  # otherwise the strict check reports qkv as missing
                renamed[f"blocks.{block[1]}.attn.qkv.{qkv[2]}"] = torch.cat([tensors[part] for part in parts])
        elif block:
            renamed[f"blocks.{block[1]}.{_translated(name[block.end() :], HUGGING_FACE_BLOCK_NAMES)}"] = tensor
        elif not name.startswith("classifier."):
            renamed[_translated(name, HUGGING_FACE_NAMES)] = tensor
    return renamed


def _translated(name: str, theirs_of_ours: Mapping[str, str]) -> str:
    """Return the official name for one of Hugging Face's, `.weight` and `.bias` kept; an unknown name as it is."""
    for ours, theirs in theirs_of_ours.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file.

    Raises:
        ToolkitError: if it cannot be read or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ToolkitError(f"cannot read {path} ({_one_line(problem)}); write or fetch it again") from None
    if not isinstance(content, dict):
        raise ToolkitError(f"{path} holds a {type(content).__name__}, not an object; write or fetch it again")
    return content
