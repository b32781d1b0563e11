"""A model over many images, which are decoded while it computes; results in the order of the images.

Shapes: B images, C channels, S side in pixels, T tiles, N patch tokens, D embed_dim, E numbers an image.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import console
from ...errors import ToolkitError
from ...models.copy_descriptor import PREPROCESS as COPY_PREPROCESS
from ...models.copy_descriptor import CopyDescriptor, copy_content_id, load_copy_descriptor
from ...models.cpu import in_threads, is_enabled
from ...models.preprocess import Preprocess, normalise
from ...models.vit import Features, VisionTransformer
from ...models.weights import Model, load_model
from ...store import catalog
from ...store.manifest import Source
from .decoding import ImageBatch, load_batches
from .reading import ImageFacts, Reading, Tiling
from .tokens import TokenChoice, chosen_tokens, concatenate
from .windows import cut

Started = tuple[ImageBatch, Tensor, list[Tensor]]  # a batch, its vectors and patches, which a GPU may still compute

PIXELS_SIDE = 16
MODEL_HELP = "a run folder, a weights file, a Hugging Face folder, random:ARCH, pixels or copy"


class PixelBackbone(nn.Module):
    """No network: its class token is the image itself, less its own mean; the floor that learned features must beat."""

    embed_dim = 3 * PIXELS_SIDE**2

    def forward_features(self, images: Tensor) -> Features:
        """Return the pixels of (B, 3, S, S) as class token (B, 3 S S) and, three numbers each, as patch tokens."""
        pixels = images.flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, S S, 3)
        flat = pixels.flatten(1)
        return Features(flat - flat.mean(dim=1, keepdim=True), pixels[:, :0], pixels)


@dataclass(frozen=True)
class FeatureModel:
    """A model and how it wants its images; `source` names it in a manifest's provenance."""

    source: Source
    dim: int  # E
    preprocess: Preprocess
    backbone: VisionTransformer | PixelBackbone | CopyDescriptor
    choice: TokenChoice = TokenChoice()
    windows: int | None = None  # short side in pixels of images that the model sees in tiles


@dataclass(frozen=True)
class FeatureBatch:
    """Features of images, and what could not be read up to the last of them."""

    indices: list[int]  # (B,) positions among the uris, ascending
    facts: list[ImageFacts]  # (B,)
    features: Tensor  # (B, E) float32 on the CPU: the class token after the final norm, or the tokens chosen
    failures: list[tuple[int, str]]
    waited_s: float  # for decoding
    patches: list[Tensor] = field(default_factory=list)  # (B,) of (rows, columns, E) float32, if they were chosen
    known: list[tuple[int, int]] = field(default_factory=list)


def open_model(name: str | None, seed: int = 0) -> FeatureModel:
    """Return the model that --model names; None means the newest finished run, else `copy`, said on stderr.

    Raises ToolkitError when there is no such model.
    """
    if name is None:
        run = catalog.newest_run()
        name = "copy" if run is None else str(run)
        console.say(f"no --model given: using {'the newest run, ' if run else ''}{name}")
    if name == "pixels":
        return pixels_model()
    if name == "copy":
        return copy_model()
    return feature_model(load_model(name, seed=seed))


def feature_model(model: Model) -> FeatureModel:
    """Return a loaded backbone as something to extract features with."""
    path = str(Path(model.name).absolute()) if Path(model.name).exists() else model.name
    source = Source("model", path, model.content_id)
    return FeatureModel(source, model.backbone.embed_dim, model.preprocess, model.backbone)


def pixels_model() -> FeatureModel:
    """Return the model `pixels`: the whole image as 16 x 16 RGB in [0, 1], row by row, less its own mean."""
    preprocess = Preprocess(PIXELS_SIDE, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    source = Source("model", "pixels", "pixels-16x16-rgb")
    return FeatureModel(source, PixelBackbone.embed_dim, preprocess, PixelBackbone())


def copy_model() -> FeatureModel:
    """Return the model `copy`: the descriptor made for near-duplicates that ships with the package."""
    source = Source("model", "copy", copy_content_id())
    return FeatureModel(source, CopyDescriptor.embed_dim, COPY_PREPROCESS, load_copy_descriptor())


def with_choice(
    model: FeatureModel, choice: TokenChoice, image_size: int | None = None, windows: int | None = None
) -> FeatureModel:
    """Return a model that gives other tokens, or sees images at another size.

    Its content id differs where its vectors cannot be compared with those of the model as it was.

    Args:
        image_size: side in pixels of what the model sees; None means its own.
        windows: short side in pixels to which larger images are resized, to be seen in tiles of `image_size`; None
            means the centre square.

    Raises:
        ToolkitError: if the model has no such tokens or blocks, or the sizes do not fit its patches.
    """
    backbone, preprocess = model.backbone, model.preprocess
    if (choice, image_size, windows) == (TokenChoice(), None, None):
        return model
    if not isinstance(backbone, VisionTransformer):
        raise ToolkitError(
            f"model {model.source.path} has no tokens; --tokens, --layers, --image-size and --windows need a"
            " vision transformer as --model"
        )
    if not 1 <= choice.layers <= backbone.depth:
        raise ToolkitError(f"--layers {choice.layers}: the model has {backbone.depth} blocks; give 1 to that")
    side = image_size or preprocess.image_size
    if side % backbone.patch_size:
        raise ToolkitError(
            f"--image-size {side} is not a multiple of the model's patch size {backbone.patch_size};"
            f" use {side // backbone.patch_size * backbone.patch_size or backbone.patch_size}"
        )
    if windows is not None and windows < side:
        raise ToolkitError(f"--windows {windows} is smaller than a tile of {side} pixels; give more, or leave it out")
    size = "" if side == preprocess.image_size else f"+{side}px"
    suffix = choice.suffix + size + ("" if windows is None else f"+windows-{windows}px")
    return replace(
        model,
        source=replace(model.source, content_id=model.source.content_id + suffix),
        dim=choice.dim(backbone.embed_dim),
        preprocess=replace(preprocess, image_size=side),
        choice=choice,
        windows=windows,
    )


def best_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def extract(
    model: FeatureModel,
    uris: Iterable[str | None],
    *,
    batch_size: int,
    num_workers: int,
    reading: Reading | None = None,
) -> Generator[FeatureBatch, None, None]:
    """Yield the features of all images, in order; the same ones whatever the number of workers.

    Close the iterator (`contextlib.closing`) when leaving it early: that ends the processes.

    Args:
        model: whose backbone is put on the GPU when there is one, and into evaluation mode.
        uris: names as `store.images.read_bytes` takes them, read only a little ahead of the model; None among them
            ends a batch there, and is not counted.
        num_workers: processes that read, decode and resize.
    """
    device = best_device()
    model.backbone.to(device).eval()
    tiling = None
    if model.windows is not None:
        assert isinstance(model.backbone, VisionTransformer), "as with_choice checks"
        patch_size = model.backbone.patch_size
        cutting = partial(cut, preprocess=model.preprocess, patch_size=patch_size, short_side=model.windows)
        tiling = Tiling(cutting, 2 * model.windows)
    running: Started | None = None
    sizes = {"batch_size": batch_size, "num_workers": num_workers}
    for batch in load_batches(uris, model.preprocess, **sizes, reading=reading, tiling=tiling):
        if batch.indices:
            blocks = _forward_batch(model, batch, device, batch_size)
            started: Started | None = (batch, *chosen_tokens(blocks, model.choice, batch.layouts))
        else:  # only failures
            started = (batch, torch.empty(0, model.dim), [])
        if device.type == "cuda":  # which gets this batch before it is asked for the last one
            started, running = running, started
        if started is not None:
            yield _fetch(*started)
    if running is not None:
        yield _fetch(*running)


def forward(
    backbone: VisionTransformer | PixelBackbone | CopyDescriptor,
    preprocess: Preprocess,
    pixels: Tensor,
    device: torch.device,
) -> Features:
    """Return the features of pixels (B, C, S, S), uint8 or uint16, on the device, without waiting for them.

    They are inference tensors: copy them before training on them. On a GPU the model runs in half precision where
    that is safe.
    """
    with _inference(device):
        return backbone.forward_features(normalise(_moved(pixels, device), preprocess))


def forward_layers(
    backbone: VisionTransformer, preprocess: Preprocess, pixels: Tensor, device: torch.device, layers: int
) -> list[Features]:
    """Return the features after each of the last blocks, from first to last; otherwise as `forward`."""
    with _inference(device):
        images = normalise(_moved(pixels, device), preprocess)
        blocks = backbone.get_intermediate_layers(images, layers, return_class_token=True)
    # Registers describe no image.
    return [Features(cls_token, patch_tokens[:, :0], patch_tokens) for patch_tokens, cls_token in blocks]


@contextmanager
def _inference(device: torch.device) -> Iterator[None]:
    is_cuda = device.type == "cuda"
    with torch.inference_mode(), torch.autocast(device.type, precision(device) if is_cuda else None, enabled=is_cuda):
        yield


def _moved(pixels: Tensor, device: torch.device) -> Tensor:
    return pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels


def precision(device: torch.device) -> torch.dtype:
    """Return what matrix products are computed in: bfloat16 on a GPU that has it, float16 on others, else float32."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _forward_batch(model: FeatureModel, batch: ImageBatch, device: torch.device, batch_size: int) -> list[Features]:
    """Return the features after each of the chosen blocks, of all images of a batch, or of all their tiles.

    On a CPU both halves are computed at once: two threads that work by themselves do not wait for one another at every
    product, which costs more than it gains while decoders take their share of the cores.
    """

    def features(pixels: Tensor) -> list[Features]:
        if isinstance(model.backbone, VisionTransformer) and model.choice.layers > 1:
            return forward_layers(model.backbone, model.preprocess, pixels, device, model.choice.layers)
        return [forward(model.backbone, model.preprocess, pixels, device)]

    parts: list[list[Features]] = []
    for pixels in torch.split(batch.pixels, batch_size):  # one part, but for tiles
        parts += in_threads(features, pixels.chunk(2) if is_enabled(device) else [pixels])
    return parts[0] if len(parts) == 1 else [concatenate(blocks) for blocks in zip(*parts, strict=True)]


def _fetch(batch: ImageBatch, vectors: Tensor, patches: list[Tensor]) -> FeatureBatch:
    # Copies, for others may train on them.
    features = vectors.to("cpu", torch.float32, copy=True)
    fetched = [image.to("cpu", torch.float32, copy=True) for image in patches]
    return FeatureBatch(batch.indices, batch.facts, features, batch.failures, batch.waited_s, fetched, batch.known)
