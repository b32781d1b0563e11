"""Checkpoints of a large sharded model: every process writes its own shards, in the background, while training goes on.

`checkpoints/step-NNNNNNN/` then holds

    model.json, teacher.safetensors   the teacher, whole, as in every checkpoint
    shards/*.safetensors              each process's shards of student, centers and AdamW's averages
    state.json, checksums.json        as in every checkpoint

torch's distributed checkpoints (DCP) write and read the shards, as safetensors: their own format is a pickle. So any
number of processes can resume, each reading what it needs. A checkpoint takes its name when all have written.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ... import console
from ...errors import ToolkitError
from ...features.launch import ALONE, PATIENCE, Group
from ...models.preprocess import Preprocess
from ...models.saved import full_disk_said
from ...store.files import remove, temporary_beside
from ..objective.networks import own_shard
from .checkpoint import (
    SHARDS,
    TrainedModel,
    check_same_model,
    checkpoint_of,
    complete,
    first_not_finite,
    read_state,
    remove_older,
    save_teacher,
)
from .fsdp import trained_state

# Chosen: from this size on, the main process would keep all others waiting for ten seconds, at a gigabyte a second.
LARGE_BYTES = 10 << 30
TEACHER_SHARDS = "teacher-shards"  # until the main process has put them together
AVERAGES, STEPS = ("exp_avg", "exp_avg_sq"), "optimizer_steps"

Tensors = dict[str, Tensor]


def background_checkpoints(
    folder: Path, model: TrainedModel, empty: TrainedModel | None, preprocess: Preprocess, processes: Group
) -> "BackgroundCheckpoints | None":
    """Return what writes the checkpoints of a large sharded model into `folder`; None where the main process does.

    All `processes` must call it. `empty` is the model's `meta_copy`, None where it is not sharded.
    """
    if empty is None or checkpoint_bytes(model) < LARGE_BYTES:
        return None
    if not is_shared(folder.parent, processes):
        console.say(f"not all processes see {folder.parent}: the main one writes checkpoints whole, while all wait")
        return None
    own, teacher = checkpoint_bytes(model, own=True), sum(value.nbytes for value in empty.teacher.state_dict().values())
    console.say(
        f"checkpoints of {checkpoint_bytes(model) / 2**30:.1f} GiB are written in the background; in main memory each "
        f"process keeps a copy of its {own / 2**30:.1f} GiB, and while it writes a second one; the main process also a "
        f"teacher of {teacher / 2**30:.1f} GiB"
    )
    # The thread has a group of its own, since the training goes on exchanging beside it.
    own_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return BackgroundCheckpoints(folder, empty, preprocess, replace(processes, host=own_group))


def checkpoint_bytes(model: TrainedModel, *, own: bool = False) -> int:
    """Return the size of a checkpoint, or of this process's `own` part: the weights, and AdamW's two averages."""
    averaged = [weight for weight in model.student.parameters() if weight.requires_grad]
    tensors = [*trained_state(model).values(), *averaged, *averaged]
    return sum((own_shard(tensor) if own else tensor).nbytes for tensor in tensors)


class BackgroundCheckpoints:
    """Writes one checkpoint at a time while training goes on. Every process has one, and makes the same calls.

    Args:
        folder: the run's `checkpoints` folder, on a disk that all processes share.
        empty: the model's `meta_copy`.
        preprocess: how images are prepared for the teacher.
        processes: all, by a group that nothing else uses.
    """

    def __init__(self, folder: Path, empty: TrainedModel, preprocess: Preprocess, processes: Group) -> None:
        self._place = (folder, empty, preprocess, processes)
        on_gpu = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
        )
        self._stager = DefaultStager(options)  # keeps its memory from one checkpoint to the next
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        model: TrainedModel,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, int],
        *,
        keep: int,
        best_step: int | None,
    ) -> None:
        """Copy the shards and begin to write them, once those before are written; arguments as in `save_checkpoint`."""
        self.wait()
        teacher, others = shards_of(model, optimizer)
        staged = self._stager.stage({"teacher": teacher, "others": others})
        assert isinstance(staged, dict)  # and no future, as `use_async_staging` makes one
        self._pending = self._thread.submit(
            write_shards, *self._place, **staged, state=dict(state), keep=keep, best_step=best_step
        )

    def wait(self) -> None:
        """Wait until all is written. Raises ToolkitError where it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def is_shared(folder: Path, processes: Group) -> bool:
    """Tell whether all processes see what the first one writes into a folder."""
    with temporary_beside(folder / SHARDS) if processes.is_first else nullcontext(folder) as mark:
        if processes.is_first:
            mark.touch()
        name = processes.decide(lambda: mark.name)
        return all(processes.gather((folder / name).exists()))


def write_shards(
    folder: Path,
    empty: TrainedModel,
    preprocess: Preprocess,
    processes: Group,
    *,
    teacher: Tensors,
    others: Tensors,
    state: Mapping[str, int],
    keep: int,
    best_step: int | None,
) -> None:
    """Write a checkpoint from the shards of all processes, which all call this; arguments as in `save_checkpoint`."""
    final = checkpoint_of(folder, state["step"])
    if not processes.decide(final.exists):
        local = {name: own_shard(value) for name, value in (teacher | others).items()}
        if bad := next(filter(None, processes.gather(first_not_finite(local))), None):
            raise ToolkitError(f"step {state['step']} left weights that are not finite ({bad}), and is not saved")
        own = temporary_beside(final) if processes.is_first else nullcontext(folder)
        with own as place, said(final), full_disk_said(folder):
            temporary = folder / processes.decide(lambda: place.name)
            for part, tensors in ((TEACHER_SHARDS, teacher), (SHARDS, others)):
                writer = HuggingFaceStorageWriter(str(temporary / part), save_distributed=True)
                save(tensors, storage_writer=writer, process_group=processes.host)
            if processes.is_first:
                save_teacher(temporary, whole_teacher(temporary / TEACHER_SHARDS, empty), preprocess)
                remove(temporary / TEACHER_SHARDS)
                complete(temporary, final, state)
    if processes.is_first:
        remove_older(final, keep, best_step)


def whole_teacher(folder: Path, empty: TrainedModel) -> TrainedModel:
    """Return a model whose teacher, in main memory, is put together from shards; the rest stays empty."""
    teacher = {name: torch.empty_like(value, device="cpu") for name, value in empty.teacher.state_dict().items()}
    read(folder, teacher)
    model = copy.deepcopy(empty)
    model.teacher.load_state_dict(teacher, assign=True)
    return model


def load_shards(
    path: Path, model: TrainedModel, optimizer: torch.optim.Optimizer, processes: Group = ALONE
) -> dict[str, int]:
    """Load such a checkpoint into the model and the optimizer, sharded or not, and return its state.

    Raises:
        ToolkitError: if it was made by another model, or not all processes see it.
    """
    if not all(processes.gather((path / SHARDS).is_dir())):
        raise ToolkitError(f"not all processes see {path / SHARDS}; resume on a disk that all share")
    teacher, others = shards_of(model, optimizer)
    for folder, tensors in ((path, teacher), (path / SHARDS, others)):
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        shapes = {name: tuple(entry.size) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
        check_same_model(path, tensors, shapes)
        read(folder, tensors)
    for weight, step in zip(trained_weights(model.student, optimizer).values(), others[STEPS], strict=True):
        optimizer.state[weight]["step"].copy_(step)
    return read_state(path)


def read(folder: Path, tensors: Tensors) -> None:
    """Fill tensors from a folder's safetensors, sharded or not; of a DTensor, what this process has of it."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled.*single process")  # as is meant
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def shards_of(model: TrainedModel, optimizer: torch.optim.Optimizer) -> tuple[Tensors, Tensors]:
    """Return the teacher's tensors, and the others of a checkpoint: student, buffers, AdamW's averages and steps.

    All but the steps are the model's and the optimizer's own tensors. A weight that AdamW has not updated yet gets the
    averages that it would begin with.
    """
    tensors = trained_state(model)
    teacher = {name.removeprefix("teacher."): value for name, value in tensors.items() if name.startswith("teacher.")}
    others = {name: value for name, value in tensors.items() if not name.startswith("teacher.")}
    steps = []
    for name, weight in trained_weights(model.student, optimizer).items():
        if not optimizer.state.get(weight):
            first_step = torch.zeros((), device=weight.device if optimizer.defaults["fused"] else "cpu")
            optimizer.state[weight] = {"step": first_step} | {key: torch.zeros_like(weight) for key in AVERAGES}
        others |= {f"{average}.{name}": optimizer.state[weight][average] for average in AVERAGES}
        steps.append(optimizer.state[weight]["step"])
    return teacher, others | {STEPS: torch.stack(steps)}


def trained_weights(student: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the weights that an optimizer updates, by name."""
    updated = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return {name: weight for name, weight in student.named_parameters() if id(weight) in updated}


@contextmanager
def said(checkpoint: Path) -> Iterator[None]:
    """Turn what DCP raises when a process cannot write into a ToolkitError."""
    try:
        yield
    except CheckpointException as problem:
        rank, (cause, _) = next(iter(problem.failures.items()))
        raise ToolkitError(f"process {rank} could not write its part of {checkpoint}: {cause}") from None
