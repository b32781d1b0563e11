"""A training step's crops with the teacher's targets, whole or split into micro-batches.

The losses of the micro-batches add up to the step's. A crop's loss depends on other crops only through the teacher's
targets, which are computed first for the whole step, and through KoLeo, which compares the images of one view. So the
student may see one view after the other, for a third of the memory and the same sum. Fewer images at a time save more
memory; then KoLeo compares only those.

Shapes: B images of a step (b of a micro-batch), 2 global and L local crops of each (V global ones in a micro-batch);
crops are view-major (all first views, then all second views). N patch tokens of a global crop, M of all that the iBOT
loss reads, with the padding of `Masks`; K prototypes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..counter_rng import derived_seed
from .masks import Masks


@dataclass(frozen=True)
class MicroBatch:
    """Crops that the student sees in one pass, and the teacher's targets for them."""

    global_crops: Tensor  # (V b, C, H, W), V from 0 to 2
    local_crops: Tensor | None  # (L b, C, h, w), or some of the L views
    masks: Masks  # of the V b global crops: where the iBOT loss reads
    cls_targets: Tensor  # (V, b, K), probabilities: of the other global crop of the image; features: of the same one
    cls_target_sum: Tensor  # (b, K), over the two global crops: the target of the local crops
    patch_targets: Tensor  # (M, K), of the patches under the masks, crop by crop; of padding, zeros or any
    num_pairs: int  # of a student's and a teacher's view in the whole step: 2 L + 2
    loss_weight: float = 1.0  # share of the step's images, b / B
    are_probs: bool = True  # targets over prototypes; False: features, K numbers each
    generator: torch.Generator | None = None  # of stochastic depth; None: torch's own

    @property
    def num_images(self) -> int:
        """Return b."""
        return len(self.cls_target_sum)

    @property
    def num_local_views(self) -> int:
        """Return L of the whole step."""
        return self.num_pairs // 2 - 1

    @property
    def crops(self) -> list[tuple[Tensor, Masks | None]]:
        """Return the crops of each size that there are, global ones first and with their masks."""
        local_crops = [] if self.local_crops is None else [self.local_crops]
        with_masks: list[tuple[Tensor, Masks | None]] = [(it, self.masks) for it in [self.global_crops] if len(it)]
        return with_masks + [(it, None) for it in local_crops]


def whole_step(
    global_crops: Tensor,
    local_crops: Tensor | None,
    masks: Masks,
    cls_targets: Tensor,
    patch_targets: Tensor,
    *,
    are_probs: bool = True,
) -> MicroBatch:
    """Return a whole step from its crops and the teacher's targets of the global ones, (2 B, K) and (M, K)."""
    both = cls_targets.view(2, -1, cls_targets.shape[1])  # (2 B, K) -> (2, B, K)
    num_local = 0 if local_crops is None else len(local_crops) // both.shape[1]
    return MicroBatch(
        global_crops,
        local_crops,
        masks,
        both.flip(0) if are_probs else both,
        both.sum(0),
        patch_targets,
        num_pairs=2 * num_local + 2,
        are_probs=are_probs,
    )


def split_microbatches(step: MicroBatch, *, sequential_views: bool, num_images: int = 0) -> Iterator[MicroBatch]:
    """Split a whole step by images, and by views: half of the local crops, the others, each global view.

    The last micro-batch always holds global crops, so that all of a model's weights have a gradient from it.
    `num_images` is that of a micro-batch, 0 for all; views are split under `sequential_views`.
    """
    size = num_images or step.num_images
    for start in range(0, step.num_images, size):
        batch = step
        if size < step.num_images:
            images = slice(start, start + size)
            local_crops = None if step.local_crops is None else _cut(step, step.local_crops, slice(None), images)
            batch = _select(step, slice(None), images, local_crops)
        if sequential_views:
            yield from (_select(batch, slice(0), slice(None), it) for it in _local_halves(batch) if it is not None)
            yield from (_select(batch, slice(view, view + 1), slice(None), None) for view in (0, 1))
        else:
            yield batch


def split_by_view(batch: MicroBatch, seed: int) -> list[MicroBatch]:
    """Split into the first global view with half of the local crops, and the second with the others.

    Each half draws random numbers of its own.
    """
    return [
        replace(
            _select(batch, slice(view, view + 1), slice(None), local_crops),
            generator=torch.Generator().manual_seed(derived_seed(seed, "half", view)),
        )
        for view, local_crops in enumerate(_local_halves(batch))
    ]


def _local_halves(batch: MicroBatch) -> tuple[Tensor | None, Tensor | None]:
    if batch.local_crops is None:
        return None, None
    num_local = len(batch.local_crops) // batch.num_images
    middle = (num_local + 1) // 2 * batch.num_images
    return batch.local_crops[:middle], batch.local_crops[middle:] if num_local > 1 else None


def _select(batch: MicroBatch, views: slice, images: slice, local_crops: Tensor | None) -> MicroBatch:
    """Return the global crops of some views and images with their targets, and the given local crops."""
    cls_target_sum = batch.cls_target_sum[images]
    first, last, _ = images.indices(batch.num_images)
    every_view = range(len(batch.cls_targets))
    starts = [view * batch.num_images for view in every_view[views]]
    crops = [range(start + first, start + last) for start in starts] or [range(0)]
    return replace(
        batch,
        global_crops=_cut(batch, batch.global_crops, views, images),
        local_crops=local_crops,
        masks=batch.masks.of_crops(crops),
        cls_targets=batch.cls_targets[views, images],
        cls_target_sum=cls_target_sum,
        patch_targets=batch.masks.rows_of(batch.patch_targets, crops),
        loss_weight=batch.loss_weight * len(cls_target_sum) / batch.num_images,
    )


def _cut(batch: MicroBatch, crops: Tensor, views: slice, images: slice) -> Tensor:
    """Return the crops (views b, ...) of some views and images."""
    return crops.view(-1, batch.num_images, *crops.shape[1:])[views, images].flatten(0, 1)
