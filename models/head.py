"""The projection head that turns tokens into prototype logits.

Shapes: R rows (class tokens or masked patches), D embed_dim, K prototypes.
Source: Caron et al. 2021 (DINO), github.com/facebookresearch/dinov2 (dinov2/layers/dino_head.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are `weight_g` times the direction of `weight_v`: (R, d) -> (R, K).

    The names are those of torch's older weight norm, under which official checkpoints store them.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.uniform_(self.weight_v, -(in_dim**-0.5), in_dim**-0.5)  # what nn.Linear draws

    def forward(self, rows: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return F.linear(rows, weight)


class ProjectionHead(nn.Module):
    """Three linear layers with GELU, L2 normalisation, then prototypes: (R, D) -> logits (R, K).

    Logits are cosines at first (`weight_g` is 1), unbounded later, since `weight_g` is trained. In evaluation mode, the
    teacher's, the last product is in float32 whatever the autocast: bfloat16 rounds a cosine near 1 by up to 0.002, and
    at a temperature of 0.04 that moves a probability by 5 %.

    Args:
        in_dim: D, the backbone's width.
        num_prototypes: K, 65,536 (ViT-L short) to 131,072 in the paper; a few thousand serve small data.
        hidden_dim: width of the two hidden layers.
        bottleneck_dim: width that is normalised (256, or 384 for the untied DINO head in the paper).
    """

    def __init__(self, in_dim: int, num_prototypes: int, *, hidden_dim: int = 2048, bottleneck_dim: int = 256) -> None:
        super().__init__()
        self.in_dim, self.num_prototypes = in_dim, num_prototypes
        self.hidden_dim, self.bottleneck_dim = hidden_dim, bottleneck_dim
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes)

    def forward(self, tokens: Tensor) -> Tensor:
        # The norm is taken in float32 whatever the autocast; 1e-12 would vanish in half precision.
        bottleneck = F.normalize(self.mlp(tokens).float(), dim=-1, eps=1e-12)
        if self.training:
            logits: Tensor = self.last_layer(bottleneck)
            return logits
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.last_layer(bottleneck)
            return logits
