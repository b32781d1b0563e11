"""A model on disk, as runs leave it: what is written, and what its description says.

A model folder (a run, or one of its checkpoints) is `model.json` + `teacher.safetensors`: all numbers needed to build
the backbone and its heads and to prepare images, and the weights as `backbone.*`, `dino_head.*`, `ibot_head.*`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ..errors import ToolkitError
from .architecture import BackboneSettings, HeadSettings, backbone_settings, head_settings
from .formats import MODEL_METADATA, read_json
from .head import ProjectionHead
from .vit import VisionTransformer

MODEL_JSON, TEACHER_FILE = "model.json", "teacher.safetensors"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the model's input: short side to image_size / crop_ratio, centre crop, normalisation."""

    image_size: int  # pixels a side
    crop_ratio: float
    mean: tuple[float, ...]  # a value a channel, of pixels in [0, 1]
    std: tuple[float, ...]
    bit_depth: int = 8  # or 16, of the pixels that are read; not said by older descriptions


@dataclass(frozen=True)
class SavedModel:
    """What a model.json says."""

    backbone: BackboneSettings
    heads: dict[str, HeadSettings]
    preprocessing: Preprocessing


def save_model(
    folder: Path,
    *,
    backbone: VisionTransformer,
    heads: Mapping[str, ProjectionHead],
    image_size: int,
    crop_ratio: float,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    bit_depth: int = 8,
) -> None:
    """Write teacher.safetensors and then model.json into a folder (made when missing), each whole or not at all.

    Args:
        backbone: its weights are kept in float32, as are the heads'.
        heads: `dino_head`, and `ibot_head` when it is apart; may be empty.
        image_size, crop_ratio, mean, std, bit_depth: as in `Preprocessing`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = model_description(backbone, heads, Preprocessing(image_size, crop_ratio, mean, std, bit_depth))
    parts: dict[str, nn.Module] = {"backbone": backbone, **heads}
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", torch.float32).contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    _write_whole(folder / TEACHER_FILE, lambda path: save_file(tensors, path, metadata={MODEL_METADATA: text}))
    _write_whole(folder / MODEL_JSON, lambda path: path.write_text(text, encoding="utf-8"))


def save_students(folder: Path, averages: nn.ModuleDict, names: Sequence[str]) -> None:
    """Write all students of a common distillation into one file, for going on, and a model.json that names them."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in averages.state_dict().items()}
    text = json.dumps({"format": 1, "students": list(names)}, indent=1) + "\n"
    _write_whole(folder / TEACHER_FILE, lambda path: save_file(tensors, path, metadata={MODEL_METADATA: text}))
    _write_whole(folder / MODEL_JSON, lambda path: path.write_text(text, encoding="utf-8"))


def model_description(
    backbone: VisionTransformer, heads: Mapping[str, ProjectionHead], preprocessing: Preprocessing
) -> str:
    """Return what a model.json says: all numbers needed to build the modules and to prepare images."""
    content = {
        "format": 1,
        "backbone": asdict(backbone_settings(backbone)),
        "heads": {name: asdict(head_settings(head)) for name, head in heads.items()},
        "preprocessing": asdict(preprocessing),
    }
    return json.dumps(content, indent=1) + "\n"


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_model_json(folder: Path) -> SavedModel:
    """Return what a model folder's model.json says.

    Raises:
        ToolkitError: if it is missing, no JSON, or lacks something.
    """
    path = folder / MODEL_JSON
    return saved_model(read_json(path), path)


def saved_model(described: Mapping[str, object], path: Path) -> SavedModel:
    """Return what a model description says; `path` is where it stands, for messages.

    Raises:
        ToolkitError: if it lacks something, or is of several students.
    """
    students = described.get("students")
    if isinstance(students, list):
        folders = ", ".join(str(path.parent / str(student)) for student in students)
        raise ToolkitError(f"{path.parent} holds several models; name one of {folders}")
    try:
        backbone, heads, preprocessing = (described[name] for name in ("backbone", "heads", "preprocessing"))
        assert isinstance(backbone, dict) and isinstance(heads, dict) and isinstance(preprocessing, dict)
        return SavedModel(
            BackboneSettings(**backbone),
            {name: HeadSettings(**numbers) for name, numbers in heads.items()},
            Preprocessing(
                **{**preprocessing, "mean": tuple(preprocessing["mean"]), "std": tuple(preprocessing["std"])}
            ),
        )
    except (KeyError, TypeError, AssertionError) as problem:
        raise ToolkitError(
            f"{path} is not a model description of this version ({problem}); save the model again"
        ) from None
