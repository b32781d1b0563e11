"""Pretraining: a manifest of images in, a run folder with a trained ViT out.

`train` is the loop, to be read from top to bottom. It trains any model with a student, a teacher and a forward that
returns losses, so distillation uses it too. What comes before and after the loop is in `run.run_training`.

Shapes: B images of this process's batch, 2 global and L local crops of each, N patch tokens of a global crop.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from .. import console
from ..errors import Stopped, ToolkitError
from ..features.launch import caught_signals
from ..models import cpu
from ..models.weights import model_content_id
from ..store.artifact import Options, Result
from ..store.manifest import Source
from .config import TrainConfig
from .counter_rng import derived_seed
from .data.images import read_batches
from .data.loader import load_views
from .data.multicrop import Views, decoded_side_px, preprocess_of
from .engine.accumulate import weighted_losses
from .engine.background import background_checkpoints, load_shards
from .engine.build import build_model
from .engine.checkpoint import (
    SHARDS,
    TrainedModel,
    checkpoint_of,
    checkpoints,
    copy_teacher,
    first_not_finite,
    load_checkpoint,
    newest_whole,
    prune_checkpoints,
    save_checkpoint,
    save_teacher,
)
from .engine.fitting import is_tried_first, step_that_fits
from .engine.fsdp import full_optimizer_state, trained_state
from .engine.half_precision import LossScale
from .engine.optimizer import clip_gradients, not_finite, step_unless
from .engine.parallelize import prepare
from .engine.schedules import batch_sizes
from .monitor.flop import throughput_of
from .monitor.health import PATIENCE_STEPS, RANK_STEPS, collapse_reason, health_figures, teacher_figures
from .monitor.metrics import (
    append_metrics,
    averaged,
    peak_memory_mib,
    progress_note,
    read_metrics,
    read_scalars,
    rewind_metrics,
    write_metrics_table,
)
from .monitor.online_knn import BestKnn, knn_figures
from .monitor.trace import traced
from .objective.micro_batch import MicroBatch
from .objective.networks import update_teacher
from .rates import apply_rates, rates_at
from .run import LaunchOptions, Run, run_training
from .run_folder import CHECKPOINTS

SKIPPED = "skipped_steps", "skipped_in_a_row"  # counts of steps whose loss or gradient was not finite


def pretrain(
    manifest_path: Path | None,
    output: str,
    config: TrainConfig,
    options: Options,
    *,
    init_from: str | None = None,
    **launch: Unpack[LaunchOptions],
) -> Result | None:
    """Train a ViT on a manifest's images and leave a run folder (arguments as in `run_training`).

    Args:
        init_from: a run, weights file or Hugging Face folder to start the backbone from, and the heads where they fit.
    """
    sources = () if init_from is None else (Source("init", init_from, model_content_id(init_from)),)
    build = partial(build_model, config, init_from)
    return run_training(
        "train pretrain", manifest_path, output, config, options, build, train, sources=sources, **launch
    )


def train(model: TrainedModel, run: Run, accelerator: Accelerator) -> dict[str, float]:
    """Train a model from its latest checkpoint, or from the start, to its last step; return the last step's figures.

    The teacher is left in the run folder. The result is a function of the settings, the images and the number of
    processes alone: neither the number of workers nor where the run was stopped and resumed shows.

    Raises:
        Stopped: if a signal came; a checkpoint of that step is there.
        ToolkitError: if the gradients of too many steps in a row are not finite.
    """
    config, images, labelled = run.config, run.images, run.labelled
    processes, device = run.processes, accelerator.device
    num_processes, process, is_main = processes.count, processes.rank, processes.is_first
    wrapped, optimizer, full_model, empty = prepare(model.train(), config, accelerator)

    # Resume from the latest checkpoint.
    counts = {"step": 0, "skipped_steps": 0, "skipped_in_a_row": 0, "replaced_images": 0}
    counts["micro_batch_size"] = run.micro_batch_size
    saved = processes.decide(lambda: newest_whole(run.folder / CHECKPOINTS, config.steps))  # on the main one's disk
    if saved is not None:
        load = load_shards if processes.decide((saved / SHARDS).is_dir) else load_checkpoint
        counts |= load(saved, model, optimizer, processes)
        console.say(f"resuming at step {counts['step']:,} of {config.steps:,}")
    if is_main:
        rewind_metrics(run.folder, counts["step"])
        if counts["step"]:  # a kill right after a checkpoint left the table of the one before
            write_metrics_table(run.folder, replace(run.provenance, kind="metrics"))
    rows = processes.decide(lambda: read_metrics(run.folder))
    best, figures = BestKnn(rows), (rows or [{}])[-1]
    if is_main:
        prune_checkpoints(run.folder / CHECKPOINTS, config.keep_checkpoints, best.step)
    first_step = counts["step"]
    has_stalled = processes.decide(lambda: best.has_stalled(config.early_stop))  # when it was killed
    background = background_checkpoints(run.folder / CHECKPOINTS, model, empty, preprocess_of(config), processes)

    sizes = batch_sizes(config.batch_size)
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
        limits=config.limits,
        is_pinned=device.type == "cuda",
    )
    collapse_since: int | None = None
    # Counted on the device, so that no step waits for it.
    num_skipped, in_a_row = (torch.full((), float(counts[name]), device=device) for name in SKIPPED)
    loss_scale = LossScale(counts, device) if accelerator.mixed_precision == "fp16" else None
    accelerator.scaler = loss_scale  # by which its backward multiplies the loss
    heap, throughput = cpu.TidyHeap(device), throughput_of(config, model, device, num_processes)
    with (
        caught_signals("step") as signals,
        console.progress("training", config.steps - first_step, "steps") as advance,
        traced(run.folder, run.profile if is_main else 0, first_step) as end_of_step,
        closing(load_views(batches, config, device)) as batches_of_views,
    ):
        for step in range(first_step, first_step if has_stalled else config.steps):
            rates = rates_at(step, config)
            apply_rates(optimizer, step, rates, config)

            # Data.
            with throughput.waiting():
                views = next(batches_of_views)
            events = processes.started_sum([bool(signals), views.num_replaced])

            # Teacher targets; student forward and backward, in micro-batches whose gradients add up to the batch's.
            targets, outputs, counts["micro_batch_size"] = step_that_fits(
                wrapped,
                optimizer,
                partial(step_of, model, views, rates.teacher_temp, accelerator),
                accelerator,
                processes,
                config,
                seed=derived_seed(config.seed, "drop path", step * num_processes + process),
                num_images=sizes.at(step) // num_processes,
                micro_batch_size=counts["micro_batch_size"],
                is_tried=is_tried_first(device) and (step == first_step or sizes.at(step) > sizes.at(step - 1)),
                was_short=views.was_short,
            )

            # Update. All processes skip a step or none.
            if loss_scale is not None:
                loss_scale.unscale(model.student)
            norms = clip_gradients(model.student, config.clip_grad_norm)
            is_bad = not_finite([outputs["total"], *norms.values()])
            step_unless(is_bad, optimizer)
            update_teacher(model.teacher, model.student, rates.momentum, is_bad)
            optimizer.zero_grad()
            is_lost = is_bad if loss_scale is None else loss_scale.update(is_bad, outputs["total"])
            num_skipped, in_a_row = num_skipped + is_lost, (in_a_row + is_lost) * is_bad
            num_stopped, num_replaced = events()
            counts["step"] = step + 1
            counts["replaced_images"] += num_replaced
            throughput.num_images += sizes.at(step)
            heap.after_step()
            end_of_step()

            # Is it time to log, to save, to end? Then read how many steps were skipped; on a CPU at every step.
            is_last, is_best = step + 1 == config.steps, False
            is_measured = labelled is not None and ((step + 1) % config.eval_every == 0 or is_last)
            is_logged = (step + 1) % config.log_every == 0 or is_last or is_measured
            is_due = (step + 1) % config.checkpoint_every == 0
            if is_logged or is_due or num_stopped or device.type == "cpu":
                before = counts["skipped_steps"]
                counts |= {name: int(number) for name, number in zip(SKIPPED, (num_skipped, in_a_row), strict=True)}
                counts |= {} if loss_scale is None else loss_scale.counts()
                if (number := counts["skipped_steps"] - before) > 0:
                    what = "loss or the gradient is" if number == 1 else f"losses or gradients of {number} steps are"
                    console.warn(f"step {step + 1}: the {what} not finite; skipped")
                if (bad := counts["skipped_in_a_row"]) > config.max_skipped_steps or (is_last and bad):
                    what = f"losses or gradients of the {bad} steps up to {step + 1} are not finite"
                    raise ToolkitError(f"{what}; {last_good(run)}: lower base_lr, or look at the images")

            # Log.
            if is_logged:
                means = averaged(outputs | teacher_figures(targets), accelerator)
                losses = read_scalars(means)
                figures = {
                    **counts,
                    "samples": sizes.images_until(step + 1),
                    "epoch": sizes.images_until(step + 1) / len(images),
                    "batch_size": sizes.at(step),
                    **losses,
                    **weighted_losses(losses, config),
                    **rates._asdict(),
                    **read_scalars({f"grad_norm_{part}": norm for part, norm in norms.items()}),
                    **health_figures(means, with_rank=is_last or (step + 1) % RANK_STEPS < config.log_every),
                    **throughput.figures(),
                    "peak_memory_mib": peak_memory_mib(device),
                }
                reason = collapse_reason(figures)
                collapse_since = None if reason is None else step if collapse_since is None else collapse_since
                if collapse_since is not None and step - collapse_since >= PATIENCE_STEPS:
                    console.warn(f"step {step + 1}: {reason}")
                    collapse_since = None
                if is_measured and labelled is not None and (whole := full_model(True)) is not None:
                    figures |= knn_figures(whole, labelled, config, processes)
                    is_best = processes.decide(partial(best.add, figures))
                    has_stalled = processes.decide(lambda: best.has_stalled(config.early_stop))
                if is_main:
                    append_metrics(run.folder, figures)
                accelerator.log(figures, step=step + 1)
                throughput.restart()
            advance(1, progress_note(figures))
            del views, targets, outputs  # of the next step's crops two batches are in memory

            # Save; not while gradients are bad, for then the weights may be.
            if (is_due and not counts["skipped_in_a_row"]) or is_last or num_stopped or is_best or has_stalled:
                if background is None:
                    save(run, optimizer, full_model, counts, best.step)
                else:
                    background.save(model, optimizer, counts, keep=config.keep_checkpoints, best_step=best.step)
                    if is_last or num_stopped or has_stalled:
                        background.wait()
                if is_main:
                    write_metrics_table(run.folder, replace(run.provenance, kind="metrics"))
                processes.wait()
            if has_stalled:
                break
            if num_stopped and not is_last:
                raise Stopped(f"stopped at step {step + 1:,} of {config.steps:,}, all saved; resume with --resume")
    if (finished := full_model(is_main)) is not None:
        if (name := first_not_finite(trained_state(finished))) is not None:
            raise ToolkitError(f"the weights {name} are not finite after the last step; {last_good(run)}")
        if best.step is not None:
            of_best = checkpoint_of(run.folder / CHECKPOINTS, best.step)
            console.say(f"best k-NN {best.accuracy:.3f}: {of_best}")
        if has_stalled:
            console.say(
                f"step {counts['step']:,}: no better k-NN {best.num_since} times; the model is that of the best"
            )
            copy_teacher(of_best, run.folder)
        else:
            save_teacher(run.folder, finished, preprocess_of(config))
    return figures


def step_of(
    model: TrainedModel,
    views: Views,
    teacher_temp: float,
    accelerator: Accelerator,
    micro_batch_size: int,
    before_exchange: Callable[[], None],
) -> MicroBatch:
    """Return a batch's crops with the teacher's targets for them (last arguments as in `teacher_targets`)."""
    with accelerator.autocast():
        return model.teacher_targets(
            views.global_crops,
            views.local_crops,
            views.masks,
            teacher_temp=teacher_temp,
            micro_batch_size=micro_batch_size,
            before_exchange=before_exchange,
        )


def last_good(run: Run) -> str:
    """Say which checkpoint is the newest."""
    saved = checkpoints(run.folder / CHECKPOINTS)
    return f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"


def save(
    run: Run,
    optimizer: Optimizer,
    full_model: Callable[[bool], TrainedModel | None],
    counts: Mapping[str, int],
    best_step: int | None,
) -> None:
    """Write a checkpoint. All processes must call it; the main one writes."""
    model = full_model(run.processes.is_first)
    optimizer_state = full_optimizer_state(optimizer, wanted=model is not None)
    if model is not None:
        preprocess, keep = preprocess_of(run.config), run.config.keep_checkpoints
        folder = run.folder / CHECKPOINTS
        save_checkpoint(folder, model, optimizer_state, counts, preprocess, keep=keep, best_step=best_step)
