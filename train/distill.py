"""Distillation: a frozen teacher with its heads and a manifest of images in, a run folder with a smaller ViT out.

Source: section 5 of Oquab et al. 2023; facts of the recipe that the paper leaves open are in `DistillModel`.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import ToolkitError
from ..models.weights import load_backbone, load_heads, model_content_id
from ..store.artifact import Options, Result
from ..store.manifest import Source
from .build import build_backbone
from .config import CONFIG_FILE, TrainConfig, command_config
from .distill_model import DistillModel
from .pretrain import run_training


def distill(
    manifest_path: Path | None,
    output: str,
    config: TrainConfig,
    options: Options,
    *,
    teacher: str,
    resume: bool = False,
    num_processes: int = 1,
) -> Result | None:
    """Train a student on a manifest's images against a frozen teacher (arguments as in `run_training`).

    Args:
        teacher: a run, or an official teacher checkpoint: whatever holds a backbone and its heads.

    Raises:
        ToolkitError: when the teacher has no heads, since its prototypes are what the student learns to tell apart.
    """
    return run_training(
        "train distill",
        manifest_path,
        output,
        config,
        options,
        lambda: build_distill_model(config, teacher),
        sources=(Source("teacher", teacher, model_content_id(teacher)),),
        resume=resume,
        num_processes=num_processes,
    )


def distill_config(
    output: str,
    teacher: str,
    arch: str | None,
    recipe: str | None,
    assignments: Sequence[str],
    *,
    resume: bool,
    seed: int | None,
) -> TrainConfig:
    """Return the settings: the recipe's, by default those the teacher was trained by, with nothing dropped.

    Args:
        arch: the student's architecture, None for the recipe's.
        output, recipe, assignments, resume, seed: as in `command_config`.
    """
    flags: dict[str, object] = {"drop_path": 0.0} | ({} if arch is None else {"arch": arch})
    own = Path(teacher) / CONFIG_FILE
    return command_config(
        TrainConfig,
        output,
        recipe,
        assignments,
        resume=resume,
        seed=seed,
        default_recipe=str(own) if own.exists() else "tiny",
        flags=flags,
    )


def build_distill_model(config: TrainConfig, teacher: str) -> DistillModel:
    """Return a new student by the settings, with heads of the teacher's measures, beside the frozen teacher.

    Raises:
        ToolkitError: when the teacher has no heads, or another patch size than the settings.
    """
    heads = load_heads(teacher)
    if not heads:
        raise ToolkitError(f"the teacher {teacher} has no heads; name a run, or a teacher checkpoint with its heads")
    frozen: dict[str, nn.Module] = {"backbone": load_backbone(teacher), **heads}
    return DistillModel(
        build_backbone(config),
        frozen,
        student_temp=config.student_temp,
        dino_weight=config.dino_weight,
        ibot_weight=config.ibot_weight,
        koleo_weight=config.koleo_weight,
    )
