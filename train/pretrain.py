"""Pretraining: a manifest of images in, a run folder with a trained ViT out.

`train` is the loop, to be read from top to bottom. It trains any model with a student, a teacher and a forward that
returns losses, and `run_training` gives it a run folder: distillation goes through both as well.

Shapes: B images of this process's batch, 2 global and L local crops of each, N patch tokens of a global crop.
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import console
from ..errors import Stopped, ToolkitError
from ..features.launched import caught_signals, is_launched
from ..models.vit import VisionTransformer
from ..models.weights import model_content_id
from ..store import catalog
from ..store.artifact import Options, Result, recorded, write_run_provenance
from ..store.image_columns import read_images
from ..store.manifest import Provenance, Source, open_manifest
from ..store.memory import TidyHeap
from . import counter_rng
from .config import TrainConfig
from .data.images import ImageSet, decoded_bytes, image_set, read_batches
from .data.multicrop import decoded_side_px, make_crops, make_masks, preprocess_of, view_settings
from .data.preview import draw_preview
from .engine.accumulate import learn
from .engine.build import build_model
from .engine.checkpoint import TrainedModel, checkpoints, load_checkpoint, save_checkpoint, save_teacher
from .engine.fsdp import sharding, whole_optimizer_state
from .engine.optimizer import clip_gradients, set_rates
from .engine.parallelize import check_compiler, prepare
from .engine.schedules import batch_sizes, last_layer_lr, linear_then_constant, scaled_lr, warmup_then_cosine
from .launch import launch, speaks_for_all, status_kept
from .monitor.estimate import say_cost
from .monitor.health import PATIENCE_STEPS, collapse, health_figures, teacher_figures
from .monitor.metrics import (
    append_metrics,
    averaged,
    peak_memory_mib,
    progress_note,
    read_metrics,
    rewind_metrics,
    summed,
    weighted,
    write_metrics_table,
)
from .monitor.online_knn import LabelledSets, knn_accuracy
from .monitor.trackers import tracked
from .run import (
    CHECKPOINTS,
    NOTHING,
    Watching,
    check_batch,
    describe,
    finished_result,
    is_done,
    own_folder,
    run_provenance,
    start_processes,
)


def pretrain(
    manifest_path: Path | None,
    output: str,
    config: TrainConfig,
    options: Options,
    *,
    resume: bool = False,
    init_from: str | None = None,
    num_processes: int = 1,
    watching: Watching = NOTHING,
) -> Result | None:
    """Train a ViT on a manifest's images and leave a run folder (arguments as in `run_training`).

    Args:
        init_from: a run, weights file or Hugging Face folder to start the backbone from, and the heads where they fit.
    """
    sources = () if init_from is None else (Source("init", init_from, model_content_id(init_from)),)
    return run_training(
        "train pretrain",
        manifest_path,
        output,
        config,
        options,
        lambda: build_model(config, init_from),
        sources=sources,
        resume=resume,
        num_processes=num_processes,
        watching=watching,
    )


def run_training(
    command: str,
    manifest_path: Path | None,
    output: str,
    config: TrainConfig,
    options: Options,
    build: Callable[[], TrainedModel],
    *,
    sources: tuple[Source, ...] = (),
    resume: bool = False,
    num_processes: int = 1,
    watching: Watching = NOTHING,
) -> Result | None:
    """Train a model on a manifest's images and leave a run folder; return None after a dry run.

    Args:
        command: such as "train pretrain", for the provenance.
        manifest_path: images, one a row; an optional `weight` column says how often each is drawn. None stands for the
            newest pool in the catalog, said on stderr.
        output: the run folder as the user gave it.
        config: the settings; its seed counts, not that of `options`.
        build: makes the model; torch's random numbers are seeded before.
        sources: what is read beside the manifest.
        resume: go on from the latest checkpoint in `output`, if there is one.
        num_processes: how many to start on this machine, unless a launcher has started this one.
        watching: what is looked at beside the training, which it does not change.

    Raises:
        Stopped: if a signal came; everything is saved.
        ToolkitError: for anything wrong with manifest, settings or output.
    """
    # Before any process is started: whatever can be wrong is said once, and here.
    if manifest_path is None:
        manifest_path = catalog.choose("pool")
        console.say(f"no manifest given: taking {manifest_path}")
    manifest = open_manifest(manifest_path)
    images = image_set(read_images(manifest, options.limit))
    labelled = watching.open()
    sharding(os.environ)  # raises where Accelerate's settings cannot be followed
    if config.compile:
        check_compiler(os.environ)
    run_folder = Path(output)
    provenance = run_provenance(command, config, options, (manifest.source("images"), *sources))
    if watching.preview is not None and speaks_for_all():
        draw_preview(watching.preview, images, config, provenance, options)
    starts_others = num_processes > 1 and not is_launched(os.environ)
    if options.dry_run or starts_others:
        check_batch(config, num_processes)
        if is_done(run_folder, provenance, options, resume):
            return finished_result(output)
        if options.dry_run:
            base_mib = peak_memory_mib(torch.device("cpu"))  # before torch loads what a meta device needs
            with torch.device("meta"):
                model = build()
            describe(config, images, model, num_processes)
            decoded = decoded_bytes(images, decoded_side_px(config), config.in_chans, config.bit_depth)
            num_seen = min(len(images), batch_sizes(config.batch_size).images_until(config.steps))
            cache_bytes = min(config.cache_mib << 20, num_seen * decoded)
            say_cost(config, model, num_processes, base_mib * 2**20 + cache_bytes)
            console.say(f"would write {output}")
            return None
        launch(num_processes, run_folder)
        return finished_result(output)

    accelerator = start_processes(config, watching.track, run_folder)
    is_main = accelerator.is_main_process
    done = [is_main and is_done(run_folder, provenance, options, resume)]
    broadcast_object_list(done)
    if done[0]:
        return finished_result(output)
    torch.manual_seed(counter_rng.derived_seed(config.seed, "weights", 0))
    model = build()
    if is_main:
        describe(config, images, model, accelerator.num_processes)

    recording: AbstractContextManager[list[Provenance]] = recorded(run_folder) if is_main else nullcontext([])
    with own_folder(run_folder, config, provenance, options) if is_main else nullcontext():
        accelerator.wait_for_everyone()
        with status_kept(run_folder), recording as finished, tracked(accelerator, run_folder, config):
            figures = train(model, images, config, run_folder, provenance, accelerator, labelled)
            if is_main:
                provenance = replace(provenance, figures=dict(figures), content_id=model_content_id(run_folder))
                write_run_provenance(run_folder, provenance)
                finished.append(provenance)
    accelerator.end_training()
    return finished_result(output)


def train(
    model: TrainedModel,
    images: ImageSet,
    config: TrainConfig,
    run_folder: Path,
    provenance: Provenance,
    accelerator: Accelerator,
    labelled: LabelledSets | None = None,
) -> dict[str, float]:
    """Train a model from its latest checkpoint, or from the start, to its last step; return the last step's figures.

    The teacher is left in the run folder.

    The result is a function of the settings, the images and the number of processes alone: neither the number of
    workers nor where the run was stopped and resumed shows. `labelled` images are looked at every `eval_every` steps.

    Raises:
        Stopped: if a signal came; a checkpoint of that step is there.
        ToolkitError: if the gradients of too many steps in a row are not finite.
    """
    wrapped, optimizer, whole_model = prepare(model.train(), config, accelerator)
    num_processes, process, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    is_main = accelerator.is_main_process

    # Go on where the latest checkpoint is.
    counts = {"step": 0, "skipped_steps": 0, "skipped_in_a_row": 0, "replaced_images": 0}
    counts["micro_batch_size"] = config.micro_batch_size
    saved = checkpoints(run_folder / CHECKPOINTS)
    if saved:
        counts |= load_checkpoint(saved[-1], model, optimizer)
        console.say(f"resuming at step {counts['step']:,} of {config.steps:,}")
    if is_main:
        rewind_metrics(run_folder, counts["step"])
    first_step = counts["step"]

    sizes = batch_sizes(config.batch_size)
    global_views, local_views = view_settings(config)
    batches = read_batches(
        images,
        seed=config.seed,
        batches=map(sizes.images_of, range(first_step, config.steps)),
        short_side_px=decoded_side_px(config),
        process=process,
        num_processes=num_processes,
        num_workers=config.num_workers,
        cache_bytes=config.cache_mib << 20,
        in_chans=config.in_chans,
        bit_depth=config.bit_depth,
    )
    peak_lr = scaled_lr(config.base_lr, sizes.at(0))
    ill_since: int | None = None
    heap = TidyHeap()
    figures = (read_metrics(run_folder) or [{}])[-1]
    window_start, window_wait_s, window_images = time.monotonic(), 0.0, 0

    with caught_signals("step") as signals, console.progress("training", config.steps - first_step, "steps") as advance:
        for step in range(first_step, config.steps):
            # The step's rates and temperatures.
            lr = warmup_then_cosine(
                step,
                base=peak_lr,
                final=peak_lr if config.hold_lr else config.min_lr,
                num_steps=config.steps,
                warmup_steps=config.warmup_steps,
            )
            weight_decay, momentum = (
                warmup_then_cosine(step, base=start, final=final, num_steps=config.steps)
                for start, final in (config.weight_decay, config.momentum)
            )
            teacher_temp = linear_then_constant(
                step,
                start=config.teacher_temp[0],
                final=config.teacher_temp[1],
                num_steps=config.teacher_temp_warmup_steps,
            )
            set_rates(
                optimizer,
                lr=lr,
                last_layer_lr=last_layer_lr(step, lr, freeze_steps=config.freeze_last_layer_steps),
                weight_decay=weight_decay,
                backbone_lr=0.0 if step < config.freeze_backbone_steps else lr,
            )

            # Data.
            wait_start = time.monotonic()
            batch = next(batches)
            window_wait_s += time.monotonic() - wait_start
            pixels = batch.images.to(device, non_blocking=True)
            global_crops = make_crops(batch, pixels, config.seed, "global crops", global_views)
            local_crops = make_crops(batch, pixels, config.seed, "local crops", local_views) if local_views else None
            masks = make_masks(step, sizes.at(step), config, process, num_processes).to(device)

            # The teacher answers, then the student learns: all at once, or part by part, which adds up to the same.
            # Stochastic depth draws from torch's own generator, so the seed is what its numbers depend on.
            with accelerator.autocast():
                whole = model.taught(global_crops, local_crops, masks, teacher_temp=teacher_temp)
            outputs, counts["micro_batch_size"] = learn(
                wrapped,
                whole,
                accelerator,
                seed=counter_rng.derived_seed(config.seed, "drop path", step * num_processes + process),
                sequential_views=config.sequential_views,
                micro_batch_size=counts["micro_batch_size"],
                smallest=2 if config.koleo_weight else 1,
            )
            outputs |= teacher_figures(whole)

            # Update. Gradients are averaged over the processes, so all of them skip a step or none.
            norms = clip_gradients(model.student, config.clip_grad_norm)
            if all(bool(norm.isfinite()) for norm in norms.values()):
                optimizer.step()
                model.update_teacher(momentum)
                counts["skipped_in_a_row"] = 0
            else:
                counts["skipped_steps"] += 1
                counts["skipped_in_a_row"] += 1
                console.warn(f"step {step + 1}: the gradient is not finite; skipped")
            optimizer.zero_grad()
            if counts["skipped_in_a_row"] > config.max_skipped_steps:
                raise ToolkitError(
                    f"the gradients of the {counts['skipped_in_a_row']} steps up to {step + 1} are not finite; "
                    f"{_last_good(run_folder)}: lower base_lr, or look at the images"
                )
            num_stopped, num_replaced = summed([bool(signals), batch.num_replaced], accelerator)
            counts["step"] = step + 1
            counts["replaced_images"] += num_replaced
            window_images += sizes.at(step)
            is_last = step + 1 == config.steps
            is_watched = labelled is not None and ((step + 1) % config.eval_every == 0 or is_last)

            if device.type == "cpu":
                heap.after_step()

            # Log.
            if (step + 1) % config.log_every == 0 or is_last or is_watched:
                seconds = time.monotonic() - window_start
                means = averaged(outputs, accelerator)
                figures = {
                    **counts,
                    "samples": sizes.images_until(step + 1),
                    "epoch": sizes.images_until(step + 1) / len(images),
                    "batch_size": sizes.at(step),
                    **{name: float(value) for name, value in means.items() if value.ndim == 0},
                    **weighted(means, config),
                    "lr": lr,
                    "weight_decay": weight_decay,
                    "momentum": momentum,
                    "teacher_temp": teacher_temp,
                    **{f"grad_norm_{part}": float(norm) for part, norm in norms.items()},
                    **health_figures(means),
                    "images_per_s": window_images / seconds,
                    "data_wait": window_wait_s / seconds,
                    "peak_memory_mib": peak_memory_mib(device),
                }
                illness = collapse(figures, len(means.get("teacher_cls_probs", ())))
                ill_since = None if illness is None else step if ill_since is None else ill_since
                if ill_since is not None and step - ill_since >= PATIENCE_STEPS:
                    console.warn(f"step {step + 1}: {illness}")
                    ill_since = None
                if is_watched and labelled is not None:
                    figures |= watched(whole_model(), labelled, config)
                if is_main:
                    append_metrics(run_folder, figures)
                accelerator.log(figures, step=step + 1)
                if is_watched:
                    accelerator.wait_for_everyone()
                window_start, window_wait_s, window_images = time.monotonic(), 0.0, 0
            advance(1, progress_note(figures))

            # Save; not while gradients are bad, for then the weights may be.
            is_due = (step + 1) % config.checkpoint_every == 0 and not counts["skipped_in_a_row"]
            if is_due or is_last or num_stopped:
                optimizer_state = whole_optimizer_state(optimizer, wanted=is_main)
                if (to_save := whole_model()) is not None:
                    save_checkpoint(
                        run_folder / CHECKPOINTS,
                        to_save,
                        optimizer_state,
                        counts,
                        preprocess_of(config),
                        keep=config.keep_checkpoints,
                    )
                    write_metrics_table(run_folder, replace(provenance, kind="metrics"))
                del to_save, optimizer_state  # where there are shards, a copy as large as the run
                accelerator.wait_for_everyone()
            if num_stopped and not is_last:
                raise Stopped(f"stopped at step {step + 1:,} of {config.steps:,}, all saved; go on with --resume")
    if (to_save := whole_model()) is not None:
        save_teacher(run_folder, to_save, preprocess_of(config))
    return figures


def watched(model: TrainedModel | None, labelled: LabelledSets, config: TrainConfig) -> dict[str, float]:
    """Return `knn`, the k-NN accuracy of the teacher's class tokens, 0 to 1; of several students `NAME_knn` of each.

    Nothing in the processes that are given no model.
    """
    if model is None:
        return {}
    # What is compiled is compiled for the batches of training.
    with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
        return {
            name.removesuffix("backbone") + "knn": knn_accuracy(
                part, labelled, preprocess_of(config), num_workers=config.num_workers
            )
            for name, part in model.teacher.items()
            if isinstance(part, VisionTransformer)
        }


def _last_good(run_folder: Path) -> str:
    saved = checkpoints(run_folder / CHECKPOINTS)
    return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
