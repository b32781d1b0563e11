"""Checkpoints: everything a run needs to resume exactly where it was.

`checkpoints/step-NNNNNNN/` holds

    model.json, teacher.safetensors   the teacher's backbone and heads, as a model that every command can read
    student.safetensors               the student's, by the same names
    buffers.safetensors               the model's other tensors, such as centers
    optimizer.pt                      torch.save; loads with weights_only=True
    state.json                        steps done, and what the loop adds

A folder is written under a hidden name and renamed when it is complete. Random numbers need no state: they are a
function of the seed and the number of samples seen (see counter_rng.py).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...errors import ToolkitError
from ...models.head import ProjectionHead
from ...models.preprocess import Preprocess
from ...models.saved import TEACHER_FILE, save_model, save_students
from ..objective.distill_model import DistillModel
from ..objective.feature_distill_model import FeatureDistillModel
from ..objective.multi_student import MultiStudent
from ..objective.networks import backbone_of
from ..objective.ssl_model import SSLModel
from .fsdp import placed_like, trained_state

TrainedModel = SSLModel | DistillModel | FeatureDistillModel | MultiStudent

STUDENT_FILE, BUFFERS_FILE = "student.safetensors", "buffers.safetensors"
OPTIMIZER_FILE, STATE_FILE = "optimizer.pt", "state.json"


def save_teacher(folder: Path, model: TrainedModel, preprocess: Preprocess) -> None:
    """Write the teacher as a model folder, `model.json` last; of several students one folder each, inside it."""
    if isinstance(model, MultiStudent):
        for name, student in model.models.items():
            save_teacher(folder / name, student, preprocess)
        save_students(folder, model.teacher, list(model.models))
        return
    heads = {name: network for name, network in model.teacher.items() if isinstance(network, ProjectionHead)}
    save_model(folder, backbone=backbone_of(model.teacher), heads=heads, preprocess=preprocess)


def save_checkpoint(
    folder: Path,
    model: TrainedModel,
    optimizer_state: Mapping[str, object],
    state: Mapping[str, int],
    preprocess: Preprocess,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, flush it, rename it into place, and remove all but the last `keep`; return its folder.

    An existing one is left alone: the same step has the same content.

    Args:
        folder: the run's `checkpoints` folder, made if missing.
        model: not wrapped, with full tensors.
        optimizer_state: the state_dict of the student's optimizer, with full tensors.
        state: the loop's counts; `step`, the number of steps done, names the checkpoint.
        preprocess: how images are prepared for the teacher.
    """
    final = folder / f"step-{state['step']:07d}"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):  # of a killed process
        shutil.rmtree(leftover)
    temporary = folder / f".{final.name}"
    save_teacher(temporary, model, preprocess)
    student = {name: value.contiguous() for name, value in model.student.state_dict().items()}
    buffers = {
        name: value for name, value in trained_state(model).items() if not name.startswith(("student.", "teacher."))
    }
    save_file(student, temporary / STUDENT_FILE)
    save_file(buffers, temporary / BUFFERS_FILE)
    torch.save(optimizer_state, temporary / OPTIMIZER_FILE)
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    os.rename(temporary, final)
    _flush(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a `checkpoints` folder, oldest first."""
    complete = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def load_checkpoint(path: Path, model: TrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Load a checkpoint into the model and the optimizer, sharded or not, and return its state.

    Raises:
        ToolkitError: if it was made by another model.
    """
    tensors = load_file(path / BUFFERS_FILE)
    for side, file in (("student", STUDENT_FILE), ("teacher", TEACHER_FILE)):
        tensors |= {f"{side}.{name}": value for name, value in load_file(path / file).items()}
    own = trained_state(model)
    wanted, found = ({name: tuple(value.shape) for name, value in state.items()} for state in (own, tensors))
    if wanted != found:
        name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ToolkitError(
            f"checkpoint {path} is of another model: {name} is {found.get(name, 'missing')}, wanted "
            f"{wanted.get(name, 'missing')}; resume with the run's own config.toml"
        )
    placed = {name: placed_like(value, own[name]) for name, value in tensors.items()}
    model.load_state_dict(placed, strict=False)  # compared above; a frozen teacher is not in it
    saved = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, entries in saved["state"].items():  # AdamW's averages are placed as their weight
        weight = weights[number]
        entries |= {name: placed_like(value, weight) for name, value in entries.items() if value.shape == weight.shape}
    optimizer.load_state_dict(saved)
    state: dict[str, int] = json.loads((path / STATE_FILE).read_text())
    return state


def _flush(path: Path) -> None:
    """Write a file, or a folder's entries, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
