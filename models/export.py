"""A model as files that others load: official .pth, safetensors, timm; and what every export is compared with.

An export writes, reads back through whatever will read it later, and compares the tokens of random images.
Shapes: B images, C channels, S side in pixels, D embed_dim, n = 1 + R + N tokens an image: class, registers, patches.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ToolkitError
from .architecture import backbone_settings
from .formats import MODEL_METADATA, timm_names
from .saved import cpu_tensors, model_description
from .vit import Features, VisionTransformer
from .weights import Model, load_backbone

Format = Literal["hf", "official", "timm", "onnx", "safetensors"]

# Largest difference of a token's number that a reader may have, in float32; tokens leave a layer norm, so they are of
# size 1, and where they are larger the bound grows with the largest. The first two formats keep every bit.
TOLERANCES: dict[Format, float] = {"official": 0.0, "safetensors": 0.0, "timm": 1e-5, "hf": 1e-5, "onnx": 1e-4}
DEFAULT_IMAGES = 2


@dataclass(frozen=True)
class Trial:
    """Random images, and what the model that is exported says of them."""

    image_size: int  # that the export's position embedding is stored for
    images: Tensor  # (B, C, S, S)
    tokens: Tensor  # (B, n, D)
    other_images: Tensor  # (1, C, S', S'), of another size, so that position embeddings are interpolated
    other_tokens: Tensor


@dataclass(frozen=True)
class Comparison:
    """How far an export, read back, is from the model."""

    reader: str  # what read it
    difference: float  # largest over all tokens of all images, at the size of the stored position embedding
    other_difference: float | None = None  # likewise at the trial's other size; None: takes one size only
    note: str = ""  # what whoever loads it must know


def model_at_size(model: Model, image_size: int) -> Model:
    """Return the model with its position embedding stored for another size.

    Raises:
        ToolkitError: if the size is not a multiple of the patch.
    """
    backbone, patch_size = model.backbone, model.backbone.patch_size
    if image_size == backbone.img_size:
        return model
    if image_size % patch_size:
        raise ToolkitError(
            f"--image-size {image_size} is not a multiple of the model's patch size {patch_size}; "
            f"use {image_size // patch_size * patch_size or patch_size}"
        )
    grid = image_size // patch_size
    with torch.no_grad():
        tensors = {**backbone.state_dict(), "pos_embed": backbone.interpolated_pos_embed(grid, grid)}
    with torch.device("meta"):
        resized = VisionTransformer(**asdict(replace(backbone_settings(backbone), img_size=image_size)))
    resized.load_state_dict(tensors, assign=True)
    return replace(model, backbone=resized.eval().requires_grad_(False))


def make_trial(model: Model, image_size: int, num_images: int, seed: int) -> Trial:
    """Return normally distributed images, and the model's tokens of them.

    The other size is the one that the model's preprocessing gives, where the position embedding is for another, else
    half as large.
    """
    backbone = model.backbone
    half = max(image_size // 2 // backbone.patch_size, 1) * backbone.patch_size
    own_size = model.preprocess.image_size
    other_size = own_size if own_size != image_size else half
    if other_size == image_size:  # a single patch
        other_size = 2 * image_size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, backbone.in_chans, image_size, image_size, generator=generator)
    other_images = torch.randn(1, backbone.in_chans, other_size, other_size, generator=generator)
    return Trial(image_size, images, all_tokens(backbone, images), other_images, all_tokens(backbone, other_images))


def all_tokens(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """Return the class token, registers and patch tokens of images, (B, C, S, S) -> (B, n, D), one image at a time."""
    with torch.no_grad():
        return torch.cat([joined_tokens(backbone.forward_features(image[None])) for image in images])


def joined_tokens(features: Features) -> Tensor:
    """Return features as one tensor (B, n, D)."""
    return torch.cat([features.cls_token[:, None], features.register_tokens, features.patch_tokens], dim=1)


def largest_difference(tokens: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two numbers at the same place; infinite where shapes differ or one is NaN."""
    if tokens.shape != expected.shape:
        return float("inf")
    difference = (tokens - expected).abs().max().item()
    return difference if difference == difference else float("inf")


def allowed_difference(to: Format, trial: Trial) -> float:
    """Return the difference up to which an export counts as the same model."""
    return TOLERANCES[to] * max(1.0, trial.tokens.abs().max().item())


def write_official(model: Model, file: Path) -> None:
    """Write the state dict that the official hub code loads strictly."""
    torch.save(cpu_tensors(model.backbone), file)


def compare_official(model: Model, file: Path, trial: Trial) -> Comparison:
    """Read the official file back: every tensor must be the same, bit for bit."""
    backbone = model.backbone
    policy = backbone.pos_embed_antialias, backbone.pos_embed_offset
    loaded = load_backbone(
        file, num_heads=backbone.num_heads, pos_embed_antialias=policy[0], pos_embed_offset=policy[1]
    )
    return replace(_compared(model, loaded, trial), note=_official_note(backbone))


def write_safetensors(model: Model, file: Path) -> None:
    """Write the tensors by official names, and in the metadata what model.json says, so that `--model` takes it."""
    description = model_description(model.backbone, {}, model.preprocess)
    save_file(cpu_tensors(model.backbone), file, metadata={MODEL_METADATA: description, "format": "pt"})


def compare_safetensors(model: Model, file: Path, trial: Trial) -> Comparison:
    """Read the safetensors file back: every tensor must be the same, bit for bit."""
    return _compared(model, load_backbone(file), trial)


def write_timm(model: Model, file: Path) -> None:
    """Write the tensors by timm's names: safetensors by that suffix, else a pickle."""
    tensors = timm_names(cpu_tensors(model.backbone))
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)


def compare_timm(model: Model, file: Path, trial: Trial) -> Comparison:
    """Read the timm file back, with timm's way of interpolating position embeddings."""
    loaded = load_backbone(file, num_heads=model.backbone.num_heads, pos_embed_antialias=True, pos_embed_offset=0.0)
    return Comparison(
        "this toolkit, by timm's names and interpolation",
        largest_difference(all_tokens(loaded, trial.images), trial.tokens),
        largest_difference(all_tokens(loaded, trial.other_images), trial.other_tokens),
        _timm_note(loaded),
    )


def _compared(model: Model, loaded: VisionTransformer, trial: Trial) -> Comparison:
    expected = model.backbone.state_dict()
    different = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, expected[name])]
    if different:
        return Comparison("this toolkit", float("inf"), None, f"{len(different)} tensors differ, first {different[0]}")
    return Comparison(
        "this toolkit, tensor by tensor",
        largest_difference(all_tokens(loaded, trial.images), trial.tokens),
        largest_difference(all_tokens(loaded, trial.other_images), trial.other_tokens),
    )


def _official_note(backbone: VisionTransformer) -> str:
    """Say how the official code builds a model for the file."""
    settings = backbone_settings(backbone)
    keywords = {
        "img_size": settings.img_size,
        "patch_size": settings.patch_size,
        "in_chans": settings.in_chans,
        "embed_dim": settings.embed_dim,
        "depth": settings.depth,
        "num_heads": settings.num_heads,
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if settings.ffn == "swiglu" else "mlp",
        "block_chunks": 0,
        "num_register_tokens": settings.num_register_tokens,
        "interpolate_antialias": settings.pos_embed_antialias,
        "interpolate_offset": settings.pos_embed_offset,
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in keywords.items())
    return f"dinov2.models.vision_transformer.DinoVisionTransformer({listed}) loads it strictly"


def _timm_note(backbone: VisionTransformer) -> str:
    """Say how timm builds a model for the file: one of its entries, with every number that may differ from it."""
    settings = backbone_settings(backbone)
    registers = settings.num_register_tokens
    entry = f"vit_{'giant' if settings.ffn == 'swiglu' else 'small'}_patch14_{'reg4_' if registers else ''}dinov2"
    keywords: dict[str, object] = {
        "img_size": settings.img_size,
        "patch_size": settings.patch_size,
        "embed_dim": settings.embed_dim,
        "depth": settings.depth,
        "num_heads": settings.num_heads,
    }
    if settings.ffn == "swiglu":
        keywords["mlp_ratio"] = len(backbone.get_parameter("blocks.0.mlp.w12.weight")) / settings.embed_dim
    if registers:
        keywords["reg_tokens"] = registers
    if settings.in_chans != 3:
        keywords["in_chans"] = settings.in_chans
    listed = ", ".join(f"{name}={value}" for name, value in keywords.items())
    return f"timm.create_model('{entry}', num_classes=0, {listed}) loads it; the mask token is left out"
