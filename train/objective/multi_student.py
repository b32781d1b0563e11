"""Several students of one frozen teacher, in one module: the teacher answers once, each learns as it would alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .distill_model import DistillModel
from .feature_distill_model import FeatureDistillModel
from .micro_batch import Part


class SeveralStudents(nn.Module):
    """Distillations that share a teacher and its crops, as one model to the training loop.

    `student` and `teacher` hold all students' parts, by names like `vit_small_backbone`. Gradients, clipping and
    weights are apart, so each student becomes exactly what it would become by itself.

    Args:
        models: by the student's name; all with the same frozen teacher, patch size and objective.
    """

    def __init__(self, models: Mapping[str, DistillModel | FeatureDistillModel]) -> None:
        super().__init__()
        # A plain dictionary registers nothing: the parts are registered below, under names that tell them apart.
        self.models = dict(models)
        self.student, self.teacher = (
            nn.ModuleDict({f"{name}_{part}": module for name, parts in side.items() for part, module in parts.items()})
            for side in (
                {name: model.student for name, model in models.items()},
                {name: model.teacher for name, model in models.items()},
            )
        )
        self.frozen = next(iter(models.values())).frozen

    def train(self, mode: bool = True) -> "SeveralStudents":
        """Set the students' mode; the others never drop anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    def taught(self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, *, teacher_temp: float) -> Part:
        """Return a step's crops with the frozen teacher's answers, which are the same to every student."""
        first = next(iter(self.models.values()))
        return first.taught(global_crops, local_crops, masks, teacher_temp=teacher_temp)

    def forward(self, part: Part) -> dict[str, Tensor]:
        """Return every student's losses, by names like `vit_small_koleo`, and `total`, the sum of their totals."""
        outputs = {
            f"{name}_{what}": value for name, model in self.models.items() for what, value in model(part).items()
        }
        return outputs | {"total": torch.stack([outputs[f"{name}_total"] for name in self.models]).sum()}

    def update_teacher(self, momentum: float) -> None:
        """Move every student's average."""
        for model in self.models.values():
            model.update_teacher(momentum)


def own_figures(figures: Mapping[str, float], student: str, students: Sequence[str]) -> dict[str, float]:
    """Return the figures of a step that concern one student, named as if it had been trained alone."""
    own = {}
    for name, value in figures.items():
        whose = next((other for other in students if f"{other}_" in name), None)
        if whose == student:
            own[name.replace(f"{student}_", "", 1)] = value
        elif whose is None and name != "total":
            own[name] = value
    return own
