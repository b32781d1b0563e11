"""Checkpoints: everything a run needs to resume exactly where it was.

`checkpoints/step-NNNNNNN/` holds

    model.json, teacher.safetensors   the teacher's backbone and heads, as a model that every command can read
    student.safetensors               the student's, by the same names
    buffers.safetensors               the model's other tensors, such as centers
    optimizer.pt                      torch.save; loads with weights_only=True
    state.json                        steps done, and what the loop adds
    checksums.json                    BLAKE2b of the other files

Of a large sharded model, `shards/` holds what student, buffers and optimizer hold here (see background.py).

A folder is written under a hidden name and renamed when it is complete. A run resumes from the newest one whose files
have their checksums; to compare them takes about a second a gigabyte. Random numbers need no state: they are a function
of the seed and the number of samples seen (see counter_rng.py).
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ... import console
from ...errors import ToolkitError
from ...features.launch import ALONE, Group
from ...models.head import ProjectionHead
from ...models.preprocess import Preprocess
from ...models.saved import MODEL_JSON, TEACHER_FILE, full_disk_said, save_model, save_students
from ...store.files import flush, remove, replacing, sweep, temporary_beside
from ...store.json_text import json_object
from ..objective.distill_model import DistillModel
from ..objective.feature_distill_model import FeatureDistillModel
from ..objective.multi_student import MultiStudent
from ..objective.networks import backbone_of
from ..objective.ssl_model import SSLModel
from .fsdp import placed_like, trained_state

TrainedModel = SSLModel | DistillModel | FeatureDistillModel | MultiStudent

STUDENT_FILE, BUFFERS_FILE = "student.safetensors", "buffers.safetensors"
OPTIMIZER_FILE, STATE_FILE, CHECKSUMS_FILE = "optimizer.pt", "state.json", "checksums.json"
SHARDS = "shards"  # a folder, in the place of the next three
FILES_OF_MAIN = (STUDENT_FILE, BUFFERS_FILE, OPTIMIZER_FILE)
FILES = (MODEL_JSON, TEACHER_FILE, *FILES_OF_MAIN, STATE_FILE)
DAMAGED = ".damaged-"  # before the name of a checkpoint that is none, until that step is saved again, or a later one


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
    best_step: int | None = None,
) -> Path:
    """Write a checkpoint, flush it, rename it into place, and remove all but the last `keep`; return its folder.

    An existing one is left alone: the same step has the same content. When the disk is full, nothing is left of it.

    Args:
        folder: the run's `checkpoints` folder, made if missing.
        model: not wrapped, with full tensors.
        optimizer_state: the state_dict of the student's optimizer, with full tensors.
        state: the loop's counts; `step`, the number of steps done, names the checkpoint.
        preprocess: how images are prepared for the teacher.
        best_step: the step of a checkpoint that is not removed.
    """
    final = checkpoint_of(folder, state["step"])
    if not final.exists():
        tensors = trained_state(model)
        if (name := first_not_finite(tensors)) is not None:
            raise ToolkitError(f"step {state['step']} left weights that are not finite ({name}), and is not saved")
        student = {name: value.contiguous() for name, value in model.student.state_dict().items()}
        buffers = {name: value for name, value in tensors.items() if not name.startswith(("student.", "teacher."))}
        with temporary_beside(final) as temporary, full_disk_said(folder):
            save_teacher(temporary, model, preprocess)
            save_file(student, temporary / STUDENT_FILE)
            save_file(buffers, temporary / BUFFERS_FILE)
            torch.save(optimizer_state, temporary / OPTIMIZER_FILE)
            complete(temporary, final, state)
    remove_older(final, keep, best_step)
    return final


def complete(temporary: Path, final: Path, state: Mapping[str, int]) -> None:
    """Write a checkpoint's state and checksums beside its other files, flush all, and rename the folder to `final`."""
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
    (temporary / CHECKSUMS_FILE).write_text(json.dumps(checksums(temporary), indent=1, sort_keys=True))
    for path in [*temporary.rglob("*"), temporary]:
        flush(path)
    os.rename(temporary, final)
    flush(final.parent)


def remove_older(final: Path, keep: int, best_step: int | None) -> None:
    """Remove what a new checkpoint replaces: damaged ones up to its step, and all but the last `keep`."""
    for damaged in final.parent.glob(f"{DAMAGED}step-*"):
        if damaged.name <= f"{DAMAGED}{final.name}":
            remove(damaged)
    prune_checkpoints(final.parent, keep, best_step)


def prune_checkpoints(folder: Path, keep: int, best_step: int | None = None) -> None:
    """Remove all checkpoints but the last `keep` and that of the best step.

    One that is half removed is no longer called a checkpoint.
    """
    for leftover in folder.glob(".step-*"):  # of a killed process of an earlier version
        remove(leftover)
    if folder.is_dir():
        sweep(folder)  # of one that was killed while it removed its last
    for old in checkpoints(folder)[:-keep]:
        if best_step is not None and old == checkpoint_of(folder, best_step):
            continue
        with temporary_beside(old) as temporary:
            os.rename(old, temporary)


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, damaged ones too, and the folder where nothing else is in it."""
    for old in [*checkpoints(folder), *folder.glob(f"{DAMAGED}step-*")]:
        remove(old)
    sweep(folder)
    with suppress(OSError):  # something else is in it
        folder.rmdir()


def checkpoint_of(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether it is there or not."""
    return folder / f"step-{step:07d}"


def copy_teacher(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint's teacher to a model folder, as `save_teacher` would write it there."""
    paths = [path for name in (TEACHER_FILE, MODEL_JSON) for path in checkpoint.rglob(name)]
    for path in sorted(
        paths, key=lambda path: (path.name == MODEL_JSON, -len(path.parts))
    ):  # the outer model.json last
        with replacing(folder / path.relative_to(checkpoint)) as temporary:
            shutil.copyfile(path, temporary)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that has a number that is not finite."""
    return next((name for name, value in tensors.items() if not _is_finite(value)), None)


def _is_finite(value: Tensor) -> bool:
    # The extremes, which are NaN where any number is, are found in a small part of the time.
    return not value.numel() or all(bool(extreme.isfinite()) for extreme in value.aminmax())


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a `checkpoints` folder, oldest first, complete unless something damaged them."""
    complete = (path for path in folder.glob("step-*") if re.fullmatch(r"step-[0-9]{7,10}", path.name))
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step-")))


def newest_whole(folder: Path, num_steps: int) -> Path | None:
    """Return the newest checkpoint that is whole, of a run of so many steps; None where there is none.

    It says which are damaged, and puts them aside under a hidden name. One process decides for all.
    """
    saved = checkpoints(folder)
    for number, path in reversed(list(enumerate(saved))):
        if (problem := damage(path, num_steps)) is None:
            return path
        aside = path.with_name(f"{DAMAGED}{path.name}")
        back = "going back to the one before" if number else "there is none before it, so the run starts anew"
        console.warn(f"checkpoint {path} is damaged ({problem}): {back}; kept as {aside.name}")
        remove(aside)
        os.rename(path, aside)
    return None


def damage(path: Path, num_steps: int) -> str | None:
    """Say what is wrong with a checkpoint of a run of so many steps, None where it is whole.

    One that an earlier version wrote, without checksums, is whole if all its files can be read.
    """
    is_in_shards = (path / SHARDS).is_dir()
    needed = [name for name in FILES if not (is_in_shards and name in FILES_OF_MAIN)]
    needed += [CHECKSUMS_FILE] if is_in_shards else []
    if missing := next((name for name in needed if not (path / name).is_file()), None):
        return f"it has no {missing}"
    try:
        state = json_object((path / STATE_FILE).read_text())
        known = json_object((path / CHECKSUMS_FILE).read_text()) if (path / CHECKSUMS_FILE).is_file() else None
        if not all(type(count) is int and count >= 0 for count in state.values()):
            return f"{STATE_FILE} is not as it was written"
        if state.get("step") != int(path.name.removeprefix("step-")) or state["step"] > num_steps:
            return f"{STATE_FILE} says step {state.get('step')}"
        if known is None:
            for name in (TEACHER_FILE, STUDENT_FILE, BUFFERS_FILE):
                load_file(path / name)
            torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
            return None
        found = checksums(path)
        if known.keys() != found.keys():
            return f"{CHECKSUMS_FILE} is not as it was written"
        broken = next((name for name in found if found[name] != known[name]), None)
        return None if broken is None else f"{broken} is not as it was written"
    except (OSError, ValueError, EOFError, LookupError, SafetensorError, UnpicklingError, RuntimeError) as problem:
        return " ".join(str(problem).split()) or type(problem).__name__


def checksums(folder: Path) -> dict[str, str]:
    """Return the BLAKE2b-128 hex digests of a checkpoint's files by their names, read at the same time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
    names = [path.relative_to(folder).as_posix() for path in files]
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(_digest, files), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def load_checkpoint(
    path: Path, model: TrainedModel, optimizer: torch.optim.Optimizer, processes: Group = ALONE
) -> dict[str, int]:
    """Load a checkpoint into the model and the optimizer, sharded or not, and return its state.

    The first process reads `path` and sends it to the others, whose disks need not have it.

    Raises:
        ToolkitError: if it was made by another model.
    """
    own = trained_state(model)
    tensors, moments = dict[str, Tensor](), dict[int, dict[str, Tensor]]()

    def read() -> tuple[list[str], list[int], Any, dict[str, int]]:
        tensors.update(_weights(path, own))
        saved = torch.load(path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        moments.update(saved["state"])
        return list(tensors), list(moments), saved["param_groups"], read_state(path)

    names, numbers, param_groups, state = processes.decide(read)
    placed = {}
    for name in names:
        value: Tensor = processes.decide(partial(tensors.__getitem__, name))
        placed[name] = placed_like(value, own[name])
    model.load_state_dict(placed, strict=False)  # compared when read; a frozen teacher is not in it
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number in numbers:  # AdamW's averages are placed as their weight
        weight = weights[number]
        entries: dict[str, Tensor] = processes.decide(partial(moments.__getitem__, number))
        moments[number] = {
            name: placed_like(value, weight) if value.shape == weight.shape else value
            for name, value in entries.items()
        }
    optimizer.load_state_dict({"state": moments, "param_groups": param_groups})
    return state


def _weights(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by name; raise ToolkitError where they are not those of `own`."""
    tensors = load_file(path / BUFFERS_FILE)
    for side, file in (("student", STUDENT_FILE), ("teacher", TEACHER_FILE)):
        tensors |= {f"{side}.{name}": value for name, value in load_file(path / file).items()}
    check_same_model(path, own, {name: tuple(value.shape) for name, value in tensors.items()})
    return tensors


def check_same_model(path: Path, own: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ToolkitError where a checkpoint's tensors, by their shapes, are not those of the model."""
    wanted = {name: tuple(value.shape) for name, value in own.items()}
    if wanted != found:
        name = min(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ToolkitError(
            f"checkpoint {path} is of another model: {name} is {found.get(name, 'missing')}, wanted "
            f"{wanted.get(name, 'missing')}; resume with the run's own config.toml"
        )


def read_state(path: Path) -> dict[str, int]:
    """Return the loop's counts of a checkpoint."""
    state: dict[str, int] = json.loads((path / STATE_FILE).read_text())
    return state
