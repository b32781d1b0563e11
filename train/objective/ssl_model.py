"""Student, teacher and heads in one module: the teacher answers for a step's crops, forward returns the losses.

Shapes: B images of a step, b of a part of it, 2 global and L local crops of each (V global ones in a part); crops are
view-major (all first views, then all second views). N patch tokens of a global crop, M masked ones of all, K
prototypes, D embed_dim.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from ...models.head import ProjectionHead
from ...models.vit import VisionTransformer
from .cpu_parallel import by_half
from .losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center, updated_center
from .micro_batch import Part, taught

Centering = Literal["sinkhorn_knopp", "softmax_center"]


class SSLModel(nn.Module):
    """DINOv2's objective: DINO on class tokens, iBOT on masked patches, KoLeo on the student's class tokens.

    `student` and `teacher` are ModuleDicts of `backbone`, `dino_head` and, when heads are untied, `ibot_head`. The
    teacher starts as the student's copy, gets no gradient and moves by `update_teacher` alone.

    Args:
        backbone, dino_head: the student's; both become part of this module.
        ibot_head: a head of its own for patches (untied heads), or None to share `dino_head`.
        centering: how teacher logits become probabilities.
        student_temp: temperature of the student's softmax.
        dino_weight, ibot_weight, koleo_weight: factors of the losses in `total`.
        koleo_distributed: KoLeo compares the images of all processes, not only of one.
    """

    dino_center: Tensor
    ibot_center: Tensor

    def __init__(
        self,
        backbone: VisionTransformer,
        dino_head: ProjectionHead,
        ibot_head: ProjectionHead | None = None,
        *,
        centering: Centering = "sinkhorn_knopp",
        student_temp: float = 0.1,
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        koleo_distributed: bool = False,
    ) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {"backbone": backbone, "dino_head": dino_head}
        if ibot_head is not None:
            parts["ibot_head"] = ibot_head
        self.student = nn.ModuleDict(parts)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.centering: Centering = centering
        self.student_temp = student_temp
        self.dino_weight, self.ibot_weight, self.koleo_weight = dino_weight, ibot_weight, koleo_weight
        self.koleo_distributed = koleo_distributed
        # Buffers, so that checkpoints hold them; they stay 0 under Sinkhorn-Knopp.
        self.register_buffer("dino_center", torch.zeros(1, dino_head.num_prototypes))
        self.register_buffer("ibot_center", torch.zeros(1, (ibot_head or dino_head).num_prototypes))

    def train(self, mode: bool = True) -> "SSLModel":
        """Set the student's mode; the teacher never drops anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def taught(self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, *, teacher_temp: float) -> Part:
        """Return a step's crops with the teacher's answers to them.

        Args:
            global_crops: (2 B, C, H, W), first views then second views.
            local_crops: (L B, C, h, w), view by view likewise, or None.
            masks: (2 B, N) bool, True where the student sees the mask token and the iBOT loss reads.
            teacher_temp: temperature of the teacher's probabilities.
        """
        teacher = self.teacher["backbone"]
        assert isinstance(teacher, VisionTransformer)

        def answers(crops: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
            [(cls_tokens, patch_tokens)] = teacher.class_and_chosen_patch_tokens([crops], [None], [masks])
            return head_logits(self.teacher, cls_tokens, patch_tokens)

        cls_logits, patch_logits = by_half(answers, global_crops, masks)
        if self.centering == "sinkhorn_knopp":
            cls_probs, patch_probs = (sinkhorn_knopp(logits, teacher_temp) for logits in (cls_logits, patch_logits))
        else:
            cls_probs = softmax_center(cls_logits, self.dino_center, teacher_temp)
            patch_probs = softmax_center(patch_logits, self.ibot_center, teacher_temp)
            if self.training:
                self.dino_center.copy_(updated_center(self.dino_center, cls_logits))
                self.ibot_center.copy_(updated_center(self.ibot_center, patch_logits))
        return taught(global_crops, local_crops, masks, cls_probs, patch_probs)

    def forward(self, part: Part) -> dict[str, Tensor]:
        """Return the losses of a step that `taught` made, or of a part of it, as `part_losses` names them."""
        student = self.student["backbone"]
        assert isinstance(student, VisionTransformer)
        # One packed pass over all crop sizes; the last block and the heads only where a loss reads.
        packed: list[tuple[Tensor, Tensor | None]] = [(part.global_crops, part.masks)] if len(part.global_crops) else []
        packed += [] if part.local_crops is None else [(part.local_crops, None)]
        masks = [mask for _, mask in packed]
        tokens = student.class_and_chosen_patch_tokens([crops for crops, _ in packed], masks, masks, part.generator)
        cls_tokens = torch.cat([cls_tokens for cls_tokens, _ in tokens])
        cls_logits, patch_logits = head_logits(self.student, cls_tokens, tokens[0][1])
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
        """Move every weight of the teacher to momentum * teacher + (1 - momentum) * student."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)


def head_logits(parts: nn.ModuleDict, cls_tokens: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of class tokens (rows, D) and patch tokens (M, D), in one pass when they share a head."""
    if "ibot_head" in parts:
        return parts["dino_head"](cls_tokens), parts["ibot_head"](patch_tokens)
    logits: Tensor = parts["dino_head"](torch.cat([cls_tokens, patch_tokens]))
    cls_logits, patch_logits = torch.split(logits, [len(cls_tokens), len(patch_tokens)])
    return cls_logits, patch_logits


def part_losses(
    part: Part,
    cls_logits: Tensor,
    patch_logits: Tensor,
    cls_tokens: Tensor,
    *,
    student_temp: float,
    dino_weight: float,
    ibot_weight: float,
    koleo_weight: float,
    koleo_distributed: bool = False,
) -> dict[str, Tensor]:
    """Return the losses of a part of a step, which add up to the step's, and `total` to go backward from.

    Args:
        cls_logits: (V b + L b, K), the student's for the part's global and local crops, view by view.
        patch_logits: (M, K), the student's for the patches under the part's masks, crop by crop.
        cls_tokens: (V b, D), the student's of the global crops, before the head.
        student_temp: temperature of the student's softmax.
        dino_weight, ibot_weight, koleo_weight: factors of the losses in `total`.
        koleo_distributed: whether KoLeo compares the images of all processes.

    Returns:
        `dino_local`, `dino_global` (each pair's mean cross-entropy over the number of all pairs, 2 + 2 L, so their
        sum is the average pair's), `ibot`, `koleo` (of each view by itself, for two views of one image are meant to be
        near), all before their weights; `total`; `student_cls_tokens` (V b, D), detached.

    Source: sections 4 and 5 of Oquab et al. 2023. Without local crops there are 2 pairs (the official code divides
    by 3).
    """
    num_views = len(part.cls_targets)
    # (V b + L b, K) -> (V, b, K) and (L, b, K)
    views = cls_logits.view(-1, part.num_images, cls_logits.shape[1])
    global_views, local_views = torch.split(views, [num_views, len(views) - num_views])
    zero = cls_logits.new_zeros((), dtype=torch.float32)
    losses = {"dino_local": zero, "dino_global": zero, "ibot": zero, "koleo": zero}
    if len(local_views):
        local_loss = dino_loss(local_views, part.all_cls_targets[None], student_temp=student_temp)
        losses["dino_local"] = part.share * local_loss / part.num_pairs
    if num_views:
        pairs = [
            dino_loss(view[None], probs[None], student_temp=student_temp)
            for view, probs in zip(global_views, part.cls_targets, strict=True)
        ]
        losses["dino_global"] = part.share * torch.stack(pairs).sum() / part.num_pairs
        patch_loss = ibot_loss(patch_logits, part.patch_targets, part.masks, student_temp=student_temp)
        losses["ibot"] = part.share * num_views / 2 * patch_loss
        if koleo_weight:
            by_view = [koleo_loss(view, gather=koleo_distributed) for view in cls_tokens.chunk(num_views)]
            losses["koleo"] = part.share * torch.stack(by_view).sum()
    losses["total"] = (
        dino_weight * (losses["dino_local"] + losses["dino_global"])
        + ibot_weight * losses["ibot"]
        + koleo_weight * losses["koleo"]
    )
    return losses | {"student_cls_tokens": cls_tokens.detach()}
