"""Distillation: a frozen teacher and a manifest of images in, a run folder with a smaller ViT out, or several.

Source: section 5 of Oquab et al. 2023; `DistillModel` says what was chosen where the paper leaves it open.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Unpack

import torch

from .. import console
from ..errors import ToolkitError
from ..models.saved import MODEL_JSON
from ..models.weights import load_heads, load_model, model_content_id
from ..process import is_main_process
from ..store.artifact import Options, Result, read_run_provenance, recorded, write_run_provenance
from ..store.manifest import Source
from .config import CONFIG_FILE, TrainConfig, command_config, given_recipe, read_recipe, write_config
from .counter_rng import derived_seed
from .data.multicrop import preprocess_of
from .engine.build import build_backbone, loss_settings
from .engine.half_precision import HALF, supported
from .monitor.metrics import METRICS_FILE, append_metrics, read_metrics, write_metrics_table
from .objective.distill_model import DistillModel
from .objective.feature_distill_model import FeatureDistillModel
from .objective.frozen_teacher import FrozenTeacher
from .objective.multi_student import MultiStudent, student_figures
from .pretrain import train
from .run import LaunchOptions, run_training

AVERAGE_MOMENTUM = (0.99, 0.99)  # of the student's average, start and end; chosen
FEATURES_LR_RATIO = 3.0  # over pretraining's; measured: 61.8 % k-NN instead of 60.4 (Fashion-MNIST, 3 seeds, 300 steps)


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Every key of a distillation's recipe: those of training, and the objective.

    `arch` may name several students, separated by commas.
    """

    objective: Literal["heads", "features"] = "heads"  # the teacher's prototype probabilities, or its tokens

    @property
    def students(self) -> list[str]:
        """Return the architectures of the students."""
        return self.arch.split(",")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.students)) < len(self.students):
            raise ToolkitError(f"arch {self.arch} names a student twice; name each once")


def distill(
    manifest_path: Path | None,
    output: str,
    config: DistillConfig,
    options: Options,
    *,
    teacher: str,
    **launch: Unpack[LaunchOptions],
) -> Result | None:
    """Train students on a manifest's images against a frozen teacher (arguments as in `run_training`).

    One student's run folder is `output`. Several students have one each in it, named by architecture; `output` then
    holds the checkpoints of all.

    Args:
        teacher: what `load_model` takes; for the objective `heads` a run, or an official teacher checkpoint.

    Raises:
        ToolkitError: when the objective is `heads` and the teacher has none.
    """
    sources = (Source("teacher", teacher, model_content_id(teacher)),)
    build = partial(build_distill_model, config, teacher)
    result = run_training(
        "train distill", manifest_path, output, config, options, build, train, sources=sources, **launch
    )
    if result is not None and not options.dry_run and len(config.students) > 1 and is_main_process():
        for student in config.students:
            _finish_run_folder(Path(output), student, config)
    return result


def distill_config(
    output: str,
    teacher: str,
    arch: Sequence[str],
    recipe: str | None,
    assignments: Sequence[str],
    *,
    objective: str | None = None,
    resume: bool,
    seed: int | None,
) -> DistillConfig:
    """Return the settings: the recipe's, by default those the teacher was trained by, with what distillation changes.

    Unless a recipe is of a distillation itself, no block is dropped, the backbone learns from the first step, and the
    student's average has one momentum throughout: nothing learns from it, and a rising momentum would leave it behind
    in short runs. The objective `features` has three times the learning rate, since its targets do not move.
    `assignments` override all of this.

    Args:
        arch: the students' architectures, none for the recipe's; they bring their own width and attention heads.
        objective: None for the recipe's.
    """
    teachers_own = Path(teacher) / CONFIG_FILE
    default_recipe = str(teachers_own) if teachers_own.exists() else "tiny"
    given = given_recipe(output, recipe, resume)
    values = read_recipe(given or default_recipe)
    flags: dict[str, object] = {}
    if given is None or "objective" not in values:
        flags = {"drop_path": 0.0, "freeze_backbone_steps": 0, "momentum": AVERAGE_MOMENTUM}
    if "objective" not in values and (objective == "features" or "objective=features" in assignments):
        base_lr = values.get("base_lr", TrainConfig.base_lr)
        if isinstance(base_lr, int | float):  # anything else is refused with all other settings
            flags["base_lr"] = FEATURES_LR_RATIO * base_lr
    if arch:
        flags |= {"arch": ",".join(arch), "embed_dim": 0, "num_heads": 0}
    if objective is not None:
        flags["objective"] = objective
    return command_config(
        DistillConfig, output, recipe, assignments, resume=resume, seed=seed, default_recipe=default_recipe, flags=flags
    )


def build_distill_model(config: DistillConfig, teacher: str) -> DistillModel | FeatureDistillModel | MultiStudent:
    """Return new students by the settings, beside the frozen teacher; raise ToolkitError for an unfit teacher."""
    frozen = _load_frozen_teacher(config, teacher)
    models: dict[str, DistillModel | FeatureDistillModel] = {}
    for arch in config.students:
        # As `run_training` does, so that each student starts as it would alone.
        torch.manual_seed(derived_seed(config.seed, "weights", 0))
        backbone = build_backbone(replace(config, arch=arch))
        kind = DistillModel if config.objective == "heads" else FeatureDistillModel
        models[arch] = kind(backbone, frozen, loss_settings(config))
    return MultiStudent(models) if len(models) > 1 else models[config.arch]


def _load_frozen_teacher(config: DistillConfig, teacher: str) -> FrozenTeacher:
    """Return the teacher, with its heads if the objective needs them, in what autocast computes in."""
    heads = load_heads(teacher) if config.objective == "heads" else {}
    if config.objective == "heads" and not heads:
        raise ToolkitError(
            f"the teacher {teacher} has no heads; learn its tokens with --objective features, or name a run or a "
            "teacher checkpoint with its heads"
        )
    model = load_model(teacher)
    if model.backbone.in_chans != config.in_chans:
        raise ToolkitError(
            f"the teacher {teacher} takes {model.backbone.in_chans} channels, the recipe {config.in_chans}; "
            f"set in_chans={model.backbone.in_chans}, or name another teacher"
        )
    if (patch_size := model.backbone.patch_size) != config.patch_size:
        side_px = config.global_crop_size_px // config.patch_size * patch_size
        console.say(f"the teacher's patches are {patch_size} px: it is given the global crops at {side_px} px")
    crops = preprocess_of(config)
    return FrozenTeacher(
        {"backbone": model.backbone, **heads},
        mean=model.preprocess.mean,
        std=model.preprocess.std,
        crops_mean=crops.mean,
        crops_std=crops.std,
        half=HALF[supported(config.mixed_precision)],
    )


def _finish_run_folder(output: Path, student: str, config: DistillConfig) -> None:
    """Complete a student's run folder with its settings, metrics and provenance; touch its model if all is there."""
    folder = output / student
    there = read_run_provenance(folder)
    if there is not None and there.parameters.get("steps") == config.steps:  # else a run that went on
        os.utime(folder / MODEL_JSON)
        return
    provenance = read_run_provenance(output)
    assert provenance is not None
    write_config(replace(config, arch=student), folder / CONFIG_FILE)
    metrics = [student_figures(figures, student, config.students) for figures in read_metrics(output)]
    (folder / METRICS_FILE).unlink(missing_ok=True)  # of a killed attempt
    for figures in metrics:
        append_metrics(folder, figures)
    with recorded(folder) as finished:
        made = replace(
            provenance,
            parameters=provenance.parameters | {"arch": student},
            figures=dict(metrics[-1]),
            content_id=model_content_id(folder),
        )
        write_metrics_table(folder, replace(made, kind="metrics"))
        write_run_provenance(folder, made)
        finished.append(made)
