"""The model that teaches in a distillation: it never learns, and is shown the student's crops the way it knows images.

Shapes: B crops, N patch tokens of each, D the teacher's embed_dim.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.preprocess import IMAGENET_MEAN, IMAGENET_STD
from ...models.vit import Features, VisionTransformer
from .cpu_parallel import by_half


class FrozenTeacher(nn.Module):
    """A backbone and perhaps heads, always in evaluation mode, without gradients.

    Args:
        parts: `backbone`, and for the prototypes' objective `dino_head` and, when its heads are untied, `ibot_head`.
        mean, std: by which the teacher's images are normalised.
        crops_mean, crops_std: by which the student's crops are.
        half: keep in bfloat16 the weights that autocast would turn to it at every step. The numbers stay the same.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        *,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        crops_mean: Sequence[float] = IMAGENET_MEAN,
        crops_std: Sequence[float] = IMAGENET_STD,
        half: bool = False,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts)).requires_grad_(False).eval()
        own_mean, own_std, their_mean, their_std = (
            torch.tensor(numbers).view(-1, 1, 1) for numbers in (crops_mean, crops_std, mean, std)
        )
        self.register_buffer("scale", own_std / their_std)
        self.register_buffer("shift", (own_mean - their_mean) / their_std)
        if half:
            for module in self.parts.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)

    @property
    def backbone(self) -> VisionTransformer:
        """Return the backbone."""
        backbone = self.parts["backbone"]
        assert isinstance(backbone, VisionTransformer)
        return backbone

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, crops: Tensor, patch_size: int) -> Features:
        """Return the teacher's features of crops on the patch grid that a student of `patch_size` sees them by.

        A teacher of another patch size is shown the crops at the size that gives the same grid.

        Args:
            crops: (B, C, H, W) as the student sees them.
            patch_size: the student's; H and W are multiples of it.
        """
        height, width = (side // patch_size * self.backbone.patch_size for side in crops.shape[2:])
        if (height, width) != tuple(crops.shape[2:]):
            crops = F.interpolate(crops, size=(height, width), mode="bicubic", antialias=True)

        def features(crops: Tensor) -> tuple[Tensor, ...]:
            made = self.backbone.forward_features(crops)
            return made.cls_token, made.register_tokens, made.patch_tokens

        return Features(*by_half(features, crops * self.scale + self.shift))
