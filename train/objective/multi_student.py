"""Several students of one frozen teacher in one module: the teacher runs once, each student learns as if alone."""

from collections.abc import Callable, Mapping, Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from .distill_model import DistillModel
from .feature_distill_model import FeatureDistillModel
from .micro_batch import MicroBatch
from .networks import TeacherNetworks


class MultiStudent(nn.Module):
    """Distillations that share a teacher and its crops, as one model to the training loop.

    `student` and `teacher` hold the networks of all students, by names like `vit_small_backbone`. Gradients, clipping
    and weights are separate, so each student becomes exactly what it would become alone.

    Args:
        models: by the student's name; all with the same frozen teacher, patch size and objective.
    """

    def __init__(self, models: Mapping[str, DistillModel | FeatureDistillModel]) -> None:
        super().__init__()
        # A plain dictionary registers nothing: the networks are registered below, under names that tell them apart.
        self.models = dict(models)
        self.student = nn.ModuleDict(_named({name: model.student for name, model in models.items()}))
        self.teacher = TeacherNetworks(_named({name: model.teacher for name, model in models.items()}))
        self.frozen = next(iter(models.values())).frozen

    def teacher_targets(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        masks: ArrayLike,
        *,
        teacher_temp: float,
        micro_batch_size: int = 0,
        before_exchange: Callable[[], None] = lambda: None,
    ) -> MicroBatch:
        """Return a step's crops with the frozen teacher's targets, which are the same for every student."""
        first = next(iter(self.models.values()))
        return first.teacher_targets(
            global_crops,
            local_crops,
            masks,
            teacher_temp=teacher_temp,
            micro_batch_size=micro_batch_size,
            before_exchange=before_exchange,
        )

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return every student's losses, by names like `vit_small_koleo`, and `total`, the sum of their totals."""
        outputs = {
            f"{student}_{name}": value for student, model in self.models.items() for name, value in model(batch).items()
        }
        return outputs | {"total": torch.stack([outputs[f"{student}_total"] for student in self.models]).sum()}


def _named(sides: Mapping[str, nn.ModuleDict]) -> dict[str, nn.Module]:
    return {f"{student}_{name}": network for student, side in sides.items() for name, network in side.items()}


def student_figures(figures: Mapping[str, float], student: str, students: Sequence[str]) -> dict[str, float]:
    """Return the figures of a step that concern one student, named as if it had been trained alone."""
    own = {}
    for name, value in figures.items():
        owner = next((other for other in students if f"{other}_" in name), None)
        if owner == student:
            own[name.replace(f"{student}_", "", 1)] = value
        elif owner is None and name != "total":
            own[name] = value
    return own
