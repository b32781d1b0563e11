"""The networks of student and teacher: a backbone and heads, by name in a ModuleDict.

Names are `backbone`, `dino_head` and, where patches have a head of their own (untied heads), `ibot_head`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...models.vit import VisionTransformer


class TeacherNetworks(nn.ModuleDict):
    """Networks that get no gradient and stay in evaluation mode, whatever the mode of the model around them."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__(networks)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TeacherNetworks":
        """Stay in evaluation mode."""
        return super().train(False)


def backbone_of(networks: nn.ModuleDict) -> VisionTransformer:
    """Return the backbone among some networks."""
    backbone = networks["backbone"]
    assert isinstance(backbone, VisionTransformer)
    return backbone


def head_logits(networks: nn.ModuleDict, cls_tokens: Tensor, patch_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of class tokens (rows, D) and patch tokens (M, D), in one pass when they share a head."""
    if "ibot_head" in networks:
        return networks["dino_head"](cls_tokens), networks["ibot_head"](patch_tokens)
    logits: Tensor = networks["dino_head"](torch.cat([cls_tokens, patch_tokens]))
    cls_logits, patch_logits = torch.split(logits, [len(cls_tokens), len(patch_tokens)])
    return cls_logits, patch_logits


@torch.no_grad()
def update_teacher(
    teacher: nn.ModuleDict, student: nn.ModuleDict, momentum: float, is_skipped: Tensor | None = None
) -> None:
    """Move every weight of the teacher to momentum * teacher + (1 - momentum) * student.

    Where `is_skipped`, a scalar on the device, is 1, the teacher stays as it is. Each process moves its own shards.
    """
    for name, network in teacher.items():
        weights = [own_shard(weight) for weight in network.parameters()]
        targets = [own_shard(weight) for weight in student[name].parameters()]
        if is_skipped is None:
            torch._foreach_lerp_(weights, targets, 1 - momentum)
        else:
            share = (1 - momentum) * (1 - is_skipped)
            torch._foreach_lerp_(weights, targets, [share] * len(weights))


def own_shard(weight: Tensor) -> Tensor:
    """Return this process's shard of a weight, which shares its memory, or all of one that is not sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
