"""The frozen teacher of a distillation."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import cpu
from ...models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ...models.vit import Features, VisionTransformer
from .networks import TeacherNetworks, backbone_of


class FrozenTeacher(nn.Module):
    """A backbone and perhaps heads, without gradients, that see the student's crops as their own preprocessing wants.

    Args:
        networks: `backbone`, and for the prototypes' objective `dino_head` and, when its heads are untied, `ibot_head`.
        mean, std: by which the teacher's images are normalised.
        crops_mean, crops_std: by which the student's crops are.
        half: what autocast computes in, if it does; the weights that it would convert at every step are kept in it. The
            results stay the same.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        crops_mean: Sequence[float] = IMAGENET_MEAN,
        crops_std: Sequence[float] = IMAGENET_STD,
        half: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.networks = TeacherNetworks(networks)
        own_mean, own_std, their_mean, their_std = (
            torch.tensor(numbers).view(-1, 1, 1) for numbers in (crops_mean, crops_std, mean, std)
        )
        self.register_buffer("scale", own_std / their_std)
        self.register_buffer("shift", (own_mean - their_mean) / their_std)
        if half is not None:
            for module in self.networks.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(half)

    @property
    def backbone(self) -> VisionTransformer:
        """Return the backbone."""
        return backbone_of(self.networks)

    def forward(self, crops: Tensor, patch_size: int) -> Features:
        """Return the teacher's features of crops (B, C, H, W), on the patch grid of a student of `patch_size`.

        A teacher of another patch size sees the crops resized so that its grid is the same.
        """
        height, width = (side // patch_size * self.backbone.patch_size for side in crops.shape[2:])
        if (height, width) != tuple(crops.shape[2:]):
            crops = F.interpolate(crops, size=(height, width), mode="bicubic", antialias=True)

        def features(crops: Tensor) -> tuple[Tensor, ...]:
            output = self.backbone.forward_features(crops)
            return output.cls_token, output.register_tokens, output.patch_tokens

        return Features(*cpu.in_halves(features, crops * self.scale + self.shift))


def in_parts(function: Callable[[Tensor], tuple[Tensor, Tensor]], crops: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return two results, row by row, of `size` crops at a time; 0 for all."""
    results = [function(part) for part in torch.split(crops, size or len(crops))]
    first, second = results[0] if len(results) == 1 else (torch.cat(rows) for rows in zip(*results, strict=True))
    return first, second
