"""Checkpoints: everything a run needs to go on exactly where it was, written so that no crash leaves half of one.

`checkpoints/step-NNNNNNN/` holds

    model.json, teacher.safetensors   the teacher's backbone and heads, as a model that every command can read
    student.safetensors               the student's, by the same names
    buffers.safetensors               what else the model keeps, such as centers
    optimizer.pt                      torch.save; loads with weights_only=True
    state.json                        steps done, and what the loop adds

Chance needs no state: every draw is a function of the seed and the number of samples seen (see draws.py).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import ToolkitError
from ..models.head import ProjectionHead
from ..models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ..models.vit import VisionTransformer
from ..models.weights import TEACHER_FILE, save_model, save_students
from .distill_model import DistillModel
from .feature_distill_model import FeatureDistillModel
from .several_students import SeveralStudents
from .ssl_model import SSLModel

TrainedModel = SSLModel | DistillModel | FeatureDistillModel | SeveralStudents

STUDENT_FILE, BUFFERS_FILE, OPTIMIZER_FILE, STATE_FILE = (
    "student.safetensors",
    "buffers.safetensors",
    "optimizer.pt",
    "state.json",
)


def save_teacher(folder: Path, model: TrainedModel, *, image_size: int, crop_ratio: float) -> None:
    """Write the teacher as a model folder, `model.json` last (arguments as in `models.weights.save_model`).

    Several students get a folder each in it, and `model.json` names them.
    """
    if isinstance(model, SeveralStudents):
        for name, student in model.models.items():
            save_teacher(folder / name, student, image_size=image_size, crop_ratio=crop_ratio)
        save_students(folder, model.teacher, list(model.models))
        return
    backbone, heads = model.teacher["backbone"], dict(model.teacher.items())
    del heads["backbone"]
    assert isinstance(backbone, VisionTransformer)
    save_model(
        folder,
        backbone=backbone,
        heads={name: head for name, head in heads.items() if isinstance(head, ProjectionHead)},
        image_size=image_size,
        crop_ratio=crop_ratio,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def save_checkpoint(
    folder: Path,
    model: TrainedModel,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, int],
    *,
    image_size: int,
    crop_ratio: float,
    keep: int,
) -> Path:
    """Write a checkpoint aside, flush it, rename it into place, and remove all but the last `keep`.

    Args:
        folder: the run's `checkpoints` folder, made if missing.
        model: not wrapped.
        optimizer: of the student.
        state: the loop's counts; `step`, the number of steps done, names the checkpoint.
        image_size, crop_ratio: as in `models.weights.save_model`.
        keep: how many checkpoints stay, this one included.

    Returns:
        The checkpoint's folder. One that is there already is left alone: same step, same content.
    """
    final = folder / f"step-{state['step']:07d}"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):  # of a killed process
        shutil.rmtree(leftover)
    aside = folder / f".{final.name}"
    save_teacher(aside, model, image_size=image_size, crop_ratio=crop_ratio)
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "": {}}
    for name, value in _own_state(model).items():
        part, _, rest = name.partition(".")
        holder, key = (part, rest) if part in parts else ("", name)
        parts[holder][key] = value.detach().contiguous()
    save_file(parts["student"], aside / STUDENT_FILE)
    save_file(parts[""], aside / BUFFERS_FILE)
    torch.save(optimizer.state_dict(), aside / OPTIMIZER_FILE)
    (aside / STATE_FILE).write_text(json.dumps(state, indent=1))
    for path in [*aside.iterdir(), aside]:
        _flush(path)
    os.rename(aside, final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a `checkpoints` folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def load_checkpoint(path: Path, model: TrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Set the model and the optimizer to a checkpoint's and return its state.

    Raises:
        ToolkitError: if it was made by another model.
    """
    tensors = load_file(path / BUFFERS_FILE)
    for part, file in (("student", STUDENT_FILE), ("teacher", TEACHER_FILE)):
        tensors |= {f"{part}.{name}": value for name, value in load_file(path / file).items()}
    expected = {name: value.shape for name, value in _own_state(model).items()}
    found = {name: value.shape for name, value in tensors.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ToolkitError(
            f"checkpoint {path} is of another model: {name} is {_shape(found, name)}, wanted {_shape(expected, name)}; "
            "resume with the run's own config.toml"
        )
    model.load_state_dict(tensors, strict=False)  # compared above; what is frozen comes from elsewhere
    optimizer.load_state_dict(torch.load(path / OPTIMIZER_FILE, weights_only=True))
    state: dict[str, int] = json.loads((path / STATE_FILE).read_text())
    return state


def _own_state(model: TrainedModel) -> dict[str, Tensor]:
    """Return all that training changes: everything but the frozen model of a distillation."""
    state: dict[str, Tensor] = model.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("frozen.")}


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "missing"


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
