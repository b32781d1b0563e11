"""Weight files of any maker (official .pth, training checkpoints, Hugging Face, timm, safetensors), and their names.

The official names are those of the released backbones: `cls_token`, `pos_embed`, `patch_embed.proj.weight`,
`blocks.{i}.attn.qkv.weight`, ..., `norm.bias`; heads are `dino_head.mlp.0.weight`, ..., `ibot_head.*`. Every file is
read under these names; `hugging_face_names` and `timm_names` are the way back.
"""

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any  # of JSON
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ToolkitError
from ..store.files import open_regular
from ..store.json_text import json_object

MODEL_METADATA = "dinov2_toolkit"  # the key in a safetensors file's metadata that holds its model.json

# Official name -> name in the files of Hugging Face's Dinov2Model and Dinov2WithRegistersModel, where the two differ;
# those of a block stand behind `blocks.{i}.` and `encoder.layer.{i}.`.
HUGGING_FACE_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
HUGGING_FACE_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))
# What transformers 5 writes instead; it still reads the names above, which earlier versions and the Hub's files have.
HUGGING_FACE_NEW_NAMES = {"attention.o_proj": "attn.proj", "mlp.down_proj": "mlp.w3"}
HUGGING_FACE_PARTS = (  # official tensors that are several there
    ("attn.qkv", HUGGING_FACE_QKV),
    ("attn.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("mlp.w12", ("mlp.gate_proj", "mlp.up_proj")),
)
TIMM_SWIGLU_NAMES = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return all tensors of a weights file by name, and the model.json that one of our own files carries, else None.

    Nested dictionaries, as in {"teacher": {...}}, become dotted names. Code in a pickle is never run.

    Raises:
        ToolkitError: if there is no such file, or it is a Git LFS pointer, cut off, no weights, or needs code.
    """
    try:
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as problem:
        raise ToolkitError(f"cannot read weights {path}: {problem.strerror}; check the path") from None
    if start.startswith(b"version https://git-lfs"):
        raise ToolkitError(f"{path} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if path.suffix != ".safetensors":
        return _read_pickle(path), None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            return tensors, (file.metadata() or {}).get(MODEL_METADATA)
    except SafetensorError as problem:
        raise ToolkitError(f"{path} is no whole safetensors file ({_one_line(problem)}); fetch it again") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # on pickles of other makers
            # Mapped into memory, so that reading a name or casting to another type needs no second copy of everything.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as problem:
        code = re.search(r"GLOBAL ([\w.]+)", str(problem))
        if code:
            raise ToolkitError(
                f"{path} holds a Python object ({code[1]}) besides tensors, which is not loaded because it can run "
                "code; save the state dict alone"
            ) from None
        raise ToolkitError(f"{path} is no weights file; name a .pth or .safetensors that holds tensors alone") from None
    except MemoryError:
        raise
    except Exception as problem:  # torch's reader raises anything of damaged bytes
        raise ToolkitError(f"{path} is cut off or no weights file ({_one_line(problem)}); fetch it again") from None
    if not isinstance(content, dict):
        raise ToolkitError(f"{path} holds a {type(content).__name__}, not a state dict; save the model's state dict")
    tensors = dict(_flattened(content, ""))
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes() < tensor.nbytes:  # one number may stand for terabytes
            raise ToolkitError(
                f"{path} holds fewer numbers of {name} than its shape {tuple(tensor.shape)}; fetch it again"
            )
    return tensors


def _flattened(content: Mapping[object, object], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries under dotted names; what is no tensor is left out."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")


def _one_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0][:120]


def official_names(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the backbone's tensors and the heads' tensors of a state dict in any known naming, by official names.

    Wrappers' prefixes (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, `model.`, `state_dict.`) are taken off; of a
    teacher and a student the teacher is taken; `blocks.{chunk}.{i}` becomes `blocks.{i}`; Hugging Face's names are
    translated, and so are timm's, known by having no mask token, which only training needs. Names that mean nothing
    here stay among the backbone's, for the strict check to report.
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
    if {"cls_token", "pos_embed"} <= backbone.keys() and "mask_token" not in backbone:
        return _from_timm(backbone), heads
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): backbone[name] for name in backbone}, heads


def _from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a Dinov2 or Dinov2WithRegisters model's tensors by official names; a classifier's are left out."""
    official = _inverse(HUGGING_FACE_NAMES) | HUGGING_FACE_NEW_NAMES
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^dinov2(_with_registers)?\.", "", name)
        if not name.startswith("classifier."):
            renamed[_translated(name, "blocks", official)] = tensor
    for whole, (first, *others) in HUGGING_FACE_PARTS:
        for name in [name for name in renamed if f".{first}." in name]:
            parts = [name, *(name.replace(first, other) for other in others)]
            if all(part in renamed for part in parts):  # otherwise the strict check will report them
                renamed[name.replace(first, whole)] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def hugging_face_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's tensors as Dinov2Model and Dinov2WithRegistersModel have them in their files."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attn.qkv." in name:
            for part, rows in zip(HUGGING_FACE_QKV, tensor.chunk(3), strict=True):
                renamed[_translated(name, "encoder.layer", {"attn.qkv": part})] = rows
        else:
            renamed[_translated(name, "encoder.layer", HUGGING_FACE_NAMES)] = tensor
    return renamed


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a backbone's tensors as timm's `vit_*_dinov2` have them, those with registers as its `vit_*_reg4_dinov2`.

    timm has no mask token; with registers its position embedding has no slot for the class token, so that slot is
    added to the token itself.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != "mask_token"}
    if "register_tokens" in tensors:
        pos_embed = tensors["pos_embed"]
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + pos_embed[:, :1]
        tensors["pos_embed"] = pos_embed[:, 1:].contiguous()
    return {_translated(name, "blocks", TIMM_SWIGLU_NAMES): tensor for name, tensor in tensors.items()}


def _from_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one of timm's DINOv2 models by official names, the mask token zeros, as it starts."""
    tensors = dict(tensors)
    cls_token, pos_embed = tensors["cls_token"], tensors["pos_embed"]
    if "reg_token" in tensors:
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = torch.cat([torch.zeros_like(cls_token), pos_embed], dim=1)
    fc1, fc2 = tensors.get("blocks.0.mlp.fc1.weight"), tensors.get("blocks.0.mlp.fc2.weight")
    if fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[1]:  # gate and value: no MLP
        official = _inverse(TIMM_SWIGLU_NAMES)
        tensors = {_translated(name, "blocks", official): tensor for name, tensor in tensors.items()}
    return {**tensors, "mask_token": torch.zeros_like(cls_token[0])}


def _inverse(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _translated(name: str, blocks: str, new_of_old: Mapping[str, str]) -> str:
    """Return a tensor's name with its layer translated if known, and the number of its block behind `blocks`."""
    found = re.fullmatch(r"(?:(?:blocks|encoder\.layer)\.(\d+)\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL)
    assert found  # any name is
    block, layer, kind = found.groups(default="")
    return (f"{blocks}.{block}." if block else "") + new_of_old.get(layer, layer) + kind


def read_description(text: str, path: Path) -> dict[str, Any]:
    """Return the model.json that a weights file carries; raise ToolkitError if it is none."""
    try:
        return json_object(text)
    except ValueError as problem:
        what = f"{path} has a description of its model that is no JSON object ({_one_line(problem)})"
        raise ToolkitError(f"{what}; fetch it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise ToolkitError if it cannot be read or is none."""
    try:
        with open_regular(path) as file:
            return json_object(file.read())
    except (OSError, ValueError) as problem:
        raise ToolkitError(f"cannot read {path} ({_one_line(problem)}); write or fetch it again") from None
