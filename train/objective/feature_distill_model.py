"""A frozen teacher without heads, a smaller student that learns its tokens, and the student's average, in one module.

Shapes: B images of a step, b of a part of it, 2 global and L local crops of each (V global ones in a part); crops are
view-major (all first views, then all second views). N patch tokens of a global crop, D the student's embed_dim, K the
teacher's.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.vit import Features, VisionTransformer
from .frozen_teacher import FrozenTeacher
from .losses import all_reduce_sum, koleo_loss
from .micro_batch import Part

MIN_STD = 1e-6  # of a teacher's channel; chosen: one that never changes stays 0


class FeatureDistillModel(nn.Module):
    """Distillation of a model whose heads nobody has: the student's tokens, projected, are the teacher's.

    Class and patch tokens of the global crops are matched with the teacher's of the same crop, class tokens of the
    local crops with the mean of the teacher's two global ones, all by smooth L1 after the teacher's tokens were
    standardised. Nothing is masked or dropped, KoLeo spreads the student's class tokens as in pretraining. `student`
    holds `backbone` and two projectors; `teacher` is the average of the backbone, which is the result, and `frozen` the
    model that teaches.

    Args:
        backbone: the student's; width, depth and patch size are its own.
        frozen: the teaching model; heads that it may have are not used.
        dino_weight: of the class tokens' losses in `total`; `ibot_weight` of the patch tokens'; `koleo_weight`.
        koleo_distributed: as in SSLModel.

    Source: chosen; the paper distils by heads. Standardised targets: Heinrich et al. 2025 (RADIOv2.5).
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        frozen: FrozenTeacher,
        *,
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_distributed: bool = False,
    ) -> None:
        super().__init__()
        backbone.mask_token.requires_grad_(False)  # nothing is masked, and processes wait for every gradient
        widths = backbone.embed_dim, frozen.backbone.embed_dim
        self.student = nn.ModuleDict(
            {"backbone": backbone, "cls_projector": nn.Linear(*widths), "patch_projector": nn.Linear(*widths)}
        )
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(backbone)}).requires_grad_(False).eval()
        self.frozen = frozen
        self.dino_weight, self.ibot_weight, self.koleo_weight = dino_weight, ibot_weight, koleo_weight
        self.koleo_distributed = koleo_distributed

    @property
    def backbone(self) -> VisionTransformer:
        """Return the student's backbone."""
        backbone = self.student["backbone"]
        assert isinstance(backbone, VisionTransformer)
        return backbone

    def train(self, mode: bool = True) -> "FeatureDistillModel":
        """Set the student's mode; the other two never drop anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def taught(self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, *, teacher_temp: float) -> Part:
        """Return a step's crops with the frozen teacher's standardised tokens of the global ones.

        `masks` (2 B, N) only tells how many patch tokens there are; `teacher_temp` is for teachers with prototypes.
        """
        with torch.inference_mode():
            features: Features = self.frozen(global_crops, self.backbone.patch_size)
        # Outside inference mode, for the targets are kept for the way back.
        cls_tokens = standardised(features.cls_token)
        both = cls_tokens.view(2, -1, cls_tokens.shape[1])  # (2 B, K) -> (2, B, K)
        num_local = 0 if local_crops is None else len(local_crops) // both.shape[1]
        return Part(
            global_crops,
            local_crops,
            torch.ones_like(masks),
            both,
            both.sum(0),
            standardised(features.patch_tokens.flatten(0, 1)),
            2 * num_local + 2,
            are_probs=False,
        )

    def forward(self, part: Part) -> dict[str, Tensor]:
        """Return the losses of a step that `taught` made, or of a part of it, which add up to the step's.

        Returns:
            `cls_global`, `cls_local`, `patch` (means over tokens and channels) and `koleo`, all before their weights;
            `total`; `student_cls_tokens` (V b, D), detached.
        """
        packed = [part.global_crops] if len(part.global_crops) else []
        packed += [] if part.local_crops is None else [part.local_crops]
        features: list[Features] = self.student["backbone"](packed)
        cls_tokens = torch.cat([group.cls_token for group in features])
        num_views, num_global = len(part.cls_targets), len(part.global_crops)
        # (V b + L b, D) -> (V + L, b, K)
        views = self.student["cls_projector"](cls_tokens).float().view(-1, *part.all_cls_targets.shape)
        zero = views.new_zeros(())
        losses = {"cls_global": zero, "cls_local": zero, "patch": zero, "koleo": zero}
        if len(views) > num_views:
            local_views = views[num_views:]
            targets = (part.all_cls_targets / 2).expand_as(local_views)
            share = part.share * len(local_views) / part.num_local_views
            losses["cls_local"] = share * F.smooth_l1_loss(local_views, targets)
        if num_views:
            share = part.share * num_views / 2
            losses["cls_global"] = share * F.smooth_l1_loss(views[:num_views], part.cls_targets)
            patches = self.student["patch_projector"](features[0].patch_tokens.flatten(0, 1)).float()
            losses["patch"] = share * F.smooth_l1_loss(patches, part.patch_targets)
            if self.koleo_weight:
                groups = cls_tokens[:num_global].chunk(num_views)
                by_view = [koleo_loss(view, gather=self.koleo_distributed) for view in groups]
                losses["koleo"] = part.share * torch.stack(by_view).sum()
        losses["total"] = (
            self.dino_weight * (losses["cls_global"] + losses["cls_local"])
            + self.ibot_weight * losses["patch"]
            + self.koleo_weight * losses["koleo"]
        )
        return losses | {"student_cls_tokens": cls_tokens[:num_global].detach()}

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the average of the student's backbone to momentum * average + (1 - momentum) * student."""
        average, own = self.teacher["backbone"].parameters(), self.student["backbone"].parameters()
        torch._foreach_lerp_(list(average), list(own), 1 - momentum)


@torch.no_grad()
def standardised(tokens: Tensor) -> Tensor:
    """Return tokens (rows, K) with mean 0 and deviation 1 of each channel over all processes' rows, in float32."""
    rows = tokens.float()
    num_rows = all_reduce_sum(torch.tensor(float(len(rows)), device=rows.device))
    centred = rows - all_reduce_sum(rows.sum(0)) / num_rows
    variance = all_reduce_sum(centred.square().sum(0)) / num_rows
    return centred / variance.sqrt().clamp(min=MIN_STD)
