"""AdamW with the recipe's parameter groups, a step's rates for them, and gradient clipping per network."""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...models.vit import VisionTransformer
from ..objective.losses import all_reduce_max
from .fsdp import full_tensor


class Multipliers(NamedTuple):
    """How a parameter departs from the schedules; the optimizer's groups have these keys."""

    lr_multiplier: float
    wd_multiplier: float
    is_last_layer: bool  # follows the schedule that is 0 for the first steps
    is_head: bool = True  # False: of the backbone, which may be frozen for the first steps


def parameter_multipliers(
    name: str, *, depth: int, layerwise_decay: float = 0.9, patch_embed_lr_mult: float = 0.2
) -> Multipliers:
    """Return the multipliers of a parameter by its name within its part.

    Args:
        name: as the official state dicts name it, such as `blocks.3.attn.qkv.weight` or `last_layer.weight_v`.
        depth: blocks of the backbone that holds the parameter; 0 for a head, whose parameters all have rate 1.
        layerwise_decay: r; the embeddings' rate is r^(depth + 1), block i's r^(depth - i), the final norm's 1.
        patch_embed_lr_mult: a further factor for the patch projection.

    Source: dinov2/utils/param_groups.py. Biases, norms and LayerScale are not decayed; all else is, tokens, position
    embedding and both halves of the weight norm included.
    """
    if block := re.match(r"blocks\.(\d+)\.", name):
        layers_above = depth - int(block[1])
    else:
        layers_above = 0 if depth == 0 or name.startswith("norm.") else depth + 1
    lr = layerwise_decay**layers_above * (patch_embed_lr_mult if name.startswith("patch_embed.") else 1.0)
    is_decayed = not (name.endswith(".bias") or "norm" in name or "gamma" in name)
    return Multipliers(lr, float(is_decayed), "last_layer" in name, is_head=depth == 0)


def build_optimizer(
    networks: nn.ModuleDict,
    *,
    layerwise_decay: float = 0.9,
    patch_embed_lr_mult: float = 0.2,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters of backbone and heads, one group for each `Multipliers`.

    The learning rate is 0 until `apply_schedules`; `layerwise_decay` and `patch_embed_lr_mult` are for the backbone,
    as in `parameter_multipliers`.
    """
    groups: dict[Multipliers, list[nn.Parameter]] = {}
    for network in networks.values():
        depth = network.depth if isinstance(network, VisionTransformer) else 0
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                multipliers = parameter_multipliers(
                    name, depth=depth, layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult
                )
                groups.setdefault(multipliers, []).append(parameter)
    devices = {parameter.device.type for parameters in groups.values() for parameter in parameters}
    return torch.optim.AdamW(
        [{"params": parameters, **multipliers._asdict()} for multipliers, parameters in groups.items()],
        lr=0.0,
        betas=betas,
        eps=1e-8,
        fused=devices <= {"cpu", "cuda"},  # elsewhere torch chooses foreach or its plain loop
    )


def apply_schedules(
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    last_layer_lr: float,
    weight_decay: float,
    backbone_lr: float | None = None,
) -> None:
    """Write a step's rates, times their multipliers, into every group; `backbone_lr` None means `lr`."""
    for group in optimizer.param_groups:
        rate = last_layer_lr if group["is_last_layer"] else lr
        if backbone_lr is not None and not group["is_head"]:
            rate = backbone_lr
        group["lr"] = rate * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["wd_multiplier"]


def step_unless(is_skipped: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the optimizer's step where `is_skipped`, a scalar on the device, is 0; the host does not wait for it."""
    # What fused AdamW reads on the device, as under torch's GradScaler. Accelerate wraps the optimizer.
    vars(getattr(optimizer, "optimizer", optimizer))["found_inf"] = is_skipped
    optimizer.step()


def not_finite(values: Iterable[Tensor]) -> Tensor:
    """Return 1.0 where one of some scalars, of any process, is not finite, else 0.0, as a scalar on their device."""
    is_bad = torch.stack([value.float() for value in values]).isfinite().logical_not().any()
    return all_reduce_max(is_bad.float())


def clip_gradients(networks: nn.ModuleDict, max_norm: float) -> dict[str, Tensor]:
    """Scale each network's gradients to a norm of at most `max_norm`; return the norms before, by network."""
    clip = nn.utils.clip_grad_norm_
    return {name: full_tensor(clip(network.parameters(), max_norm)) for name, network in networks.items()}
