"""The model that pretraining starts from: new weights, or those of another model."""

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from ... import console
from ...errors import ToolkitError
from ...models.block import Block
from ...models.build import build_vit
from ...models.head import ProjectionHead
from ...models.vit import VisionTransformer
from ...models.weights import load_backbone, load_heads
from ..config import TrainConfig
from ..objective.masks import Padding
from ..objective.ssl_model import LossSettings, SSLModel


def build_backbone(config: TrainConfig) -> VisionTransformer:
    """Return a new ViT by the settings; raise ToolkitError for an unknown architecture."""
    backbone = build_vit(
        config.arch,
        patch_size=config.patch_size,
        depth=config.depth or None,
        embed_dim=config.embed_dim or None,
        num_heads=config.num_heads or None,
        ffn=config.ffn,
        num_register_tokens=config.num_register_tokens,
        in_chans=config.in_chans,
        img_size=config.global_crop_size_px,
        layer_scale=config.layer_scale,
        drop_path=config.drop_path,
        pos_embed_antialias=config.pos_embed_antialias,
        pos_embed_offset=config.pos_embed_offset,
    )
    for block in backbone.blocks:
        assert isinstance(block, Block)
        block.activation_checkpointing = config.activation_checkpointing
    return backbone


def build_model(config: TrainConfig, init_from: str | None = None) -> SSLModel:
    """Return a new student with its teacher and heads, or one that starts from other weights.

    Raises:
        ToolkitError: for an unknown architecture, or weights of another one.
    """
    backbone = build_backbone(config)

    sizes = {"dino_head": (config.num_prototypes, config.bottleneck_dim)}
    if config.separate_heads:
        sizes["ibot_head"] = config.ibot_num_prototypes, config.ibot_bottleneck_dim
    heads = {
        name: ProjectionHead(backbone.embed_dim, prototypes, hidden_dim=config.hidden_dim, bottleneck_dim=bottleneck)
        for name, (prototypes, bottleneck) in sizes.items()
    }
    if init_from is not None:
        initialise(backbone, heads, init_from)
    # On a GPU, and where blocks are compiled, shapes must not change from step to step.
    padding = Padding(config.mask_probability * sum(config.mask_ratio) / 2, config.mask_ratio[1])
    return SSLModel(
        backbone,
        **heads,
        centering=config.centering,
        losses=loss_settings(config),
        padding=padding if config.compile or torch.cuda.is_available() else None,
    )


def loss_settings(config: TrainConfig) -> LossSettings:
    """Return the settings of the losses among all settings."""
    return LossSettings(**{field.name: getattr(config, field.name) for field in fields(LossSettings)})


def initialise(backbone: VisionTransformer, heads: Mapping[str, ProjectionHead], source: str) -> None:
    """Copy another model's weights: the backbone's, with a resampled position embedding, and heads of the same shape.

    Where the numbers of channels differ, every channel gets the mean of the patch projection's channels, scaled by
    theirs / ours: an image whose channels are all equal gives the same tokens.

    Raises:
        ToolkitError: if the backbones differ in more than the size and the channels of their images.
    """
    loaded = load_backbone(source)
    weights = loaded.state_dict()
    weights["pos_embed"] = loaded.interpolated_pos_embed(backbone.pos_grid, backbone.pos_grid).detach()
    if loaded.in_chans != backbone.in_chans:
        channel = weights["patch_embed.proj.weight"].sum(dim=1, keepdim=True) / backbone.in_chans
        weights["patch_embed.proj.weight"] = channel.expand(-1, backbone.in_chans, -1, -1)
        console.say(
            f"{source} takes {loaded.in_chans} channels, the recipe {backbone.in_chans}: each starts with the mean of "
            "its patch projection"
        )
    theirs, ours = _shapes(weights), _shapes(backbone.state_dict())
    differing = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
    if differing:
        raise ToolkitError(
            f"{source} has another architecture than the recipe ({len(differing)} weights differ, such as "
            f"{min(differing)}); set arch, depth, patch_size, ffn and num_register_tokens to its own"
        )
    backbone.load_state_dict(weights)
    found = load_heads(source)
    for name, head in heads.items():
        if name in found and _shapes(found[name].state_dict()) == _shapes(head.state_dict()):
            head.load_state_dict(found[name].state_dict())
        else:
            console.say(f"{source} has no {name} of this shape: it starts untrained")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}
