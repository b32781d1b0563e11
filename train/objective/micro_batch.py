"""A training step's crops with what the teacher says of them, whole or in parts whose losses add up to the step's.

The losses of a crop depend on other crops only through the teacher's probabilities, which are taken first, and through
KoLeo, which looks at one view at a time. So the student may see the views one after the other, for a third of the
memory, and the sums stay what they were. Fewer images at a time save more; KoLeo then compares those among themselves.

Shapes: B images of a step (b of a part), 2 global and L local crops of each (V global ones in a part); crops are
view-major (all first views, then all second views). N patch tokens of a global crop, M of all that the iBOT loss
reads, K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..counter_rng import derived_seed


@dataclass(frozen=True)
class Part:
    """Crops that the student sees in one pass, and the teacher's answers to them."""

    global_crops: Tensor  # (V b, C, H, W), V from 0 to 2
    local_crops: Tensor | None  # (L b, C, h, w), or some of the L views
    masks: Tensor  # (V b, N) bool, True where the iBOT loss reads
    cls_targets: Tensor  # (V, b, K), the teacher's of the other global crop than each; features: of the same one
    all_cls_targets: Tensor  # (b, K), the sum of the teacher's two: what local crops are compared with
    patch_targets: Tensor  # (M, K), the teacher's of the patches under the masks, crop by crop
    num_pairs: int  # of a student's and a teacher's view in the whole step: 2 L + 2
    share: float = 1.0  # of the step's images: b / B
    are_probs: bool = True  # the targets, over prototypes; false: features, K numbers each
    generator: torch.Generator | None = None  # of stochastic depth; None: torch's own

    @property
    def num_images(self) -> int:
        """Return b."""
        return len(self.all_cls_targets)

    @property
    def num_local_views(self) -> int:
        """Return L of the whole step."""
        return self.num_pairs // 2 - 1


def taught(
    global_crops: Tensor, local_crops: Tensor | None, masks: Tensor, cls_probs: Tensor, patch_probs: Tensor
) -> Part:
    """Return a whole step from its crops and the teacher's probabilities, (2 B, K) and (M, K)."""
    both = cls_probs.view(2, -1, cls_probs.shape[1])  # (2 B, K) -> (2, B, K)
    num_local = 0 if local_crops is None else len(local_crops) // both.shape[1]
    return Part(global_crops, local_crops, masks, both.flip(0), both.sum(0), patch_probs, 2 * num_local + 2)


def parts(step: Part, *, by_view: bool, num_images: int = 0) -> Iterator[Part]:
    """Cut a whole step: into half of the local crops, the others, the first and the second global ones; by images.

    The last part always holds global crops, so that all of a model's weights have a gradient from it.

    Args:
        by_view: whether each kind of view is a part of its own.
        num_images: images a part, 0 for all.
    """
    size = num_images or step.num_images
    for start in range(0, step.num_images, size):
        of_images = _images(step, start, min(start + size, step.num_images)) if size < step.num_images else step
        if by_view:
            yield from (_views(of_images, [], crops) for crops in _local_halves(of_images) if crops is not None)
            yield from (_views(of_images, [view], None) for view in (0, 1))
        else:
            yield of_images


def halves(step: Part, seed: int) -> tuple[Part, Part]:
    """Cut a step, or some images of it, into the first view with half of the local crops, and the second view.

    Their losses add up to the step's, KoLeo's too, and each draws random numbers of its own.
    """
    first, second = (
        replace(
            _views(step, [view], local_crops),
            generator=torch.Generator().manual_seed(derived_seed(seed, "half", view)),
        )
        for view, local_crops in enumerate(_local_halves(step))
    )
    return first, second


def _local_halves(part: Part) -> tuple[Tensor | None, Tensor | None]:
    if part.local_crops is None:
        return None, None
    num_local = len(part.local_crops) // part.num_images
    middle = (num_local + 1) // 2 * part.num_images
    return part.local_crops[:middle], part.local_crops[middle:] if num_local > 1 else None


def _images(part: Part, start: int, stop: int) -> Part:
    images = torch.arange(part.num_images, device=part.masks.device)
    chosen = (images >= start) & (images < stop)

    def cut(crops: Tensor) -> Tensor:
        views = crops.view(-1, part.num_images, *crops.shape[1:])
        return views[:, start:stop].flatten(0, 1)

    return replace(
        part,
        global_crops=cut(part.global_crops),
        local_crops=None if part.local_crops is None else cut(part.local_crops),
        masks=cut(part.masks),
        cls_targets=part.cls_targets[:, start:stop],
        all_cls_targets=part.all_cls_targets[start:stop],
        patch_targets=part.patch_targets[_of_each_patch(part.masks, chosen.repeat(len(part.cls_targets)))],
        share=part.share * (stop - start) / part.num_images,
    )


def _views(part: Part, views: list[int], local_crops: Tensor | None) -> Part:
    crops = torch.zeros(len(part.cls_targets), dtype=torch.bool, device=part.masks.device)
    crops[views] = True
    crops = crops.repeat_interleave(part.num_images)  # (2 b,)
    return replace(
        part,
        global_crops=part.global_crops[crops],
        local_crops=local_crops,
        masks=part.masks[crops],
        cls_targets=part.cls_targets[views],
        patch_targets=part.patch_targets[_of_each_patch(part.masks, crops)],
    )


def _of_each_patch(masks: Tensor, crops: Tensor) -> Tensor:
    """Return for every patch under the masks, (M,) bool, whether it is of one of the crops, (crops,) bool."""
    return torch.repeat_interleave(crops, masks.sum(1))
