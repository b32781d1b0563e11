"""A model as a folder that Hugging Face's transformers loads with AutoModel and AutoImageProcessor.

transformers interpolates position embeddings by size, with antialias for models with registers and without for
others, so only at the size that they are stored for is it bound to agree with every model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from .architecture import backbone_settings
from .export import Comparison, Reference, compare, largest_difference
from .formats import MODEL_METADATA, hugging_face_names
from .preprocess import crop_picture, normalise
from .saved import cpu_tensors
from .weights import Model

RGB = 3
PILLOW_BICUBIC = 3


def has_processor(model: Model) -> bool:
    """Tell whether transformers' image processors make what the model takes: RGB of 8 bits."""
    return (model.preprocess.in_chans, model.preprocess.bit_depth) == (RGB, 8)


def write_hugging_face(model: Model, folder: Path) -> None:
    """Write config.json, model.safetensors and, where transformers has one, preprocessor_config.json into a folder."""
    tensors = hugging_face_names(cpu_tensors(model.backbone))
    contiguous = {name: tensor.clone() for name, tensor in tensors.items()}  # parts of qkv share memory
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", hugging_face_config(model))
    if has_processor(model):
        _write_json(folder / "preprocessor_config.json", processor_config(model))


def hugging_face_config(model: Model) -> dict[str, object]:
    """Return what config.json says: the keys of Dinov2Config, and our interpolation, which it has no key for."""
    settings = backbone_settings(model.backbone)
    registers = settings.num_register_tokens
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "image_size": settings.img_size,
        "patch_size": settings.patch_size,
        "num_channels": settings.in_chans,
        "hidden_size": settings.embed_dim,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.num_heads,
        **({"num_register_tokens": registers} if registers else {}),
        "mlp_ratio": 4,
        "use_swiglu_ffn": settings.ffn == "swiglu",
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "dtype": "float32",
        MODEL_METADATA: {name: getattr(settings, name) for name in ("pos_embed_antialias", "pos_embed_offset")},
    }


def processor_config(model: Model) -> dict[str, object]:
    """Return what preprocessor_config.json says: resize, centre crop, normalise."""
    preprocess = model.preprocess
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.short_side},
        "resample": PILLOW_BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": preprocess.image_size, "width": preprocess.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def compare_hugging_face(model: Model, folder: Path, reference: Reference) -> Comparison:
    """Load the folder with transformers, and compare tokens and, where there is a processor, prepared images."""
    import transformers

    logging = transformers.utils.logging
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        loaded, report = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        processor = None
        if has_processor(model):
            processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    finally:
        logging.set_verbosity(verbosity)
    reader = f"transformers {transformers.__version__}, {type(loaded).__name__}"
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[key]]
    if wrong:
        return Comparison(reader, float("inf"), None, f"{len(wrong)} tensors do not fit, first {wrong[0]}")

    @torch.no_grad()
    def tokens(images: Tensor) -> Tensor:
        return torch.cat([loaded(pixel_values=image[None]).last_hidden_state for image in images])

    if processor is None:
        note = (
            f"the model takes {described_pixels(model)}, which no image processor of transformers makes: no "
            "preprocessor_config.json was written; prepare pixel_values as the card says"
        )
        return compare(reader, tokens, reference, note)
    note = (
        "where the border around the centre crop is an odd number of pixels, transformers' image processor may cut a "
        "pixel further left or up than this toolkit does"
    )
    comparison = compare(reader, tokens, reference, note)
    return replace(comparison, difference=max(comparison.difference, _processor_difference(model, processor)))


def described_pixels(model: Model) -> str:
    """Return what the model takes, in words."""
    in_chans, bit_depth = model.preprocess.in_chans, model.preprocess.bit_depth
    return f"{in_chans} channel{'' if in_chans == 1 else 's'}{' of 16 bits' * (bit_depth == 16)}"


def _processor_difference(model: Model, processor: Callable[..., Mapping[str, Tensor]]) -> float:
    """Return how far the processor's image of a coloured square is from ours; 0 where the border is odd."""
    preprocess = model.preprocess
    if (preprocess.short_side - preprocess.image_size) % 2:
        return 0.0
    side = 2 * preprocess.short_side + 1
    down, across = torch.linspace(0, 1, side)[:, None], torch.linspace(0, 1, side)[None, :]
    channels = [down * torch.ones_like(across), (1 - down) * torch.sin(40 * across).square(), across * down]
    picture = Image.fromarray((255 * torch.stack(channels, dim=-1)).to(torch.uint8).numpy())
    prepared = processor(picture, return_tensors="pt")["pixel_values"]
    return largest_difference(prepared, normalise(crop_picture(picture, preprocess)[None], preprocess))


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
