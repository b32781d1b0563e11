"""Distillation by features, for a teacher without heads: the student's tokens, projected, match the teacher's.

Shapes as in `micro_batch`; D is the student's embed_dim, K the teacher's.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ...models.vit import Features, VisionTransformer
from .frozen_teacher import FrozenTeacher, in_parts
from .losses import all_reduce_sum
from .masks import every_patch
from .micro_batch import MicroBatch, whole_step
from .networks import TeacherNetworks, backbone_of
from .ssl_model import PAPER_LOSSES, LossSettings, koleo_of_views

MIN_STD = 1e-6  # of a teacher's channel; chosen: a constant channel stays 0


class FeatureDistillModel(nn.Module):
    """Distillation of a model whose heads are not available, by smooth L1 to its standardised tokens.

    Class and patch tokens of a global crop match the teacher's of the same crop. Class tokens of local crops match the
    mean of the teacher's two global ones. Nothing is masked or dropped. KoLeo spreads the student's class tokens as in
    pretraining. `student` holds `backbone` and two projectors; `teacher` is the average of the backbone, which is the
    result, and `frozen`, without its heads if any, gives the targets.

    Source: chosen; the paper distils by heads. Standardised targets: Heinrich et al. 2025 (RADIOv2.5).
    """

    def __init__(self, backbone: VisionTransformer, frozen: FrozenTeacher, losses: LossSettings = PAPER_LOSSES) -> None:
        super().__init__()
        backbone.mask_token.requires_grad_(False)  # nothing is masked, and processes wait for every gradient
        widths = backbone.embed_dim, frozen.backbone.embed_dim
        self.student = nn.ModuleDict(
            {"backbone": backbone, "cls_projector": nn.Linear(*widths), "patch_projector": nn.Linear(*widths)}
        )
        self.teacher = TeacherNetworks({"backbone": copy.deepcopy(backbone)})
        self.frozen, self.losses = frozen, losses

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
        """Return a step's crops with the frozen teacher's standardised tokens of the global ones.

        `masks` only tells how many patch tokens there are; `teacher_temp` is for teachers with prototypes.
        """

        def teacher_tokens(crops: Tensor) -> tuple[Tensor, Tensor]:
            features: Features = self.frozen(crops, backbone_of(self.student).patch_size)
            return features.cls_token, features.patch_tokens.flatten(0, 1)

        with torch.inference_mode():
            tokens = in_parts(teacher_tokens, global_crops, 2 * micro_batch_size)
        before_exchange()
        # Outside inference mode, since backward needs the targets.
        cls_tokens, patch_tokens = map(standardise, tokens)
        masks_of_all = every_patch(masks, global_crops.device)
        return whole_step(global_crops, local_crops, masks_of_all, cls_tokens, patch_tokens, are_probs=False)

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the losses of a step from `teacher_targets`, or of a part of it; those of the parts add up.

        Returns:
            `cls_global`, `cls_local`, `patch` (means over tokens and channels) and `koleo`, all before their weights;
            `total`; `student_cls_tokens` (V b, D), detached.
        """
        features: list[Features] = self.student["backbone"]([crops for crops, _ in batch.crops])
        cls_tokens = torch.cat([group.cls_token for group in features])
        num_views, num_global = len(batch.cls_targets), len(batch.global_crops)
        # (V b + L b, D) -> (V + L, b, K)
        views = self.student["cls_projector"](cls_tokens).float().view(-1, *batch.cls_target_sum.shape)
        zero = views.new_zeros(())
        losses = {"cls_global": zero, "cls_local": zero, "patch": zero, "koleo": zero}
        if len(views) > num_views:
            local_views = views[num_views:]
            targets = (batch.cls_target_sum / 2).expand_as(local_views)
            weight = batch.loss_weight * len(local_views) / batch.num_local_views
            losses["cls_local"] = weight * F.smooth_l1_loss(local_views, targets)
        if num_views:
            weight = batch.loss_weight * num_views / 2
            losses["cls_global"] = weight * F.smooth_l1_loss(views[:num_views], batch.cls_targets)
            patches = self.student["patch_projector"](features[0].patch_tokens.flatten(0, 1)).float()
            losses["patch"] = weight * F.smooth_l1_loss(patches, batch.patch_targets)
            losses["koleo"] = batch.loss_weight * koleo_of_views(cls_tokens[:num_global], num_views, self.losses)
        losses["total"] = (
            self.losses.dino_weight * (losses["cls_global"] + losses["cls_local"])
            + self.losses.ibot_weight * losses["patch"]
            + self.losses.koleo_weight * losses["koleo"]
        )
        return losses | {"student_cls_tokens": cls_tokens[:num_global].detach()}


@torch.no_grad()
def standardise(tokens: Tensor) -> Tensor:
    """Return tokens (rows, K) with mean 0 and deviation 1 of each channel over all processes' rows, in float32."""
    rows = tokens.float()
    num_rows = all_reduce_sum(rows.new_full((), len(rows)))
    centred = rows - all_reduce_sum(rows.sum(0)) / num_rows
    variance = all_reduce_sum(centred.square().sum(0)) / num_rows
    return centred / variance.sqrt().clamp(min=MIN_STD)
