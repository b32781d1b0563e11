"""Distillation: a frozen teacher and a manifest of images in, a run folder with a smaller ViT out, or several of them.

Source: section 5 of Oquab et al. 2023; facts of the recipe that the paper leaves open are in `DistillModel`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from .. import console
from ..errors import ToolkitError
from ..models.saved import MODEL_JSON
from ..models.weights import load_heads, load_model, model_content_id
from ..store.artifact import Options, Result, read_run_provenance, recorded, write_run_provenance
from ..store.manifest import Source
from . import counter_rng
from .config import CONFIG_FILE, TrainConfig, command_config, read_recipe, write_config
from .data.multicrop import preprocess_of
from .engine.build import build_backbone
from .launch import is_main_process
from .monitor.metrics import append_metrics, read_metrics, write_metrics_table
from .objective.distill_model import DistillModel
from .objective.feature_distill_model import FeatureDistillModel
from .objective.frozen_teacher import FrozenTeacher
from .objective.multi_student import SeveralStudents, own_figures
from .pretrain import run_training
from .run import NOTHING, Watching

AVERAGE_MOMENTUM = (0.99, 0.99)  # of the student's average, start and end; chosen
FEATURES_LR_RATIO = 3.0  # over pretraining's; measured: 61.8 % k-NN instead of 60.4 (Fashion-MNIST, 3 seeds, 300 steps)


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Every key of a distillation's recipe: those of training, and what the student learns from the teacher.

    `arch` may name several students, with commas between.
    """

    objective: Literal["heads", "features"] = "heads"  # what its prototypes say, or its tokens themselves

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
    resume: bool = False,
    num_processes: int = 1,
    watching: Watching = NOTHING,
) -> Result | None:
    """Train students on a manifest's images against a frozen teacher (arguments as in `run_training`).

    One student's run folder is `output`. Several have one each in it, by the name of their architecture; the folder
    around them holds the checkpoints, from which all go on together.

    Args:
        teacher: what `load_model` takes; for the objective `heads` a run, or an official teacher checkpoint.

    Raises:
        ToolkitError: when the objective is `heads` and the teacher has none, since its prototypes are what the student
            learns to tell apart.
    """
    result = run_training(
        "train distill",
        manifest_path,
        output,
        config,
        options,
        lambda: build_distill_model(config, teacher),
        sources=(Source("teacher", teacher, model_content_id(teacher)),),
        resume=resume,
        num_processes=num_processes,
        watching=watching,
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

    Whatever a recipe for pretraining says, no block is dropped, the backbone learns from the first step, and the
    student's average follows at an even pace: nothing learns from it, and slowing down would leave it behind in short
    runs. Tokens, which stay where they are, are learnt at three times its rate. Only `assignments` go above that.

    Args:
        arch: the students' architectures, none for the recipe's; they bring their own width and attention heads.
        objective: None for the recipe's.
        output, recipe, assignments, resume, seed: as in `command_config`.
    """
    written = Path(output) / CONFIG_FILE
    own = Path(teacher) / CONFIG_FILE
    default_recipe = str(own) if own.exists() else "tiny"
    base = str(written) if recipe is None and resume and written.exists() else recipe
    values = read_recipe(base or default_recipe)
    flags: dict[str, object] = {}
    if base is None or "objective" not in values:  # not the settings of a distillation, to be repeated
        flags = {"drop_path": 0.0, "freeze_backbone_steps": 0, "momentum": AVERAGE_MOMENTUM}
    if "objective" not in values and (objective == "features" or "objective=features" in assignments):
        base_lr = values.get("base_lr", TrainConfig.base_lr)
        if isinstance(base_lr, int | float):  # what is no number is refused with all other settings
            flags["base_lr"] = FEATURES_LR_RATIO * base_lr
    if arch:
        flags |= {"arch": ",".join(arch), "embed_dim": 0, "num_heads": 0}
    if objective is not None:
        flags["objective"] = objective
    return command_config(
        DistillConfig,
        output,
        recipe,
        assignments,
        resume=resume,
        seed=seed,
        default_recipe=default_recipe,
        flags=flags,
    )


def build_distill_model(config: DistillConfig, teacher: str) -> DistillModel | FeatureDistillModel | SeveralStudents:
    """Return new students by the settings, beside the frozen teacher.

    Raises:
        ToolkitError: when the teacher has no heads and they are wanted, or takes other channels.
    """
    frozen = load_frozen_teacher(config, teacher)
    models: dict[str, DistillModel | FeatureDistillModel] = {}
    for arch in config.students:
        # As `run_training` does, so that each student starts as it would alone.
        torch.manual_seed(counter_rng.derived_seed(config.seed, "weights", 0))
        backbone = build_backbone(replace(config, arch=arch))
        weights = {
            "dino_weight": config.dino_weight,
            "ibot_weight": config.ibot_weight,
            "koleo_weight": config.koleo_weight,
        }
        gather = config.koleo_distributed
        models[arch] = (
            DistillModel(backbone, frozen, student_temp=config.student_temp, koleo_distributed=gather, **weights)
            if config.objective == "heads"
            else FeatureDistillModel(backbone, frozen, koleo_distributed=gather, **weights)
        )
    return SeveralStudents(models) if len(models) > 1 else models[config.arch]


def load_frozen_teacher(config: DistillConfig, teacher: str) -> FrozenTeacher:
    """Return the teacher as the settings want it: with heads or without, in bfloat16 where autocast makes it that.

    Raises:
        ToolkitError: as `build_distill_model` does.
    """
    heads = load_heads(teacher) if config.objective == "heads" else {}
    if config.objective == "heads" and not heads:
        raise ToolkitError(
            f"the teacher {teacher} has no heads; learn its tokens with --objective features, or name a run or a "
            "teacher checkpoint with its heads"
        )
    model = load_model(teacher)
    if model.in_chans != config.in_chans:
        raise ToolkitError(
            f"the teacher {teacher} takes {model.in_chans} channels, the recipe {config.in_chans}; "
            f"set in_chans={model.in_chans}, or name another teacher"
        )
    theirs = model.backbone.patch_size
    if theirs != config.patch_size:
        side = config.global_crop_size_px // config.patch_size
        console.say(
            f"the teacher's patches are {theirs} px, the student's {config.patch_size}: it sees the global crops of "
            f"{config.global_crop_size_px} px at {side * theirs} px, which gives both {side} x {side} patches"
        )
    parts: dict[str, nn.Module] = {"backbone": model.backbone, **heads}
    preprocess = preprocess_of(config)
    return FrozenTeacher(
        parts,
        mean=model.mean,
        std=model.std,
        crops_mean=preprocess.mean,
        crops_std=preprocess.std,
        half=config.mixed_precision == "bf16",
    )


def _finish_run_folder(together: Path, student: str, config: DistillConfig) -> None:
    """Add to a student's model what a run folder holds beside it; touch the model if all is there."""
    folder = together / student
    if read_run_provenance(folder) is not None:
        os.utime(folder / MODEL_JSON)
        return
    provenance = read_run_provenance(together)
    assert provenance is not None
    write_config(
        replace(config, arch=student), folder / CONFIG_FILE, "Every setting of this run; --recipe repeats it alone."
    )
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # of a killed attempt
    for figures in read_metrics(together):
        append_metrics(folder, own_figures(figures, student, config.students))
    last = own_figures(read_metrics(together)[-1], student, config.students)
    with recorded(folder) as finished:
        provenance = replace(
            provenance,
            parameters=provenance.parameters | {"arch": student},
            figures=dict(last),
            content_id=model_content_id(folder),
        )
        write_metrics_table(folder, replace(provenance, kind="metrics"))
        write_run_provenance(folder, provenance)
        finished.append(provenance)
