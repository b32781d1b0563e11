"""Student, teacher and heads in one module whose forward returns the losses of a training step.

Shapes: B images, 2 global and L local crops of each; crops are crop-major (all first views, then all second views).
N patch tokens of a global crop, M masked ones in all 2 B global crops, K prototypes, D embed_dim.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from ..models.head import ProjectionHead
from ..models.vit import VisionTransformer
from .losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center, updated_center

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
        # Buffers, so that checkpoints hold them; they stay 0 under Sinkhorn-Knopp.
        self.register_buffer("dino_center", torch.zeros(1, dino_head.num_prototypes))
        self.register_buffer("ibot_center", torch.zeros(1, (ibot_head or dino_head).num_prototypes))

    def train(self, mode: bool = True) -> "SSLModel":
        """Set the student's mode; the teacher never drops anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, *, teacher_temp: float
    ) -> dict[str, Tensor]:
        """Return the losses of a step and tensors to judge its health by, as `step_losses` names them.

        Args:
            global_crops: (2 B, C, H, W), first views then second views.
            local_crops: (L B, C, h, w), view by view likewise, or None.
            masks: (2 B, N) bool, True where the student sees the mask token and the iBOT loss reads.
            teacher_temp: temperature of the teacher's probabilities.
        """
        cls_probs, patch_probs = self.teacher_probs(global_crops, masks, teacher_temp)

        # One packed pass over both crop sizes; the last block and the heads only where a loss reads.
        student = self.student["backbone"]
        assert isinstance(student, VisionTransformer)
        images = [global_crops] if local_crops is None else [global_crops, local_crops]
        chosen = [masks, None][: len(images)]
        tokens = student.class_and_chosen_patch_tokens(images, chosen, chosen)
        global_cls_tokens, patch_tokens = tokens[0]
        cls_logits, patch_logits = head_logits(
            self.student, torch.cat([cls_tokens for cls_tokens, _ in tokens]), patch_tokens
        )
        return step_losses(
            cls_logits,
            cls_probs,
            patch_logits,
            patch_probs,
            masks,
            global_cls_tokens,
            student_temp=self.student_temp,
            dino_weight=self.dino_weight,
            ibot_weight=self.ibot_weight,
            koleo_weight=self.koleo_weight,
        )

    @torch.no_grad()
    def teacher_probs(self, global_crops: Tensor, masks: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
        """Return the teacher's probabilities for all class tokens (2 B, K) and for the masked patches (M, K)."""
        teacher = self.teacher["backbone"]
        assert isinstance(teacher, VisionTransformer)
        [(cls_tokens, patch_tokens)] = teacher.class_and_chosen_patch_tokens([global_crops], [None], [masks])
        cls_logits, patch_logits = head_logits(self.teacher, cls_tokens, patch_tokens)
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(cls_logits, teacher_temp), sinkhorn_knopp(patch_logits, teacher_temp)
        cls_probs = softmax_center(cls_logits, self.dino_center, teacher_temp)
        patch_probs = softmax_center(patch_logits, self.ibot_center, teacher_temp)
        if self.training:
            self.dino_center.copy_(updated_center(self.dino_center, cls_logits))
            self.ibot_center.copy_(updated_center(self.ibot_center, patch_logits))
        return cls_probs, patch_probs

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


def step_losses(
    cls_logits: Tensor,
    cls_probs: Tensor,
    patch_logits: Tensor,
    patch_probs: Tensor,
    masks: Tensor,
    cls_tokens: Tensor,
    *,
    student_temp: float,
    dino_weight: float,
    ibot_weight: float,
    koleo_weight: float,
) -> dict[str, Tensor]:
    """Return the losses of a step, `total` to go backward from, and detached tensors to judge its health by.

    Args:
        cls_logits: (2 B + L B, K), the student's for global and local crops, view by view.
        cls_probs: (2 B, K), the teacher's for the global crops.
        patch_logits, patch_probs: (M, K), student's and teacher's, crop by crop.
        masks: (2 B, N) bool with M True: the patches that the iBOT loss reads.
        cls_tokens: (2 B, D), the student's of the global crops, before the head.
        student_temp: temperature of the student's softmax.
        dino_weight, ibot_weight, koleo_weight: factors of the losses in `total`.

    Returns:
        `dino_local`, `dino_global` (each pair's mean cross-entropy over the number of all pairs, 2 + 2 L, so their
        sum is the average pair's), `ibot`, `koleo` (both views), all before their weights; `total`;
        `teacher_cls_probs` (K,), the teacher's class-token probabilities averaged over the batch; `teacher_entropy`
        (), their mean entropy in nats; `student_cls_tokens` (2 B, D).

    Source: sections 4 and 5 of Oquab et al. 2023. Without local crops there are 2 pairs (the official code divides
    by 3).
    """
    # (2 B + L B, K) -> (2 + L, B, K) and (2 B, K) -> (2, B, K)
    num_images, num_prototypes = len(cls_probs) // 2, cls_probs.shape[1]
    student_views = cls_logits.view(-1, num_images, num_prototypes)
    teacher_views = cls_probs.view(2, num_images, num_prototypes)
    num_pairs = 2 * len(student_views) - 2  # all of student and teacher, less each global crop with itself
    first_view, second_view, local_views = torch.split(student_views, [1, 1, len(student_views) - 2])
    losses = {
        "dino_local": dino_loss(local_views, teacher_views, student_temp=student_temp) / num_pairs,
        "dino_global": (
            dino_loss(first_view, teacher_views[1:], student_temp=student_temp)
            + dino_loss(second_view, teacher_views[:1], student_temp=student_temp)
        )
        / num_pairs,
        "ibot": ibot_loss(patch_logits, patch_probs, masks, student_temp=student_temp),
        "koleo": cls_tokens.new_zeros((), dtype=torch.float32),
    }
    if koleo_weight:
        # Each view by itself: two views of one image are meant to be near.
        losses["koleo"] = torch.stack([koleo_loss(view) for view in cls_tokens.chunk(2)]).sum()
    losses["total"] = (
        dino_weight * (losses["dino_local"] + losses["dino_global"])
        + ibot_weight * losses["ibot"]
        + koleo_weight * losses["koleo"]
    )
    return losses | {
        "teacher_cls_probs": cls_probs.mean(0),
        "teacher_entropy": torch.special.entr(cls_probs).sum(1).mean(),
        "student_cls_tokens": cls_tokens.detach(),
    }
