"""What surrounds the training loop: checks before it, processes, the run folder, and its record afterwards."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypedDict

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import best_device
from ..features.launch import Group, adopt_slurm, is_launched, launch, needs_others, prints_result
from ..models.cpu import keep_freed_memory
from ..models.saved import MODEL_JSON, TEACHER_FILE
from ..models.vit import VisionTransformer
from ..models.weights import model_content_id
from ..store import catalog
from ..store.artifact import (
    RUN_PROVENANCE,
    Options,
    Result,
    check_not_input,
    check_place,
    difference,
    read_run_provenance,
    record_missing,
    recorded,
    write_run_provenance,
)
from ..store.files import TEMPORARY, remove, sweep, write_text
from ..store.image_columns import read_images
from ..store.lock import held
from ..store.manifest import Provenance, Source, open_manifest
from .config import CONFIG_FILE, COST_KEYS, HEADING, TrainConfig, write_config
from .counter_rng import derived_seed
from .data.images import ImageSet, decoded_bytes, image_set
from .data.multicrop import decoded_side_px
from .data.preview import draw_preview
from .engine.checkpoint import TrainedModel, checkpoints
from .engine.fsdp import sharding
from .engine.parallelize import check_compiler
from .engine.schedules import batch_sizes, scaled_lr
from .launch import DONE, STATUS, check_launch, status_kept
from .monitor.estimate import say_cost
from .monitor.memory import fitted, free_bytes_of, say_memory
from .monitor.metrics import METRICS_FILE, METRICS_TABLE, peak_memory_mib, read_metrics
from .monitor.online_knn import LabelledSets, held_out, labelled_sets
from .monitor.trackers import check_trackers, tracked

CHECKPOINTS, LOCK = "checkpoints", ".lock"
# What a run writes into its folder, and removes under --force; students of several have folders with MODEL_JSON.
WRITTEN = (CONFIG_FILE, CHECKPOINTS, METRICS_FILE, METRICS_TABLE, STATUS, RUN_PROVENANCE, MODEL_JSON, TEACHER_FILE)
PROCESS_TIMEOUT = timedelta(hours=2)  # chosen: other processes wait while the main one saves and computes the k-NN


@dataclass(frozen=True)
class MonitorOptions:
    """What is measured and drawn beside the training, which it does not change."""

    eval_train: str | None = None  # labelled images that vote in the k-NN of a run's features
    eval_test: str | None = None  # those whose class is predicted
    eval_share: float | None = None  # of the labels of the images to train on, which are predicted by the others
    track: tuple[str, ...] = ()  # trackers that get the metrics
    preview: str | None = None  # a PNG of crops and masks
    profile: int = 0  # steps to trace

    def check(self, manifest: Path, seed: int) -> LabelledSets | None:
        """Return the labelled images, if any are given; raise ToolkitError for options that cannot be followed.

        `manifest` has the images to train on, and `seed` draws some of its labels under `eval_share`.
        """
        check_trackers(self.track)
        if self.eval_share is not None:
            if self.eval_train is not None or self.eval_test is not None:
                raise ToolkitError(
                    "--eval-share takes the manifest's own labels; leave --eval-train and --eval-test out"
                )
            return held_out(str(manifest), self.eval_share, seed)
        if self.eval_train is not None and self.eval_test is not None:
            return labelled_sets(self.eval_train, self.eval_test)
        if self.eval_train != self.eval_test:
            raise ToolkitError("--eval-train and --eval-test go together; give both, or neither")
        return None


NO_MONITORING = MonitorOptions()


class LaunchOptions(TypedDict, total=False):
    """The arguments of `run_training` that every command of training passes on to it."""

    resume: bool
    num_processes: int
    monitor: MonitorOptions


@dataclass(frozen=True)
class Run:
    """What the training loop works on beside its model."""

    folder: Path
    config: TrainConfig
    provenance: Provenance
    images: ImageSet
    labelled: LabelledSets | None  # for the k-NN while it trains
    profile: int = 0  # steps to trace
    micro_batch_size: int = 0  # images of a process at a time, to begin with; 0 = all


def run_training(
    command: str,
    manifest_path: Path | None,
    output: str,
    config: TrainConfig,
    options: Options,
    build: Callable[[], TrainedModel],
    train: Callable[[TrainedModel, Run, Accelerator], dict[str, float]],
    *,
    sources: tuple[Source, ...] = (),
    resume: bool = False,
    num_processes: int = 1,
    monitor: MonitorOptions = NO_MONITORING,
) -> Result | None:
    """Train a model on a manifest's images and leave a run folder; return None after a dry run.

    Args:
        manifest_path: images, one a row; an optional `weight` column says how often each is drawn. None stands for the
            newest pool in the catalog, said on stderr.
        output: the run folder as the user gave it.
        config: the settings; its seed counts, not that of `options`.
        build: makes the model; torch's random numbers are seeded before.
        train: the loop; returns the figures of its last step.
        sources: what is read beside the manifest.
        resume: go on from the latest checkpoint in `output`, if there is one.
        num_processes: how many to start on this machine, unless a launcher has started this one.

    Raises:
        Stopped: if a signal came; everything is saved.
        ToolkitError: for anything wrong with manifest, settings or output.
    """
    # All checks come before any process is started, so that an error is said once.
    if manifest_path is None:
        manifest_path = catalog.choose("pool")
        console.say(f"no manifest given: taking {manifest_path}")
    manifest = open_manifest(manifest_path)
    images = image_set(read_images(manifest, options.limit))
    labelled = monitor.check(manifest_path, config.seed)
    if config.early_stop and labelled is None:
        raise ToolkitError(
            f"early_stop={config.early_stop} goes by the k-NN; give --eval-train and --eval-test, or --eval-share"
        )
    sharding(os.environ)  # raises where Accelerate's settings cannot be followed
    if config.compile:
        check_compiler(os.environ)
    provenance = run_provenance(command, config, options, (manifest.source("images"), *sources))
    run = Run(Path(output), config, provenance, images, labelled, monitor.profile)
    check_not_input(run.folder, provenance)
    if monitor.preview is not None and prints_result():
        draw_preview(monitor.preview, images, config, provenance, options)

    check_place(run.folder)
    launches = num_processes > 1 and not is_launched(os.environ)
    if options.dry_run or launches:
        check_batch(config, num_processes)
        if not is_finished(run, options, resume):
            if options.dry_run:
                describe_cost(run, build, num_processes)
                console.say(f"would write {output}")
                return None
            launch(num_processes, lambda: kept_steps(run.folder))
        return finished_result(output)

    # In this process, together with the others where a launcher has started several.
    accelerator = start_processes(config, monitor.track, run.folder)
    is_main, processes = accelerator.is_main_process, Group(accelerator.process_index, accelerator.num_processes)
    if processes.decide(lambda: is_finished(run, options, resume)):
        return finished_result(output)
    base_bytes = held_bytes(run, accelerator.device)  # before the model
    torch.manual_seed(derived_seed(config.seed, "weights", 0))
    model = build()
    free_bytes = free_bytes_of(accelerator.device, base_bytes, accelerator.num_processes)
    fitting = fitted(config, model, accelerator.num_processes, base_bytes, free_bytes)
    if is_main:
        describe(run, model, accelerator.num_processes)
        say_memory(fitting, model, accelerator.num_processes, base_bytes, free_bytes)
    # The same in all processes, whatever each has free.
    smallest = accelerator.gather(torch.tensor([int(fitting.micro_batch_size)], device=accelerator.device)).min()
    run = replace(run, micro_batch_size=int(smallest))
    recording: AbstractContextManager[list[Provenance]] = recorded(run.folder) if is_main else nullcontext([])
    with own_folder(run, options) if is_main else nullcontext():
        accelerator.wait_for_everyone()
        with (
            status_kept(run.folder),
            recording as records,
            tracked(accelerator, run.folder, config),
            needs_others(lambda: kept_steps(run.folder)),
        ):
            figures = train(model, run, accelerator)
            if is_main:
                loss = f", loss {figures['total']:.4f}" if "total" in figures else ""
                console.say(f"{run.folder}: {config.steps:,} steps{loss}")
                made = replace(provenance, figures=dict(figures), content_id=model_content_id(run.folder))
                write_run_provenance(run.folder, made)
                records.append(made)
    accelerator.end_training()
    return finished_result(output)


def run_provenance(command: str, config: TrainConfig, options: Options, sources: tuple[Source, ...]) -> Provenance:
    """Return the provenance of a run: its inputs, and all settings but those that only change its cost."""
    parameters = {name: value for name, value in asdict(config).items() if name not in (*COST_KEYS, "seed")}
    if options.limit is not None:
        parameters["limit"] = options.limit
    # As JSON keeps them (lists for tuples), so that they compare equal to what is read back.
    return Provenance("run", command, json.loads(json.dumps(parameters)), seed=config.seed, inputs=sources)


def is_finished(run: Run, options: Options, resume: bool) -> bool:
    """Tell whether the folder holds this very run, finished; if so, touch its model.json and say so.

    Raises:
        ToolkitError: if something else stands there, or the run is unfinished and `resume` is not given.
    """
    folder = run.folder
    if not folder.exists() or (folder.is_dir() and _is_unbegun(folder)):
        return False
    there = read_run_provenance(folder) if folder.is_dir() else None
    if there is None:
        raise ToolkitError(f"{folder} exists and is no run folder; choose another -o")
    if options.force:
        return False
    if resume and goes_on(there, run.provenance):
        if not checkpoints(folder / CHECKPOINTS):
            raise ToolkitError(f"{folder} has no checkpoint to go on from; choose another -o, or --force to start over")
        return False
    if not there.same_work(run.provenance):
        raise ToolkitError(
            f"{folder} was made differently ({difference(there, run.provenance)}); choose another -o, "
            "or --force to start over"
        )
    if (folder / MODEL_JSON).exists():
        console.say(f"{folder} is up to date")
        if not options.dry_run:
            os.utime(folder / MODEL_JSON)
            complete_record(folder, there)
        return True
    saved = checkpoints(folder / CHECKPOINTS)
    if saved and not resume:
        raise ToolkitError(
            f"{folder} holds an unfinished run ({saved[-1].name}); resume with --resume, or --force to start over"
        )
    return False


def goes_on(there: Provenance, wanted: Provenance) -> bool:
    """Tell whether `wanted` is the run that is there, but for more steps."""
    steps = there.parameters.get("steps"), wanted.parameters.get("steps")
    is_longer = isinstance(steps[0], int) and isinstance(steps[1], int) and steps[0] < steps[1]
    return is_longer and replace(there, parameters={**there.parameters, "steps": steps[1]}).same_work(wanted)


def _is_unbegun(folder: Path) -> bool:
    """Tell whether a folder is empty, or has only what a run writes before its provenance."""
    names = {entry.name for entry in folder.iterdir() if not TEMPORARY.fullmatch(entry.name)}
    config = folder / CONFIG_FILE
    return names <= {LOCK} or (names == {LOCK, CONFIG_FILE} and config.read_bytes().startswith(HEADING.encode()))


def complete_record(folder: Path, provenance: Provenance) -> None:
    """Complete what a kill after the last file of a finished run kept out: catalog, status; remove its leftovers."""
    if not provenance.content_id:
        metrics = read_metrics(folder)
        content_id = model_content_id(folder)
        provenance = replace(provenance, figures=dict(metrics[-1]) if metrics else {}, content_id=content_id)
        write_run_provenance(folder, provenance)
    record_missing({folder: provenance})
    sweep(folder)
    status = folder / STATUS
    if not status.is_file() or status.read_bytes() != DONE.encode():
        write_text(status, DONE)


@contextmanager
def own_folder(run: Run, options: Options) -> Iterator[None]:
    """Lock the run folder, without an earlier run under --force, and write `config.toml` and `provenance.json`.

    Raises ToolkitError when another process trains into it.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with held(run.folder / LOCK, f"training into {run.folder}"):
        for entry in run.folder.iterdir() if options.force else ():
            # Its provenance stays until the new one replaces it: without it the folder would be no run's after a kill.
            if entry.name != RUN_PROVENANCE and (entry.name in WRITTEN or (entry / MODEL_JSON).is_file()):
                remove(entry)
        sweep(run.folder)
        (run.folder / MODEL_JSON).unlink(missing_ok=True)  # of a finished run that goes on: its checkpoint has it too
        # The settings first: a run that is resumed without --recipe takes them from there.
        write_config(run.config, run.folder / CONFIG_FILE)
        write_run_provenance(run.folder, run.provenance)
        yield


def kept_steps(folder: Path) -> str:
    """Say which checkpoint a run would resume from, and how."""
    saved = checkpoints(folder / CHECKPOINTS)
    return f"{saved[-1].name} is saved; resume with --resume" if saved else "no step is saved yet; run it again"


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


def finished_result(output: str) -> Result:
    """Return what a finished run folder holds, as a command's result."""
    provenance = read_run_provenance(Path(output))
    return Result(output, {} if provenance is None else provenance.figures)


def start_processes(config: TrainConfig, track: Sequence[str], run_folder: Path) -> Accelerator:
    """Return the Accelerator of this process, which knows all others that a launcher started, and logs to `track`.

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
    has_gpu = torch.cuda.is_available()
    if config.mixed_precision == "bf16" and has_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ToolkitError("this GPU has no bfloat16; set mixed_precision=no")  # pragma: no cover  # needs an old GPU
    if has_gpu and torch.cuda.get_device_capability() >= (8, 0):
        torch.set_float32_matmul_precision("high")
        console.say("products of float32 matrices are computed in TF32")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without it Accelerate ignores torchrun on a machine without GPU
        mixed_precision=config.mixed_precision,
        log_with=list(track) or None,
        project_dir=run_folder,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)],
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


def compute_deterministically() -> None:
    """Have this process add up in a fixed order on GPUs too, or raise where torch cannot; before it uses a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.backends.cudnn.benchmark = False  # which would choose an algorithm by its time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads any
    torch.use_deterministic_algorithms(True)


def describe(run: Run, model: TrainedModel, num_processes: int) -> None:
    """Say what a run trains on what, and for how long."""
    config, num_images = run.config, len(run.images)
    backbones = [part for part in model.student.values() if isinstance(part, VisionTransformer)]
    backbone = sum(weight.numel() for part in backbones for weight in part.parameters())
    heads = sum(weight.numel() for weight in model.student.parameters()) - backbone
    sizes = batch_sizes(config.batch_size)
    samples = sizes.images_until(config.steps)
    batch = f"{sizes.at(0)}" if len(sizes.sizes) == 1 else f"{sizes.at(0)} to {sizes.at(config.steps - 1)}"
    processes = "1 process" if num_processes == 1 else f"{num_processes} processes"
    console.say(
        f"{config.arch}: {backbone / 1e6:.2f} M parameters, {heads / 1e6:.2f} M more in heads; "
        f"{config.steps:,} steps of {batch} images in {processes}: {samples:,} samples, "
        f"{samples / num_images:.1f} passes over {num_images:,} images; peak learning rate "
        f"{scaled_lr(config.base_lr, sizes.at(0)):.2e} (base_lr * sqrt(batch_size / 1024))"
    )


def describe_cost(run: Run, build: Callable[[], TrainedModel], num_processes: int) -> None:
    """Say what a run would train, and what time and memory it would take."""
    device = best_device()
    base_bytes = held_bytes(run, device)  # before torch loads what a meta device needs
    with torch.device("meta"):
        model = build()
    describe(run, model, num_processes)
    free_bytes = free_bytes_of(device, base_bytes, num_processes)
    config = fitted(run.config, model, num_processes, base_bytes, free_bytes)
    say_cost(config, model, num_processes, base_bytes)


def held_bytes(run: Run, device: torch.device) -> float:
    """Return what this process holds without a model, and with the images it keeps decoded; 0 where a GPU trains."""
    if device.type == "cuda":
        return 0.0
    config, images = run.config, run.images
    num_seen = min(len(images), batch_sizes(config.batch_size).images_until(config.steps))
    side_px = decoded_side_px(config)
    decoded = num_seen * decoded_bytes(images, side_px, config.in_chans, config.bit_depth, config.limits)
    return peak_memory_mib(device) * 2**20 + min(config.cache_mib << 20, decoded)
