"""A run folder before the training loop: whether it is there already, what it holds, which processes work on it."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from .. import console
from ..errors import ToolkitError
from ..features.launched import adopt_slurm
from ..models.saved import MODEL_JSON
from ..models.vit import VisionTransformer
from ..store.artifact import Options, Result, difference, read_run_provenance, write_run_provenance
from ..store.lock import held
from ..store.manifest import Provenance, Source
from ..store.memory import keep_freed_memory
from .config import CONFIG_FILE, COST_KEYS, TrainConfig, write_config
from .data.images import ImageSet
from .engine.checkpoint import TrainedModel, checkpoints
from .engine.fsdp import sharding
from .engine.schedules import batch_sizes, scaled_lr
from .launch import check_launch
from .monitor.online_knn import LabelledSets, labelled_sets
from .monitor.trackers import check_trackers

CHECKPOINTS, LOCK = "checkpoints", ".lock"
LONGEST_WAIT = timedelta(hours=2)  # chosen: of the processes for the main one, which saves and looks at labelled images


@dataclass(frozen=True)
class Watching:
    """What is looked at beside the training, which it does not change."""

    eval_train: str | None = None  # labelled images that vote in the k-NN of a run's features
    eval_test: str | None = None  # those whose class is guessed
    track: tuple[str, ...] = ()  # trackers that get the metrics
    preview: str | None = None  # a PNG of crops and masks

    def open(self) -> LabelledSets | None:
        """Return the labelled images, if there are any; raise ToolkitError for whatever cannot be watched."""
        check_trackers(self.track)
        if self.eval_train is None and self.eval_test is None:
            return None
        if self.eval_train is None or self.eval_test is None:
            raise ToolkitError("--eval-train and --eval-test go together; give both, or neither")
        return labelled_sets(self.eval_train, self.eval_test)


NOTHING = Watching()


def run_provenance(command: str, config: TrainConfig, options: Options, sources: tuple[Source, ...]) -> Provenance:
    """Return what makes a run the run it is: all settings but those that only change its cost."""
    parameters = {name: value for name, value in asdict(config).items() if name not in (*COST_KEYS, "seed")}
    if options.limit is not None:
        parameters["limit"] = options.limit
    # As JSON keeps them (lists for tuples), so that they compare equal to what is read back.
    return Provenance("run", command, json.loads(json.dumps(parameters)), seed=config.seed, inputs=sources)


def is_done(run_folder: Path, provenance: Provenance, options: Options, resume: bool) -> bool:
    """Tell whether the folder holds this very run, finished; if so, touch its model.json and say so.

    Raises:
        ToolkitError: if something else stands there, or the run is unfinished and `resume` is not given.
    """
    if not run_folder.exists() or (run_folder.is_dir() and all(entry.name == LOCK for entry in run_folder.iterdir())):
        return False
    there = read_run_provenance(run_folder) if run_folder.is_dir() else None
    if there is None:
        raise ToolkitError(f"{run_folder} exists and is no run folder; choose another -o")
    if options.force:
        return False
    if not there.same_work(provenance):
        raise ToolkitError(
            f"{run_folder} was made otherwise ({difference(there, provenance)}); choose another -o, "
            "or --force to start over"
        )
    if (run_folder / MODEL_JSON).exists():
        console.say(f"{run_folder} is up to date")
        if not options.dry_run:
            os.utime(run_folder / MODEL_JSON)
        return True
    saved = checkpoints(run_folder / CHECKPOINTS)
    if saved and not resume:
        raise ToolkitError(
            f"{run_folder} holds an unfinished run ({saved[-1].name}); go on with --resume, or --force to start over"
        )
    return False


@contextmanager
def own_folder(run_folder: Path, config: TrainConfig, provenance: Provenance, options: Options) -> Iterator[None]:
    """Hold the run folder, emptied under --force, with `config.toml` and `provenance.json`.

    Raises ToolkitError when another process trains into it.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    with held(run_folder / LOCK, f"training into {run_folder}"):
        for entry in run_folder.iterdir() if options.force else ():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        write_run_provenance(run_folder, provenance)
        write_config(config, run_folder / CONFIG_FILE, "Every setting of this run; --recipe with this file repeats it.")
        yield


def check_batch(config: TrainConfig, num_processes: int) -> None:
    """Raise ToolkitError when a batch cannot be shared out evenly, at least two images to each process."""
    smallest = 2 if config.koleo_weight else 1
    unfit = [n for n in batch_sizes(config.batch_size).sizes if n % num_processes or n < 2 * num_processes]
    if unfit:
        raise ToolkitError(
            f"batch_size {unfit[0]} does not give each of {num_processes} processes the same number of "
            "images, two or more; change one of the two"
        )
    size = config.micro_batch_size
    uneven = [n // num_processes for n in batch_sizes(config.batch_size).sizes if size and n // num_processes % size]
    if any(n % size < smallest for n in uneven):
        raise ToolkitError(
            f"micro_batch_size {size} leaves a single one of the {uneven[0]} images of a process, and KoLeo needs "
            "two; choose another, or set koleo_weight=0"
        )


def finished_result(output: str) -> Result:
    """Return what a finished run folder holds, as a command's result."""
    provenance = read_run_provenance(Path(output))
    return Result(output, {} if provenance is None else provenance.figures)


def start_processes(config: TrainConfig, track: Sequence[str], run_folder: Path) -> Accelerator:
    """Return the Accelerator of this process, which knows of all the others that a launcher started.

    Args:
        track: trackers that it logs to, in the run folder where they keep files.

    Raises:
        ToolkitError: if the launcher's processes do not find one another, or the batch cannot be shared out among them.
    """
    keep_freed_memory()
    adopt_slurm(os.environ)
    check_launch(os.environ)
    in_shards = sharding(os.environ) is not None
    if in_shards and "WORLD_SIZE" not in os.environ:
        raise ToolkitError("FSDP is asked for with one process alone; start several with --num-processes or torchrun")
    if config.mixed_precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise ToolkitError("this GPU has no bfloat16; set mixed_precision=no")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without it Accelerate ignores torchrun on a machine without GPU
        mixed_precision=config.mixed_precision,
        log_with=list(track) or None,
        project_dir=run_folder,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ToolkitError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes and Accelerate sees "
            f"{accelerator.num_processes}; start them with --num-processes, torchrun or srun"
        )
    check_batch(config, accelerator.num_processes)
    if not accelerator.is_main_process:
        console.set_verbosity(quiet=True, verbose=0)
    if in_shards:
        console.say(f"FSDP2: weights in shards over {accelerator.num_processes} processes")
    return accelerator


def describe(config: TrainConfig, images: ImageSet, model: TrainedModel, num_processes: int) -> None:
    """Say what a run trains on what, and for how long."""
    backbones = [part for part in model.student.values() if isinstance(part, VisionTransformer)]
    backbone = sum(weight.numel() for part in backbones for weight in part.parameters())
    everything = sum(weight.numel() for weight in model.student.parameters())
    sizes = batch_sizes(config.batch_size)
    samples = sizes.images_until(config.steps)
    batch = f"{sizes.at(0)}" if len(sizes.sizes) == 1 else f"{sizes.at(0)} to {sizes.at(config.steps - 1)}"
    console.say(
        f"{config.arch}: {backbone / 1e6:.2f} M parameters, {(everything - backbone) / 1e6:.2f} M more in heads; "
        f"{config.steps:,} steps of {batch} images in {num_processes} "
        f"{'process' if num_processes == 1 else 'processes'}: {samples:,} samples, "
        f"{samples / len(images):.1f} passes over {len(images):,} images; peak learning rate "
        f"{scaled_lr(config.base_lr, sizes.at(0)):.2e} (base_lr * sqrt(batch_size / 1024))"
    )
