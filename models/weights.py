"""Models from all their sources: runs, official weights, Hugging Face folders, released weights that were pulled."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any  # of JSON

import torch
from torch import Tensor

from .. import console
from ..errors import ToolkitError, nearest
from ..store.files import check_regular
from .architecture import (
    backbone_settings,
    check_backbone_settings,
    inferred_backbone_settings,
    inferred_head_settings,
    load_strictly,
)
from .build import ARCHITECTURES, build_vit
from .formats import MODEL_METADATA, official_names, read_description, read_json, read_tensors
from .head import ProjectionHead
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from .released import RELEASED, cached_weights
from .saved import MODEL_JSON, TEACHER_FILE, SavedModel, read_model_json, saved_model
from .vit import VisionTransformer

DEFAULT_SIZE = 224  # pixels a side, as the released models were evaluated
CROP_RATIO = 224 / 256  # centre crop / short side, as the released models were evaluated


@dataclass(frozen=True)
class Model:
    """A frozen backbone in evaluation mode, its name, and how it wants its images."""

    name: str
    content_id: str
    backbone: VisionTransformer
    preprocess: Preprocess


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
    if not path.exists():
        name = str(source)
        if name not in RELEASED:
            near = nearest(name, [*RELEASED, *(f"random:{arch}" for arch in ARCHITECTURES), "pixels", "copy"])
            raise ToolkitError(
                f"no model {name!r}{near}; give a run folder, a weights file, a Hugging Face folder or random:ARCH"
            )
        file = cached_weights(name)
        if not file.exists():
            raise ToolkitError(f"{name} is not in the cache ({file}); fetch it with `dinov2 models pull {name}`")
        return file
    if not path.is_dir():
        return path
    if (path / MODEL_JSON).exists():
        return path / TEACHER_FILE
    checkpoints = [found.parent for found in path.glob(f"checkpoints/step-[0-9]*/{MODEL_JSON}")]
    if checkpoints:
        latest = max(checkpoints, key=lambda folder: int(folder.name.removeprefix("step-")))
        console.say(f"{path} is not finished: taking the teacher of its latest checkpoint, {latest.name}")
        return latest / TEACHER_FILE
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / "config.json").exists() and (path / name).exists():
            return path / name
    raise ToolkitError(
        f"folder {path} holds no model: no {MODEL_JSON}, no checkpoints/step-*, no config.json with model.safetensors; "
        "name a run, a weights file or a Hugging Face folder"
    )


def model_content_id(source: str | Path) -> str:
    """Return the BLAKE2b-128 hex digest of a model's weights file, for provenance (source as in `weights_file`)."""
    with check_regular(weights_file(source)).open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


@dataclass(frozen=True)
class _Weights:
    """The tensors of a source under official names, and what else the source says of its model."""

    name: str  # for messages
    backbone: dict[str, Tensor]
    heads: dict[str, Tensor]
    saved: SavedModel | None  # if it is ours
    config: dict[str, Any]  # Hugging Face's config.json, otherwise empty


def _read(source: str | Path | Mapping[str, Tensor]) -> _Weights:
    if isinstance(source, Mapping):
        return _Weights("the state dict", *official_names(source), None, {})
    path = weights_file(source)
    tensors, description = read_tensors(path)
    # The file's own description serves where it was copied without its folder.
    saved = None if description is None else saved_model(read_description(description, path), path)
    if path.name == TEACHER_FILE and path.with_name(MODEL_JSON).exists():
        saved = read_model_json(path.parent)
    file = path.with_name("config.json")
    is_hugging_face = any(name.endswith("embeddings.cls_token") for name in tensors)
    config = read_json(file) if is_hugging_face and file.exists() else {}
    return _Weights(str(path), *official_names(tensors), saved, config)


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
            Dinov2Model and Dinov2WithRegistersModel, timm's DINOv2 models.
        num_heads: attention heads, where they are not 64 wide and the source does not say.
        pos_embed_antialias, pos_embed_offset: how the position embedding is interpolated; None means as the source
            says, else as the released weights of the kind: (True, 0.0) with registers, (False, 0.1) without.

    Raises:
        ToolkitError: if the source cannot be read, or its tensors are not exactly a backbone's (all of them named).
    """
    given = {"num_heads": num_heads, "pos_embed_antialias": pos_embed_antialias, "pos_embed_offset": pos_embed_offset}
    return _backbone(_read(source), {name: value for name, value in given.items() if value is not None})


def _backbone(weights: _Weights, given: Mapping[str, Any]) -> VisionTransformer:
    if weights.saved is None:
        # Our exports say in config.json how position embeddings are interpolated; transformers has no key for it.
        ours = weights.config.get(MODEL_METADATA, {})
        num_heads = given.get("num_heads", weights.config.get("num_attention_heads"))
        inferred = inferred_backbone_settings(weights.backbone, weights.name, num_heads)
        try:
            settings = replace(inferred, **ours)
        except TypeError as problem:
            raise ToolkitError(f"the config.json of {weights.name} is not as we write it ({problem})") from None
    else:
        settings = weights.saved.backbone
    settings = replace(settings, **given)
    check_backbone_settings(settings, weights.name)
    with torch.device("meta"):  # no time or random numbers spent on weights that are replaced
        backbone = VisionTransformer(**asdict(settings))
    load_strictly(backbone, weights.backbone, weights.name)
    return backbone.eval()


def load_heads(source: str | Path | Mapping[str, Tensor]) -> dict[str, ProjectionHead]:
    """Return the projection heads that a source holds, `dino_head` and `ibot_head` if it is apart; may be empty.

    Args:
        source: as in `load_backbone`; runs have heads, official teacher checkpoints too, released backbones none.

    Raises:
        ToolkitError: if the source cannot be read, or a head is not whole.
    """
    weights = _read(source)
    heads = {}
    for name in sorted({key.partition(".")[0] for key in weights.heads}):
        described = f"{name} of {weights.name}"
        tensors = {key.removeprefix(f"{name}."): weights.heads[key] for key in weights.heads if key.startswith(name)}
        with torch.device("meta"):
            head = ProjectionHead(**inferred_head_settings(tensors, described))
        load_strictly(head, tensors, described)
        heads[name] = head.eval()
    return heads


def load_model(source: str | Path, *, seed: int = 0) -> Model:
    """Return the model that `--model` names, frozen and in evaluation mode.

    Args:
        source: what `weights_file` takes; `random:ARCH` or `random:ARCH/PATCH`, freshly drawn with LayerScale 1 (at
            1e-5 the features would barely depend on the image), 14 pixels a patch if not said; or `random:RUN`,
            the same for the architecture of a run.
        seed: of random weights.

    Raises:
        ToolkitError: if there is no such model, or it cannot be read.
    """
    if str(source).startswith("random:"):
        backbone, preprocess = _random_backbone(str(source).removeprefix("random:"), seed)
        made_of = f"random {backbone_settings(backbone)}, seed {seed}, torch {torch.__version__}"
        content_id = blake2b(made_of.encode(), digest_size=16).hexdigest()
    else:
        file = weights_file(source)
        weights = _read(file)
        backbone = _backbone(weights, {})
        preprocess = weights.saved.preprocess if weights.saved else _preprocess(weights, file, backbone)
        content_id = model_content_id(file)
    if preprocess.in_chans != backbone.in_chans:
        raise ToolkitError(
            f"{source} takes {backbone.in_chans} channels, but has means of {preprocess.in_chans}; correct mean and std"
        )
    return Model(str(source), content_id, backbone.eval().requires_grad_(False), preprocess)


def _random_backbone(name: str, seed: int) -> tuple[VisionTransformer, Preprocess]:
    named = re.fullmatch(rf"({'|'.join(ARCHITECTURES)})(?:/([1-9]\d*))?", name)
    if not named and not (name and Path(name).exists()):
        choices = ", ".join(ARCHITECTURES)
        raise ToolkitError(f"no architecture or run {name!r}; choose one of {choices} (or ARCH/PATCH), or a run folder")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if not named:
            saved = read_model_json(weights_file(name).parent)
            check_backbone_settings(saved.backbone, name)
            return VisionTransformer(**asdict(saved.backbone), layer_scale=1.0), saved.preprocess
        patch_size = int(named[2] or 14)
        size = max(DEFAULT_SIZE // patch_size, 1) * patch_size
        backbone = build_vit(named[1], patch_size=patch_size, img_size=size, layer_scale=1.0)
        return backbone, Preprocess(size, CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD)


def _preprocess(weights: _Weights, file: Path, backbone: VisionTransformer) -> Preprocess:
    """Return a Hugging Face folder's own preprocessing, else that of the released models, fitted to the backbone."""
    described = file.parent / "preprocessor_config.json"
    if weights.config and described.exists():
        config = read_json(described)
        try:
            size, short_side = config["crop_size"]["height"], config["size"]["shortest_edge"]
            return Preprocess(size, size / short_side, tuple(config["image_mean"]), tuple(config["image_std"]))
        except (KeyError, TypeError) as problem:
            raise ToolkitError(
                f"{described} lacks crop_size.height, size.shortest_edge, image_mean or image_std ({problem}); "
                "correct it, or remove it for the released models' preprocessing"
            ) from None
    patch_size, in_chans = backbone.patch_size, backbone.in_chans
    size = min(max(DEFAULT_SIZE // patch_size, 1) * patch_size, backbone.img_size)
    if in_chans == 3:
        return Preprocess(size, CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD)
    console.say(f"nothing says how to normalise {in_chans} channels: taking mean 0.5 and deviation 0.5 for each")
    return Preprocess(size, CROP_RATIO, (0.5,) * in_chans, (0.5,) * in_chans)
