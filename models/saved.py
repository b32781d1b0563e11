"""A model on disk, as runs leave it.

A model folder (a run, or one of its checkpoints) is `model.json` + `teacher.safetensors`: the numbers that build the
backbone and its heads and prepare its images, and the weights as `backbone.*`, `dino_head.*`, `ibot_head.*`.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any  # of JSON

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ToolkitError
from ..store import files
from ..store.arrays import NO_SPACE
from .architecture import BackboneSettings, backbone_settings, head_settings
from .formats import MODEL_METADATA, read_json
from .head import ProjectionHead
from .preprocess import Preprocess
from .vit import VisionTransformer

MODEL_JSON, TEACHER_FILE = "model.json", "teacher.safetensors"


@dataclass(frozen=True)
class SavedModel:
    """What a model.json says; the heads' numbers show in their tensors too, so nothing reads them here."""

    backbone: BackboneSettings
    preprocess: Preprocess


def save_model(
    folder: Path, *, backbone: VisionTransformer, heads: Mapping[str, ProjectionHead], preprocess: Preprocess
) -> None:
    """Write teacher.safetensors and then model.json into a folder (made when missing), each whole or not at all.

    Args:
        backbone: its weights are kept in float32, as are the heads'.
        heads: `dino_head`, and `ibot_head` when it is apart; may be empty.
        preprocess: how the backbone wants its images.
    """
    tensors = cpu_tensors(nn.ModuleDict({"backbone": backbone, **heads}))
    _write(folder, tensors, model_description(backbone, heads, preprocess))


def save_students(folder: Path, averages: nn.ModuleDict, names: Sequence[str]) -> None:
    """Write the averages of all students of a common distillation into one file, to resume from, and their names."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in averages.state_dict().items()}
    _write(folder, tensors, json.dumps({"format": 1, "students": list(names)}, indent=1) + "\n")


def cpu_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors by name, on the CPU, in float32, contiguous."""
    return {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in module.state_dict().items()}


def model_description(backbone: VisionTransformer, heads: Mapping[str, ProjectionHead], preprocess: Preprocess) -> str:
    """Return the text of a model.json: all numbers needed to build the modules and to prepare images."""
    content = {
        "format": 1,
        "backbone": asdict(backbone_settings(backbone)),
        "heads": {name: head_settings(head) for name, head in heads.items()},
        "preprocessing": asdict(preprocess),
    }
    return json.dumps(content, indent=1) + "\n"


def _write(folder: Path, tensors: dict[str, Tensor], description: str) -> None:
    with files.replacing(folder / TEACHER_FILE) as temporary, full_disk_said(folder):
        save_file(tensors, temporary, metadata={MODEL_METADATA: description})
    files.write_text(folder / MODEL_JSON, description)


@contextmanager
def full_disk_said(folder: Path) -> Iterator[None]:
    """Turn what safetensors and torch raise of a full disk into a ToolkitError that names the folder."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as problem:
        # Neither passes the system's number on; torch's writer does not even say what happened.
        is_full = getattr(problem, "errno", None) in NO_SPACE
        if not is_full and not re.search(
            "No space left|File too large|Disk quota|PytorchStreamWriter|inline_container", str(problem)
        ):
            raise
        place = folder.parent if files.is_temporary(folder.name) else folder
        raise ToolkitError(f"no space left to write to {place}; make room, and run the same command again") from None


def read_model_json(folder: Path) -> SavedModel:
    """Return what a model folder's model.json says; raise ToolkitError if it is missing, no JSON, or incomplete."""
    path = folder / MODEL_JSON
    return saved_model(read_json(path), path)


def saved_model(description: Mapping[str, Any], path: Path) -> SavedModel:
    """Return what a model description says; `path` is where it stands, for messages.

    Raises:
        ToolkitError: if it lacks something, or is of several students.
    """
    if "students" in description:
        folders = ", ".join(str(path.parent / student) for student in description["students"])
        raise ToolkitError(f"{path.parent} holds several models; name one of {folders}")
    try:
        preprocess = description["preprocessing"]
        tuples = {name: tuple(preprocess[name]) for name in ("mean", "std")}
        return SavedModel(BackboneSettings(**description["backbone"]), Preprocess(**{**preprocess, **tuples}))
    except (KeyError, TypeError) as problem:
        raise ToolkitError(
            f"{path} is no model description of this version ({problem}); save the model again"
        ) from None
