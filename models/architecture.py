"""The settings that a model is built with, read from a module or from its tensors, and strict loading of tensors.

Shapes: D embed_dim, K prototypes.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import get_args

import torch
from torch import Tensor, nn

from ..errors import ToolkitError
from .block import Ffn
from .head import ProjectionHead
from .vit import VisionTransformer

HEAD_WIDTH = 64  # channels of an attention head in every released model
MOST = {  # chosen: far above every released model; a file may declare anything
    "patch_size": 1024,
    "embed_dim": 65_536,
    "depth": 1024,
    "num_heads": 1024,
    "num_register_tokens": 1024,
    "in_chans": 1024,
    "img_size": 65_536,
}
HEAD_ARGUMENTS = ("in_dim", "num_prototypes", "hidden_dim", "bottleneck_dim")  # of `ProjectionHead`


@dataclass(frozen=True)
class BackboneSettings:
    """The keywords of `VisionTransformer` that its weights were made with."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    ffn: Ffn
    num_register_tokens: int
    in_chans: int
    img_size: int
    pos_embed_antialias: bool
    pos_embed_offset: float


def check_backbone_settings(settings: BackboneSettings, name: str) -> None:
    """Raise ToolkitError when numbers that a file declares are no backbone's, before one is built by them.

    Args:
        name: of where they come from, for messages.
    """
    for key, most in MOST.items():
        value, least = getattr(settings, key), int(key != "num_register_tokens")
        if type(value) is not int or not least <= value <= most:
            raise ToolkitError(
                f"{name} declares {key} {value!r}, not a whole number from {least} to {most}; fetch it again"
            )
    if settings.ffn not in get_args(Ffn):
        raise ToolkitError(f"{name} declares ffn {settings.ffn!r}; it must be one of {', '.join(get_args(Ffn))}")
    if type(settings.pos_embed_antialias) is not bool or not isinstance(settings.pos_embed_offset, int | float):
        raise ToolkitError(f"{name} declares no way to interpolate its position embedding; fetch it again")


def backbone_settings(backbone: VisionTransformer) -> BackboneSettings:
    """Return the numbers a backbone was built with."""
    return BackboneSettings(**{field.name: getattr(backbone, field.name) for field in fields(BackboneSettings)})


def head_settings(head: ProjectionHead) -> dict[str, int]:
    """Return the arguments a head was built with."""
    return {name: getattr(head, name) for name in HEAD_ARGUMENTS}


def inferred_backbone_settings(tensors: Mapping[str, Tensor], name: str, num_heads: int | None) -> BackboneSettings:
    """Return the settings that a backbone's tensors show by their official names and shapes.

    Args:
        tensors: of the backbone alone.
        name: of where they come from, for messages.
        num_heads: attention heads; None means as many as are 64 wide, as in every released model.

    Raises:
        ToolkitError: if the tensors are no backbone's, or `num_heads` is needed.
    """
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.norm1.weight": 1}
    unusable = [name for name, ndim in needed.items() if name not in tensors or tensors[name].ndim != ndim]
    unusable = unusable or [name for name in needed if not tensors[name].numel()]
    if not unusable and tensors["pos_embed"].shape[1] < 2:  # the class token's, and a patch's at least
        unusable = ["pos_embed"]
    if unusable:
        raise ToolkitError(
            f"{name} holds no DINOv2 backbone: {listed(unusable)} missing or not of its form among "
            f"{len(tensors)} tensors ({listed(sorted(tensors))}); name another file"
        )
    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    if num_heads is None and embed_dim % HEAD_WIDTH:
        raise ToolkitError(
            f"{name} does not show how many attention heads its {embed_dim} channels have "
            f"(no multiple of {HEAD_WIDTH}); give num_heads"
        )
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    blocks = [int(found[1]) for found in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if found]
    return BackboneSettings(
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=max(blocks, default=-1) + 1,
        num_heads=num_heads or embed_dim // HEAD_WIDTH,
        ffn="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp",
        num_register_tokens=registers,
        in_chans=in_chans,
        img_size=math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch_size,
        pos_embed_antialias=registers > 0,
        pos_embed_offset=0.0 if registers else 0.1,
    )


def inferred_head_settings(tensors: Mapping[str, Tensor], name: str) -> dict[str, int]:
    """Return the arguments that a head's tensors show (parameters and errors as for a backbone)."""
    first, last = tensors.get("mlp.0.weight"), tensors.get("last_layer.weight_v")
    if first is None or last is None or first.ndim != 2 or last.ndim != 2:
        raise ToolkitError(f"{name} is not whole: only {listed(sorted(tensors))}; name another file")
    sizes = first.shape[1], last.shape[0], first.shape[0], last.shape[1]
    return dict(zip(HEAD_ARGUMENTS, sizes, strict=True))


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Give a module on the meta device copies, in float32, of exactly the tensors it has names and shapes for.

    Raises:
        ToolkitError: if any tensor is missing, unexpected, of another shape or not finite; it names them.
    """
    expected = {key: tensor.shape for key, tensor in module.state_dict().items()}
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "of another shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in tensors and tensors[key].shape != shape
        ],
    }
    found = "; ".join(f"{len(keys)} {problem} ({listed(keys)})" for problem, keys in problems.items() if keys)
    if found:
        raise ToolkitError(f"{name} does not fit: {found}. Name weights of this architecture")
    copies = {key: tensors[key].detach().to(torch.float32, copy=True) for key in expected}
    # In a sum NaN and infinity stay. Tensors of the meta device have no numbers.
    if broken := [key for key, tensor in copies.items() if not (tensor.is_meta or tensor.sum().isfinite())]:
        raise ToolkitError(f"{name} holds numbers that are not finite ({listed(broken)}); fetch or train it again")
    module.load_state_dict(copies, assign=True)


def listed(names: Sequence[str]) -> str:
    """Return the first few of some names, for a message."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
