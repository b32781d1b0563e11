"""Student, teacher and heads in one module: `teacher_targets` prepares a step, forward returns the student's losses.

Shapes as in `micro_batch`; D is embed_dim.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ...models import cpu
from ...models.head import ProjectionHead
from ...models.vit import VisionTransformer
from .losses import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp, softmax_center, updated_center
from .masks import Padding, placed_masks
from .micro_batch import MicroBatch, whole_step
from .networks import TeacherNetworks, backbone_of, head_logits

Centering = Literal["sinkhorn_knopp", "softmax_center"]


@dataclass(frozen=True)
class LossSettings:
    """How the student's losses are computed and weighted in `total`."""

    student_temp: float = 0.1  # temperature of the student's softmax
    dino_weight: float = 1.0  # of the class tokens' losses
    ibot_weight: float = 1.0  # of the patch tokens' loss
    koleo_weight: float = 0.1
    koleo_distributed: bool = False  # KoLeo compares the images of all processes, not only of one
    compile: bool = False  # what runs over all prototypes, as `cross_entropy` and `sinkhorn_knopp` say


PAPER_LOSSES = LossSettings()


class SSLModel(nn.Module):
    """DINOv2's objective: DINO on class tokens, iBOT on masked patches, KoLeo on the student's class tokens.

    `student` and `teacher` are ModuleDicts of `backbone`, `dino_head` and, when heads are untied, `ibot_head`. The
    teacher starts as a copy of the student, gets no gradient and is moved by `update_teacher` alone.

    Args:
        backbone, dino_head: the student's; both become part of this module.
        ibot_head: a head of its own for patches (untied heads), or None to share `dino_head`.
        padding: makes the number of rows the same at every step, whatever the masks; None on CPUs.
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
        losses: LossSettings = PAPER_LOSSES,
        padding: Padding | None = None,
    ) -> None:
        super().__init__()
        networks: dict[str, nn.Module] = {"backbone": backbone, "dino_head": dino_head}
        if ibot_head is not None:
            networks["ibot_head"] = ibot_head
        self.student = nn.ModuleDict(networks)
        self.teacher = TeacherNetworks(copy.deepcopy(networks))
        self.centering: Centering = centering
        self.losses = losses
        self.padding = padding
        # Buffers, so that checkpoints hold them; they stay 0 under Sinkhorn-Knopp.
        self.register_buffer("dino_center", torch.zeros(1, dino_head.num_prototypes))
        self.register_buffer("ibot_center", torch.zeros(1, (ibot_head or dino_head).num_prototypes))

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
        """Return a step's crops with the teacher's probabilities for them.

        Args:
            global_crops: (2 B, C, H, W), first views then second views.
            local_crops: (L B, C, h, w), view by view likewise, or None.
            masks: (2 B, N) bool in main memory, True where the student sees the mask token and the iBOT loss reads.
            teacher_temp: temperature of the teacher's probabilities.
            micro_batch_size: the networks see the crops of so many images at a time; 0 = of all.
            before_exchange: called after the networks, before anything is added up over processes.
        """
        placed = placed_masks(masks, global_crops.device, self.padding)
        num_crops = len(global_crops)

        def teacher_logits(crops: range) -> tuple[Tensor, Tensor]:
            selected = (placed if len(crops) == num_crops else placed.of_crops([crops])).selected
            images = global_crops[crops.start : crops.stop]
            [(cls_tokens, patch_tokens)] = backbone_of(self.teacher).forward_selected([images], [None], [selected])
            return head_logits(self.teacher, cls_tokens, patch_tokens)

        logits: tuple[Tensor, Tensor] | None = None
        for crops in parts_of(num_crops, 2 * micro_batch_size):
            if cpu.runs_in_halves(global_crops.device) and self.padding is None:
                parts = list(zip(halves(crops), cpu.in_threads(teacher_logits, halves(crops)), strict=True))
            else:
                parts = [(crops, teacher_logits(crops))]
            for part, found in parts:
                if len(part) == num_crops:
                    logits = found
                    continue
                if logits is None:
                    rows = num_crops, len(placed.patches)
                    logits = (
                        found[0].new_empty(rows[0], found[0].shape[1]),
                        found[1].new_zeros(rows[1], found[1].shape[1]),
                    )
                [place] = placed.places([part])
                logits[0][part.start : part.stop] = found[0]
                logits[1][place] = found[1][: place.stop - place.start]
                del found
        assert logits is not None
        cls_logits, patch_logits = logits
        before_exchange()
        is_row = placed.is_row
        if self.centering == "sinkhorn_knopp":
            balanced = partial(sinkhorn_knopp, overwrite_logits=True, is_compiled=self.losses.compile)
            cls_probs = balanced(cls_logits, teacher_temp)
            patch_probs = balanced(patch_logits, teacher_temp, is_row)
        else:
            cls_probs = softmax_center(cls_logits, self.dino_center, teacher_temp)
            patch_probs = softmax_center(patch_logits, self.ibot_center, teacher_temp)
            if self.training:
                self.dino_center.copy_(updated_center(self.dino_center, cls_logits))
                self.ibot_center.copy_(updated_center(self.ibot_center, patch_logits, is_row))
        return whole_step(global_crops, local_crops, placed, cls_probs, patch_probs)

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the losses of a step from `teacher_targets`, or of a part of it, as `microbatch_losses` names them."""
        # One packed pass over all crop sizes; the last block and the heads only for the tokens that a loss reads.
        crops, masks = zip(*batch.crops, strict=True)
        is_masked = [None if part is None else part.is_masked for part in masks]
        selected = [None if part is None else part.selected for part in masks]
        tokens = backbone_of(self.student).forward_selected(crops, is_masked, selected, batch.generator)
        cls_tokens = torch.cat([cls_tokens for cls_tokens, _ in tokens])
        cls_logits, patch_logits = head_logits(self.student, cls_tokens, tokens[0][1])
        return microbatch_losses(batch, cls_logits, patch_logits, cls_tokens[: len(batch.global_crops)], self.losses)


def parts_of(num_crops: int, size: int) -> list[range]:
    """Return ranges of `size` crops, 0 for all."""
    size = size or num_crops
    return [range(start, min(start + size, num_crops)) for start in range(0, num_crops, size)]


def halves(crops: range) -> list[range]:
    """Return both halves of a range."""
    middle = (crops.start + crops.stop) // 2
    return [range(crops.start, middle), range(middle, crops.stop)]


def microbatch_losses(
    batch: MicroBatch, cls_logits: Tensor, patch_logits: Tensor, cls_tokens: Tensor, settings: LossSettings
) -> dict[str, Tensor]:
    """Return the losses of a micro-batch, which add up to the step's, and `total` to run backward from.

    Args:
        cls_logits: (V b + L b, K), the student's for the global and local crops, view by view.
        patch_logits: (M, K), the student's for the patches under the masks, crop by crop.
        cls_tokens: (V b, D), the student's of the global crops, before the head.

    Returns:
        `dino_local`, `dino_global` (each pair's mean cross-entropy over the number of all pairs, 2 + 2 L, so their
        sum is the average pair's), `ibot`, `koleo` (of each view by itself, since two views of one image should be
        near), all before their weights; `total`; `student_cls_tokens` (V b, D), detached.

    Source: sections 4 and 5 of Oquab et al. 2023. Without local crops there are 2 pairs (the official code divides
    by 3).
    """
    num_views = len(batch.cls_targets)
    # (V b + L b, K) -> (V, b, K) and (L, b, K)
    views = cls_logits.view(-1, batch.num_images, cls_logits.shape[1])
    global_views, local_views = torch.split(views, [num_views, len(views) - num_views])
    zero = cls_logits.new_zeros((), dtype=torch.float32)
    losses = {"dino_local": zero, "dino_global": zero, "ibot": zero, "koleo": zero}
    pair_losses = partial(dino_loss, student_temp=settings.student_temp, is_compiled=settings.compile)
    if len(local_views):
        local_loss = pair_losses(local_views, batch.cls_target_sum[None])
        losses["dino_local"] = batch.loss_weight * local_loss / batch.num_pairs
    if num_views:
        pairs = [
            pair_losses(view[None], probs[None]) for view, probs in zip(global_views, batch.cls_targets, strict=True)
        ]
        losses["dino_global"] = batch.loss_weight * torch.stack(pairs).sum() / batch.num_pairs
        masks = batch.masks
        patch_loss = ibot_loss(
            patch_logits,
            batch.patch_targets,
            masks.is_masked,
            student_temp=settings.student_temp,
            weights=masks.weights,
            is_compiled=settings.compile,
        )
        losses["ibot"] = batch.loss_weight * num_views / 2 * patch_loss
        losses["koleo"] = batch.loss_weight * koleo_of_views(cls_tokens, num_views, settings)
    losses["total"] = (
        settings.dino_weight * (losses["dino_local"] + losses["dino_global"])
        + settings.ibot_weight * losses["ibot"]
        + settings.koleo_weight * losses["koleo"]
    )
    return losses | {"student_cls_tokens": cls_tokens.detach()}


def koleo_of_views(cls_tokens: Tensor, num_views: int, settings: LossSettings) -> Tensor:
    """Return the sum of the KoLeo losses of each view's class tokens, (V b, D) -> (); 0 where its weight is 0."""
    if not settings.koleo_weight:
        return cls_tokens.new_zeros((), dtype=torch.float32)
    views = [koleo_loss(view, gather=settings.koleo_distributed) for view in cls_tokens.chunk(num_views)]
    return torch.stack(views).sum()
