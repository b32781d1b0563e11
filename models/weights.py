"""Models from whatever holds them: a run, official weights, a Hugging Face folder, released weights once pulled."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any  # of JSON

import torch
from torch import Tensor

from .. import console
from ..errors import ToolkitError
from .architecture import backbone_settings, inferred_backbone_settings, inferred_head_settings, load_strictly
from .formats import MODEL_METADATA, official_names, read_json, read_tensors
from .head import ProjectionHead
from .preprocess import IMAGENET_MEAN, IMAGENET_STD
from .released import RELEASED, cached_weights
from .saved import MODEL_JSON, TEACHER_FILE, Preprocessing, SavedModel, read_model_json, saved_model
from .vit import ARCHITECTURES, VisionTransformer, build_vit

CROP_RATIO = 224 / 256  # centre crop / short side, as the released models were evaluated
HEADS = ("dino_head", "ibot_head")


@dataclass(frozen=True)
class Model:
    """A frozen backbone in evaluation mode, with what is needed to prepare images for it and to name it."""

    name: str
    content_id: str
    backbone: VisionTransformer
    image_size: int
    crop_ratio: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_chans: int
    bit_depth: int = 8


# Finding and reading


def weights_file(source: str | Path) -> Path:
    """Return the file that holds a model's weights.

    Args:
        source: a weights file, a model folder, a run folder (an unfinished run stands for its latest checkpoint,
            said on stderr), a Hugging Face folder, or the name of released weights that were pulled.

    Raises:
        ToolkitError: if there is nothing of the kind, or it was not pulled.
    """
    path = Path(source)
    if not path.is_dir():
        if not path.exists():
            if str(source) in RELEASED:
                return _pulled(str(source))
            raise ToolkitError(
                f"no model {str(source)!r}; give a run folder, a weights file, a Hugging Face folder or random:ARCH"
            )
        return path
    if (path / MODEL_JSON).exists():
        return path / TEACHER_FILE
    checkpoints = {
        int(found.parent.name.removeprefix("step-")): found.parent
        for found in path.glob(f"checkpoints/step-[0-9]*/{MODEL_JSON}")
    }
    if checkpoints:
        latest = checkpoints[max(checkpoints)]
        console.say(f"{path} is not finished: taking the teacher of its latest checkpoint, {latest.name}")
        return latest / TEACHER_FILE
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / "config.json").exists() and (path / name).exists():
            return path / name
    raise ToolkitError(
        f"folder {path} holds no model: no {MODEL_JSON}, no checkpoints/step-*, and no config.json with "
        "model.safetensors; name a run, a weights file or a Hugging Face folder"
    )


def _pulled(name: str) -> Path:
    file = cached_weights(name)
    if not file.exists():
        raise ToolkitError(f"{name} is not in the cache ({file}); fetch it with `dinov2 models pull {name}`")
    return file


def model_content_id(source: str | Path) -> str:
    """Return the BLAKE2b-128 hex digest of a model's weights file, for provenance (source as in `weights_file`)."""
    with weights_file(source).open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True)
class _Contents:
    """What a source holds, under official names."""

    name: str  # for messages
    backbone: dict[str, Tensor]
    heads: dict[str, Tensor]
    saved: SavedModel | None  # if it is ours
    config: dict[str, object]  # Hugging Face's config.json, otherwise empty


def _contents(source: str | Path | Mapping[str, Tensor]) -> _Contents:
    if isinstance(source, Mapping):
        return _Contents("the state dict", *official_names(source), None, {})
    path = weights_file(source)
    tensors, description = read_tensors(path)
    # The file's own description serves where it was copied without its folder.
    saved = None if description is None else saved_model(json.loads(description), path)
    if path.name == TEACHER_FILE and (path.parent / MODEL_JSON).exists():
        saved = read_model_json(path.parent)
    is_hugging_face = any(name.endswith("embeddings.cls_token") for name in tensors)
    config = path.parent / "config.json"
    return _Contents(
        str(path),
        *official_names(tensors),
        saved,
        read_json(config) if is_hugging_face and config.exists() else {},
    )


# Loading


def load_backbone(
    source: str | Path | Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    pos_embed_antialias: bool | None = None,
    pos_embed_offset: float | None = None,
) -> VisionTransformer:
    """Return the backbone that a source holds, in evaluation mode, in float32, its architecture inferred.

    Args:
        source: what `weights_file` takes, or a state dict. Read are official backbones, official teacher checkpoints
            (`teacher.backbone.*`, also with block chunks), this toolkit's files and run folders, Hugging Face's
            Dinov2Model and Dinov2WithRegistersModel.
        num_heads: attention heads, where they are not 64 wide and the source does not say.
        pos_embed_antialias, pos_embed_offset: how the position embedding is interpolated; None means as the source
            says, else as the released weights of the kind: (True, 0.0) with registers, (False, 0.1) without.

    Raises:
        ToolkitError: if the source cannot be read, or its tensors are not exactly a backbone's (all of them named).
    """
    return _backbone(_contents(source), num_heads, pos_embed_antialias, pos_embed_offset)


def _backbone(
    contents: _Contents, num_heads: int | None, pos_embed_antialias: bool | None, pos_embed_offset: float | None
) -> VisionTransformer:
    if contents.saved is None:
        config_heads = contents.config.get("num_attention_heads")
        if num_heads is None and isinstance(config_heads, int):
            num_heads = config_heads
        settings = inferred_backbone_settings(contents.backbone, contents.name, num_heads)
        settings = replace(settings, **_pos_embed_policy(contents))
    else:
        settings = contents.saved.backbone
    settings = replace(
        settings,
        num_heads=settings.num_heads if num_heads is None else num_heads,
        pos_embed_antialias=settings.pos_embed_antialias if pos_embed_antialias is None else pos_embed_antialias,
        pos_embed_offset=settings.pos_embed_offset if pos_embed_offset is None else pos_embed_offset,
    )
    with torch.device("meta"):  # no time or random numbers spent on weights that are replaced
        backbone = VisionTransformer(**asdict(settings))
    load_strictly(backbone, contents.backbone, contents.name)
    return backbone.eval()


def _pos_embed_policy(contents: _Contents) -> dict[str, Any]:
    """Return what the config.json of an export of ours says of position embeddings; transformers has no key for it."""
    ours = contents.config.get(MODEL_METADATA)
    names = ("pos_embed_antialias", "pos_embed_offset")
    return {name: ours[name] for name in names if name in ours} if isinstance(ours, dict) else {}


def load_heads(source: str | Path | Mapping[str, Tensor]) -> dict[str, ProjectionHead]:
    """Return the projection heads that a source holds, `dino_head` and `ibot_head` if it is apart; may be empty.

    Args:
        source: as in `load_backbone`; runs have heads, official teacher checkpoints too, released backbones none.

    Raises:
        ToolkitError: if the source cannot be read, or a head is not whole.
    """
    contents = _contents(source)
    heads = {}
    for name in HEADS:
        tensors = {
            key.removeprefix(f"{name}."): value for key, value in contents.heads.items() if key.startswith(f"{name}.")
        }
        if not tensors:
            continue
        settings = inferred_head_settings(tensors, f"{name} of {contents.name}")
        with torch.device("meta"):
            head = ProjectionHead(**asdict(settings))
        load_strictly(head, tensors, f"{name} of {contents.name}")
        heads[name] = head.eval()
    return heads


def load_model(
    source: str | Path,
    *,
    seed: int = 0,
    image_size: int | None = None,
    num_heads: int | None = None,
    pos_embed_antialias: bool | None = None,
    pos_embed_offset: float | None = None,
) -> Model:
    """Return the model that `--model` names, frozen and in evaluation mode.

    Args:
        source: what `weights_file` takes; `random:ARCH` or `random:ARCH/PATCH`, freshly drawn with LayerScale 1 (at
            1e-5 the features would barely depend on the image), 14 pixels a patch if not said; or `random:RUN`,
            the same for the architecture of a run.
        seed: of random weights.
        image_size: side in pixels; None means what the source says, else 224 (or less, where the model's own
            position grid is smaller).
        num_heads, pos_embed_antialias, pos_embed_offset: as in `load_backbone`.

    Raises:
        ToolkitError: if there is no such model, or it cannot be read.
    """
    if str(source).startswith("random:"):
        backbone, preprocessing = _random_backbone(str(source).removeprefix("random:"), seed, image_size)
        made_of = f"random {backbone_settings(backbone)}, seed {seed}, torch {torch.__version__}"
        content_id = blake2b(made_of.encode(), digest_size=16).hexdigest()
    else:
        file = weights_file(source)
        contents = _contents(file)
        backbone = _backbone(contents, num_heads, pos_embed_antialias, pos_embed_offset)
        preprocessing = contents.saved.preprocessing if contents.saved else _preprocessing(contents, file, backbone)
        content_id = model_content_id(file)
    return Model(
        name=str(source),
        content_id=content_id,
        backbone=backbone.eval().requires_grad_(False),
        image_size=image_size or preprocessing.image_size,
        crop_ratio=preprocessing.crop_ratio,
        mean=preprocessing.mean,
        std=preprocessing.std,
        in_chans=backbone.in_chans,
        bit_depth=preprocessing.bit_depth,
    )


def _random_backbone(name: str, seed: int, image_size: int | None) -> tuple[VisionTransformer, Preprocessing]:
    named = re.fullmatch(rf"({'|'.join(ARCHITECTURES)})(?:/([1-9]\d*))?", name)
    if not named and not (name and Path(name).exists()):
        raise ToolkitError(
            f"random:{name} names neither an architecture nor a run; choose one of {', '.join(ARCHITECTURES)} "
            "(/PATCH behind it if not 14), or a run folder"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if not named:
            saved = read_model_json(weights_file(name).parent)
            return VisionTransformer(**asdict(saved.backbone), layer_scale=1.0), saved.preprocessing
        patch_size = int(named[2] or 14)
        size = max((image_size or 224) // patch_size, 1) * patch_size
        backbone = build_vit(named[1], patch_size=patch_size, img_size=size, layer_scale=1.0)
        return backbone, Preprocessing(size, CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD)


def _preprocessing(contents: _Contents, file: Path, backbone: VisionTransformer) -> Preprocessing:
    """Return a Hugging Face folder's own preprocessing, else that of the released models, fitted to the backbone."""
    described = file.parent / "preprocessor_config.json"
    if contents.config and described.exists():
        config = read_json(described)
        try:
            size, short_side = config["crop_size"]["height"], config["size"]["shortest_edge"]  # type: ignore[index]
            mean, std = config["image_mean"], config["image_std"]
            return Preprocessing(size, size / short_side, tuple(mean), tuple(std))  # type: ignore[arg-type]
        except (KeyError, TypeError) as problem:
            raise ToolkitError(
                f"{described} does not say crop_size.height, size.shortest_edge, image_mean and image_std ({problem}); "
                "correct it, or remove it for the released models' preprocessing"
            ) from None
    size = min(224 // backbone.patch_size * backbone.patch_size or backbone.patch_size, backbone.img_size)
    if backbone.in_chans == 3:
        return Preprocessing(size, CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD)
    console.say(
        f"nothing says how to normalise {backbone.in_chans} channels: taking mean 0.5 and deviation 0.5 for each"
    )
    return Preprocessing(size, CROP_RATIO, (0.5,) * backbone.in_chans, (0.5,) * backbone.in_chans)
