"""A model as files that others load (official .pth, safetensors, timm), and how every export is checked.

An export is written, read back by the library that it is for, and the tokens of random images are compared.
Shapes: B images, C channels, S side in pixels, D embed_dim, n = 1 + R + N tokens an image: class, registers, patches.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ToolkitError
from .architecture import backbone_settings
from .formats import MODEL_METADATA, timm_names
from .saved import cpu_tensors, model_description
from .vit import VisionTransformer
from .weights import Model, load_backbone

Format = Literal["hf", "official", "timm", "onnx", "safetensors"]

# Largest difference of a token's number that a reader may have, in float32; tokens leave a layer norm, so they are of
# size 1, and where they are larger the bound grows with the largest. The first two formats keep every bit.
TOLERANCES: dict[Format, float] = {"official": 0.0, "safetensors": 0.0, "timm": 1e-5, "hf": 1e-5, "onnx": 1e-4}
DEFAULT_IMAGES = 2


@dataclass(frozen=True)
class Reference:
    """Random images, and the tokens that the exported model gives for them."""

    image_size: int  # that the export's position embedding is stored for
    images: Tensor  # (B, C, S, S)
    tokens: Tensor  # (B, n, D)
    other_images: Tensor  # (1, C, S', S'), of another size: position embeddings are interpolated
    other_tokens: Tensor


@dataclass(frozen=True)
class Comparison:
    """How far an export, read back, is from the model."""

    reader: str
    difference: float  # largest over all tokens of all images, at the size of the stored position embedding
    other_difference: float | None = None  # the same at the reference's other size; None: takes one size only
    note: str = ""  # what a user of the export must know


def model_at_size(model: Model, image_size: int) -> Model:
    """Return the model with its position embedding stored for another size, a multiple of the patch."""
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


def make_reference(model: Model, image_size: int, num_images: int, seed: int) -> Reference:
    """Return normally distributed images, and the model's tokens of them.

    The other size is that of the model's preprocessing, or half of `image_size` where the two are equal.
    """
    backbone = model.backbone
    half = max(image_size // 2 // backbone.patch_size, 1) * backbone.patch_size
    sizes = (model.preprocess.image_size, half, 2 * image_size)  # the last for a single patch
    other_size = next(size for size in sizes if size != image_size)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, backbone.in_chans, image_size, image_size, generator=generator)
    other_images = torch.randn(1, backbone.in_chans, other_size, other_size, generator=generator)
    return Reference(image_size, images, all_tokens(backbone, images), other_images, all_tokens(backbone, other_images))


@torch.no_grad()
def all_tokens(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """Return the class token, registers and patch tokens of images, (B, C, S, S) -> (B, n, D), one image at a time."""
    tokens = []
    for image in images:
        features = backbone.forward_features(image[None])
        tokens.append(torch.cat([features.cls_token[:, None], features.register_tokens, features.patch_tokens], dim=1))
    return torch.cat(tokens)


def largest_difference(tokens: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two numbers at the same place; infinite where shapes differ or one is NaN."""
    if tokens.shape != expected.shape:
        return float("inf")
    difference = (tokens - expected).abs().max().item()
    return difference if difference == difference else float("inf")


def compare(reader: str, tokens: Callable[[Tensor], Tensor], reference: Reference, note: str = "") -> Comparison:
    """Compare a function from images (B, C, S, S) to tokens (B, n, D) with the exported model, at both sizes."""
    difference = largest_difference(tokens(reference.images), reference.tokens)
    other_difference = largest_difference(tokens(reference.other_images), reference.other_tokens)
    return Comparison(reader, difference, other_difference, note)


def allowed_difference(to: Format, reference: Reference) -> float:
    """Return the difference up to which an export counts as the same model."""
    return TOLERANCES[to] * max(1.0, reference.tokens.abs().max().item())


def write_official(model: Model, file: Path) -> None:
    """Write the state dict that the official hub code loads strictly."""
    torch.save(cpu_tensors(model.backbone), file)


def compare_official(model: Model, file: Path, reference: Reference) -> Comparison:
    """Read the official file back: every tensor must be the same, bit for bit."""
    names = ("num_heads", "pos_embed_antialias", "pos_embed_offset")
    loaded = load_backbone(file, **{name: getattr(model.backbone, name) for name in names})
    return _compare_tensors(model, loaded, reference, _official_note(model.backbone))


def write_safetensors(model: Model, file: Path) -> None:
    """Write the tensors by official names, and in the metadata what model.json says, so that `--model` takes it."""
    description = model_description(model.backbone, {}, model.preprocess)
    save_file(cpu_tensors(model.backbone), file, metadata={MODEL_METADATA: description, "format": "pt"})


def compare_safetensors(model: Model, file: Path, reference: Reference) -> Comparison:
    """Read the safetensors file back: every tensor must be the same, bit for bit."""
    return _compare_tensors(model, load_backbone(file), reference)


def write_timm(model: Model, file: Path) -> None:
    """Write the tensors by timm's names: safetensors by that suffix, else a pickle."""
    tensors = timm_names(cpu_tensors(model.backbone))
    if file.suffix == ".safetensors":
        save_file(tensors, file, metadata={"format": "pt"})
    else:
        torch.save(tensors, file)


def compare_timm(model: Model, file: Path, reference: Reference) -> Comparison:
    """Read the timm file back, with timm's way of interpolating position embeddings."""
    loaded = load_backbone(file, num_heads=model.backbone.num_heads, pos_embed_antialias=True, pos_embed_offset=0.0)
    reader = "this toolkit, by timm's names and interpolation"
    return compare(reader, partial(all_tokens, loaded), reference, _timm_note(loaded))


def _compare_tensors(model: Model, loaded: VisionTransformer, reference: Reference, note: str = "") -> Comparison:
    expected = model.backbone.state_dict()
    different = [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, expected[name])]
    if different:
        return Comparison("this toolkit", float("inf"), None, f"{len(different)} tensors differ, first {different[0]}")
    return compare("this toolkit, tensor by tensor", partial(all_tokens, loaded), reference, note)


def _official_note(backbone: VisionTransformer) -> str:
    """Say how the official code builds a model for the file."""
    settings = asdict(backbone_settings(backbone))
    ffn, antialias, offset = (settings.pop(name) for name in ("ffn", "pos_embed_antialias", "pos_embed_offset"))
    settings |= {"init_values": 1.0, "ffn_layer": "swiglufused" if ffn == "swiglu" else "mlp", "block_chunks": 0}
    settings |= {"interpolate_antialias": antialias, "interpolate_offset": offset}
    listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"dinov2.models.vision_transformer.DinoVisionTransformer({listed}) loads it strictly"


def _timm_note(backbone: VisionTransformer) -> str:
    """Say how timm builds a model for the file: one of its entries, and every number that may differ from it."""
    settings = backbone_settings(backbone)
    registers, is_swiglu = settings.num_register_tokens, settings.ffn == "swiglu"
    entry = f"vit_{'giant' if is_swiglu else 'small'}_patch14_{'reg4_' if registers else ''}dinov2"
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    keywords: dict[str, object] = {name: getattr(settings, name) for name in names}
    if is_swiglu:
        keywords["mlp_ratio"] = len(backbone.get_parameter("blocks.0.mlp.w12.weight")) / settings.embed_dim
    if registers:
        keywords["reg_tokens"] = registers
    if settings.in_chans != 3:
        keywords["in_chans"] = settings.in_chans
    listed = ", ".join(f"{name}={value}" for name, value in keywords.items())
    return f"timm.create_model('{entry}', num_classes=0, {listed}) loads it; the mask token is left out"
