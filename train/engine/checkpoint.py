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

from ...errors import ToolkitError
from ...models.head import ProjectionHead
from ...models.preprocess import Preprocess
from ...models.saved import TEACHER_FILE, save_model, save_students
from ...models.vit import VisionTransformer
from ..objective.distill_model import DistillModel
from ..objective.feature_distill_model import FeatureDistillModel
from ..objective.multi_student import MultiStudent
from ..objective.ssl_model import SSLModel
from .fsdp import placed_like

TrainedModel = SSLModel | DistillModel | FeatureDistillModel | MultiStudent

STUDENT_FILE, BUFFERS_FILE, OPTIMIZER_FILE, STATE_FILE = (
    "student.safetensors",
    "buffers.safetensors",
    "optimizer.pt",
    "state.json",
)


def save_teacher(folder: Path, model: TrainedModel, preprocess: Preprocess) -> None:
    """Write the teacher as a model folder, `model.json` last, which says how to prepare its images.

    Several students get a folder each in it, and `model.json` names them.
    """
    if isinstance(model, MultiStudent):
        for name, student in model.models.items():
            save_teacher(folder / name, student, preprocess)
        save_students(folder, model.teacher, list(model.models))
        return
    backbone, heads = model.teacher["backbone"], dict(model.teacher.items())
    del heads["backbone"]
    assert isinstance(backbone, VisionTransformer)
    save_model(
        folder,
        backbone=backbone,
        heads={name: head for name, head in heads.items() if isinstance(head, ProjectionHead)},
        preprocess=preprocess,
    )


def save_checkpoint(
    folder: Path,
    model: TrainedModel,
    optimizer_state: Mapping[str, object],
    state: Mapping[str, int],
    preprocess: Preprocess,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint aside, flush it, rename it into place, and remove all but the last `keep`.

    Args:
        folder: the run's `checkpoints` folder, made if missing.
        model: not wrapped, its shards put together.
        optimizer_state: the state_dict of the student's optimizer, likewise.
        state: the loop's counts; `step`, the number of steps done, names the checkpoint.
        preprocess: how the teacher wants its images.
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
    save_teacher(aside, model, preprocess)
    parts: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}, "": {}}
    for name, value in _own_state(model).items():
        part, _, rest = name.partition(".")
        holder, key = (part, rest) if part in parts else ("", name)
        parts[holder][key] = value.detach().contiguous()
    save_file(parts["student"], aside / STUDENT_FILE)
    save_file(parts[""], aside / BUFFERS_FILE)
    torch.save(optimizer_state, aside / OPTIMIZER_FILE)
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
    """Set the model and the optimizer, in shards or not, to a checkpoint's and return its state.

    Raises:
        ToolkitError: if it was made by another model.
    """
    tensors = load_file(path / BUFFERS_FILE)
    for part, file in (("student", STUDENT_FILE), ("teacher", TEACHER_FILE)):
        tensors |= {f"{part}.{name}": value for name, value in load_file(path / file).items()}
    own = _own_state(model)
    expected = {name: value.shape for name, value in own.items()}
    found = {name: value.shape for name, value in tensors.items()}
    if expected != found:
        name = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ToolkitError(
            f"checkpoint {path} is of another model: {name} is {_shape(found, name)}, wanted {_shape(expected, name)}; "
            "resume with the run's own config.toml"
        )
    placed = {name: placed_like(value, own[name]) for name, value in tensors.items()}
    model.load_state_dict(placed, strict=False)  # compared above; what is frozen comes from elsewhere
    saved = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, entries in saved["state"].items():  # AdamW's averages lie as their weight does, its count is a number
        weight = weights[number]
        entries |= {name: placed_like(value, weight) for name, value in entries.items() if value.shape == weight.shape}
    optimizer.load_state_dict(saved)
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
