"""What surrounds the training loop: checks before it, this process's part of the run, and the record afterwards."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from accelerate import Accelerator

from .. import console
from ..errors import ToolkitError
from ..features.launch import ALONE, Group, is_launched, launch, needs_others, prints_result
from ..models.weights import model_content_id
from ..store import catalog
from ..store.artifact import Options, Result, check_not_input, check_place, recorded, write_run_provenance
from ..store.image_columns import read_images
from ..store.manifest import Provenance, Source, open_manifest
from .config import TrainConfig
from .counter_rng import derived_seed
from .data.images import ImageSet, image_set
from .data.preview import draw_preview
from .description import describe, describe_cost, held_bytes
from .engine.checkpoint import TrainedModel
from .engine.fsdp import sharding
from .engine.parallelize import check_compiler
from .launch import ending_together, errors_left, status_kept
from .monitor.memory import fitted, free_bytes_of, say_memory
from .monitor.online_knn import LabelledSets, held_out, labelled_sets
from .monitor.trackers import check_trackers, tracked
from .processes import check_batch, start_processes
from .run_folder import finished_result, is_finished, kept_steps, own_folder, run_provenance


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
    processes: Group = ALONE  # this one and the others


@ending_together()
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
        if not is_finished(run.folder, provenance, options, resume):
            if options.dry_run:
                describe_cost(config, images, build, num_processes)
                console.say(f"would write {output}")
                return None
            launch(num_processes, lambda: kept_steps(run.folder))
        return finished_result(output)

    # In this process, together with the others where a launcher has started several.
    accelerator, processes = start_processes(config, monitor.track, run.folder)
    if processes.decide(lambda: is_finished(run.folder, provenance, options, resume)):
        return finished_result(output)
    base_bytes = held_bytes(config, images, accelerator.device)  # before the model
    torch.manual_seed(derived_seed(config.seed, "weights", 0))
    model = build()
    free_bytes = free_bytes_of(accelerator.device, base_bytes, processes.count)
    fitting = fitted(config, model, processes.count, base_bytes, free_bytes)
    if processes.is_first:
        describe(config, len(images), model, processes.count)
        say_memory(fitting, model, processes.count, base_bytes, free_bytes)
    smallest = min(processes.gather(int(fitting.micro_batch_size)))  # whatever each has free
    run = replace(run, micro_batch_size=smallest, processes=processes)
    recording: AbstractContextManager[list[Provenance]] = (
        recorded(run.folder) if processes.is_first else nullcontext([])
    )
    with own_folder(run.folder, config, provenance, options) if processes.is_first else nullcontext():
        processes.wait()
        with (
            status_kept(run.folder),
            recording as records,
            tracked(accelerator, run.folder, config),
            errors_left(),
            needs_others(lambda: kept_steps(run.folder)),
        ):
            figures = train(model, run, accelerator)
            if processes.is_first:
                loss = f", loss {figures['total']:.4f}" if "total" in figures else ""
                console.say(f"{run.folder}: {figures.get('step', config.steps):,} steps{loss}")
                made = replace(provenance, figures=dict(figures), content_id=model_content_id(run.folder))
                write_run_provenance(run.folder, made)
                records.append(made)
    accelerator.end_training()
    return finished_result(output)
