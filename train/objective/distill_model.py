"""Distillation by the teacher's prototypes: a frozen teacher, a smaller student, and the student's average.

Shapes as in `micro_batch`.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ...models.head import ProjectionHead
from ...models.vit import Features, VisionTransformer
from .frozen_teacher import FrozenTeacher, in_parts
from .losses import sinkhorn_knopp
from .masks import every_patch
from .micro_batch import MicroBatch, whole_step
from .networks import TeacherNetworks, backbone_of, head_logits
from .ssl_model import PAPER_LOSSES, LossSettings, microbatch_losses


class DistillModel(nn.Module):
    """DINOv2's distillation: the objective of pretraining against a larger, frozen teacher with its own prototypes.

    No patch is masked and no block dropped. The iBOT loss reads all patch tokens of the global crops. The other losses
    are those of pretraining. `student`, which starts with new heads of the frozen ones' dimensions, and `teacher`, its
    average and the result, are ModuleDicts as in SSLModel. `frozen`, with its heads, gives the targets.

    Source: section 5 of Oquab et al. 2023 (the code was not released).
    """

    def __init__(self, backbone: VisionTransformer, frozen: FrozenTeacher, losses: LossSettings = PAPER_LOSSES) -> None:
        super().__init__()
        backbone.mask_token.requires_grad_(False)  # nothing is masked, and processes wait for every gradient
        heads = {
            name: ProjectionHead(
                backbone.embed_dim, head.num_prototypes, hidden_dim=head.hidden_dim, bottleneck_dim=head.bottleneck_dim
            )
            for name, head in frozen.networks.items()
            if isinstance(head, ProjectionHead)
        }
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.teacher = TeacherNetworks(copy.deepcopy(dict(self.student.items())))
        self.frozen = frozen
        self.losses = losses

    @torch.no_grad()
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
        """Return a step's crops with the frozen teacher's probabilities for them (arguments as in SSLModel).

        `masks` only tells how many patch tokens there are.
        """

        def teacher_logits(crops: Tensor) -> tuple[Tensor, Tensor]:
            features: Features = self.frozen(crops, backbone_of(self.student).patch_size)
            return head_logits(self.frozen.networks, features.cls_token, features.patch_tokens.flatten(0, 1))

        logits = in_parts(teacher_logits, global_crops, 2 * micro_batch_size)
        before_exchange()
        balanced = partial(sinkhorn_knopp, overwrite_logits=True, is_compiled=self.losses.compile)
        cls_probs, patch_probs = (balanced(rows, teacher_temp) for rows in logits)
        masks_of_all = every_patch(masks, global_crops.device)
        return whole_step(global_crops, local_crops, masks_of_all, cls_probs, patch_probs)

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the losses of a step from `teacher_targets`, or of a part of it, as SSLModel's forward does."""
        num_global = len(batch.global_crops)
        features: list[Features] = self.student["backbone"]([crops for crops, _ in batch.crops])
        cls_tokens = torch.cat([group.cls_token for group in features])
        patch_tokens = features[0].patch_tokens[:num_global]  # none where there are no global crops
        cls_logits, patch_logits = head_logits(self.student, cls_tokens, patch_tokens.flatten(0, 1))
        return microbatch_losses(batch, cls_logits, patch_logits, cls_tokens[:num_global], self.losses)
