"""The processes of a training run: how they meet, what they compute by, and how the batch is shared out."""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from .. import console
from ..errors import ToolkitError
from ..features.launch import PATIENCE, Group, adopt_slurm
from ..models.cpu import keep_freed_memory
from .config import TrainConfig
from .engine.fsdp import copies_and_shards, sharding
from .engine.half_precision import supported
from .engine.schedules import batch_sizes
from .launch import check_launch

# Of what GPUs exchange in a step; chosen. While one works alone, as when it saves, the others wait in the host group.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def start_processes(config: TrainConfig, track: Sequence[str], run_folder: Path) -> tuple[Accelerator, Group]:
    """Return the Accelerator of this process, which logs to `track`, and the group of all that a launcher started.

    Raises:
        ToolkitError: if the launcher's processes do not find one another, or the batch cannot be shared out among them.
    """
    keep_freed_memory()
    if config.deterministic:
        compute_deterministically()
    adopt_slurm(os.environ)
    check_launch(os.environ)
    in_shards = sharding(os.environ) is not None
    if in_shards and "WORLD_SIZE" not in os.environ:
        raise ToolkitError("FSDP is asked for with one process alone; start several with --num-processes or torchrun")
    precision = supported(config.mixed_precision)
    if precision != config.mixed_precision:  # pragma: no cover  # needs an old GPU
        console.say(f"this GPU has no {config.mixed_precision}: training in {precision} with a scaled loss")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        torch.set_float32_matmul_precision("high")
        console.say("products of float32 matrices are computed in TF32")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # without it Accelerate ignores torchrun on a machine without GPU
            mixed_precision=precision,
            log_with=list(track) or None,
            project_dir=run_folder,
            kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        )
    except ValueError as problem:  # of one of its variables
        names = ", ".join(name for name in sorted(os.environ) if name.startswith("ACCELERATE_"))
        raise ToolkitError(f"Accelerate refuses the environment ({problem}); correct or unset {names}") from None
    # Its own scaler would be another for each shard; `LossScale` takes its place. And it leaves fp16 out on CPUs.
    accelerator.scaler, accelerator.native_amp = None, precision != "no"
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ToolkitError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes and Accelerate sees "
            f"{accelerator.num_processes}; start them with --num-processes, torchrun or srun"
        )
    check_batch(config, accelerator.num_processes)
    if not accelerator.is_main_process:
        console.set_verbosity(quiet=True, verbose=0)
    if in_shards:
        copies, shards = copies_and_shards(os.environ, accelerator.num_processes)
        console.say(f"FSDP2: weights in shards over {shards} processes{f', {copies} copies' if copies > 1 else ''}")
    host = dist.new_group(backend="gloo", timeout=PATIENCE) if accelerator.num_processes > 1 else None
    processes = Group(accelerator.process_index, accelerator.num_processes, host)
    if len(found := set(processes.gather(precision))) > 1:
        raise ToolkitError(f"the GPUs compute in {' and '.join(sorted(found))}; set mixed_precision=fp16 for all")
    return accelerator, processes


def compute_deterministically() -> None:
    """Have this process add up in a fixed order on GPUs too, or raise where torch cannot; before it uses a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.backends.cudnn.benchmark = False  # which would choose an algorithm by its time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads any
    torch.use_deterministic_algorithms(True)


def check_batch(config: TrainConfig, num_processes: int) -> None:
    """Raise ToolkitError when a batch cannot be shared out evenly, at least two images to each process."""
    micro_batch_size = 0 if config.micro_batch_size == "auto" else config.micro_batch_size
    for size in batch_sizes(config.batch_size).sizes:
        if size % num_processes or size < 2 * num_processes:
            raise ToolkitError(
                f"batch_size {size} does not give each of {num_processes} processes the same number of "
                "images, two or more; change one of the two"
            )
        own = size // num_processes
        if config.koleo_weight and micro_batch_size and own % micro_batch_size == 1:
            raise ToolkitError(
                f"micro_batch_size {micro_batch_size} leaves a single one of the {own} images of a process, and KoLeo "
                "needs two; choose another, or set koleo_weight=0"
            )
