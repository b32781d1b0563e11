"""A frozen teacher, a smaller student, and the student's average, in one module with SSLModel's forward.

Shapes: B images, 2 global and L local crops of each; crops are crop-major (all first views, then all second views).
N patch tokens of a global crop, K prototypes, D the student's embed_dim.
"""

import copy

import torch
from torch import Tensor, nn

from ...models.head import ProjectionHead
from ...models.vit import Features, VisionTransformer
from .frozen_teacher import FrozenTeacher
from .losses import sinkhorn_knopp
from .micro_batch import Part, taught
from .ssl_model import head_logits, part_losses


class DistillModel(nn.Module):
    """DINOv2's distillation: the objective of pretraining against a larger, frozen teacher with its own prototypes.

    No patch is masked and no block dropped; the iBOT loss reads all patch tokens of the global crops; the losses are
    otherwise those of pretraining. `student` and `teacher` are ModuleDicts as in SSLModel: here `teacher` is the
    average of the student, which is the result, and `frozen` the model that teaches.

    Args:
        backbone: the student's; width, depth and patch size are its own.
        frozen: the teaching model, with its heads.
        student_temp, dino_weight, ibot_weight, koleo_weight, koleo_distributed: as in SSLModel.

    Source: section 5 of Oquab et al. 2023 (the code was not released).
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        frozen: FrozenTeacher,
        *,
        student_temp: float = 0.1,
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_distributed: bool = False,
    ) -> None:
        super().__init__()
        backbone.mask_token.requires_grad_(False)  # nothing is masked, and processes wait for every gradient
        heads = {name: _new_head(head, backbone.embed_dim) for name, head in frozen.parts.items() if name != "backbone"}
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.frozen = frozen
        self.student_temp = student_temp
        self.dino_weight, self.ibot_weight, self.koleo_weight = dino_weight, ibot_weight, koleo_weight
        self.koleo_distributed = koleo_distributed

    def train(self, mode: bool = True) -> "DistillModel":
        """Set the student's mode; the other two never drop anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def taught(self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, *, teacher_temp: float) -> Part:
        """Return a step's crops with the frozen teacher's answers to them, as SSLModel's `taught` does.

        `masks` (2 B, N) only tells how many patch tokens there are: all of them are read, none is masked.
        """
        backbone = self.student["backbone"]
        assert isinstance(backbone, VisionTransformer)
        with torch.inference_mode():
            features: Features = self.frozen(global_crops, backbone.patch_size)
            logits = head_logits(self.frozen.parts, features.cls_token, features.patch_tokens.flatten(0, 1))
        # Outside inference mode, for what comes of it is kept for the way back.
        cls_probs, patch_probs = (sinkhorn_knopp(part, teacher_temp) for part in logits)
        return taught(global_crops, local_crops, torch.ones_like(masks), cls_probs, patch_probs)

    def forward(self, part: Part) -> dict[str, Tensor]:
        """Return the losses of a step that `taught` made, or of a part of it, as SSLModel's forward does."""
        packed = [part.global_crops] if len(part.global_crops) else []
        packed += [] if part.local_crops is None else [part.local_crops]
        features: list[Features] = self.student["backbone"](packed)
        cls_tokens = torch.cat([group.cls_token for group in features])
        patch_tokens = features[0].patch_tokens[: len(part.global_crops)]  # none where there are no global crops
        cls_logits, patch_logits = head_logits(self.student, cls_tokens, patch_tokens.flatten(0, 1))
        return part_losses(
            part,
            cls_logits,
            patch_logits,
            cls_tokens[: len(part.global_crops)],
            student_temp=self.student_temp,
            dino_weight=self.dino_weight,
            ibot_weight=self.ibot_weight,
            koleo_weight=self.koleo_weight,
            koleo_distributed=self.koleo_distributed,
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the student's average to momentum * average + (1 - momentum) * student."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


def _new_head(head: nn.Module, in_dim: int) -> ProjectionHead:
    """Return an untrained head of the teacher's measures for features of another width."""
    assert isinstance(head, ProjectionHead)
    return ProjectionHead(in_dim, head.num_prototypes, hidden_dim=head.hidden_dim, bottleneck_dim=head.bottleneck_dim)
