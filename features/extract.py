"""A model over many images: decoding in threads while the model computes, results in the order of the images.

Shapes: B images, C channels, S side in pixels, N patch tokens, D embed_dim.
"""

import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import console
from ..errors import ToolkitError
from ..models.preprocess import Preprocess, crop_picture, normalise
from ..models.vit import Features, VisionTransformer
from ..models.weights import Model, load_model
from ..store import catalog
from ..store.images import ColourMode, UnreadableImage, decode_sized, image_id, read_bytes
from ..store.manifest import Source

TASK_IMAGES = 8  # chosen: images a thread decodes at a time, so that small ones do not drown in hand-overs
PIXELS_SIDE = 16
MODEL_HELP = "a run folder, a weights file, a Hugging Face folder, random:ARCH or pixels"


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
    dim: int
    preprocess: Preprocess
    backbone: VisionTransformer | PixelBackbone


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an image once it was decoded."""

    image_id: str
    width: int  # pixels, upright and in full
    height: int


@dataclass(frozen=True)
class ImageBatch:
    """Decoded images, and what could not be decoded up to the last of them."""

    indices: list[int]  # (B,) positions among the uris, ascending
    facts: list[ImageFacts]  # (B,)
    pixels: Tensor  # (B, C, S, S) uint8
    failures: list[tuple[int, str]]  # position and reason
    waited_s: float  # how long the caller had to wait for it


@dataclass(frozen=True)
class FeatureBatch:
    """Features of images, and what could not be read up to the last of them."""

    indices: list[int]  # (B,) positions among the uris, ascending
    facts: list[ImageFacts]  # (B,)
    features: Tensor  # (B, D) float32 on the CPU: the class token after the final norm
    failures: list[tuple[int, str]]
    waited_s: float  # for decoding


def open_model(name: str | None, seed: int = 0) -> FeatureModel:
    """Return the model that --model names; None means the newest finished run, else `pixels`, said on stderr.

    Raises ToolkitError when there is no such model.
    """
    if name is None:
        run = catalog.newest_run()
        name = "pixels" if run is None else str(run)
        console.say(f"no --model given: using {'the newest run, ' if run else ''}{name}")
    if name == "pixels":
        return pixels_model()
    if name == "copy" and not Path(name).exists():
        raise ToolkitError(f"no model {name!r}; --model takes {MODEL_HELP}")
    return feature_model(load_model(name, seed=seed))


def feature_model(model: Model) -> FeatureModel:
    """Return a loaded backbone as something to extract features with."""
    preprocess = Preprocess(model.image_size, model.crop_ratio, model.mean, model.std, model.in_chans)
    path = str(Path(model.name).absolute()) if Path(model.name).exists() else model.name
    source = Source("model", path, model.content_id)
    return FeatureModel(source, model.backbone.embed_dim, preprocess, model.backbone)


def pixels_model() -> FeatureModel:
    """Return the model `pixels`: the whole image as 16 x 16 RGB in [0, 1], row by row, less its own mean."""
    preprocess = Preprocess(PIXELS_SIDE, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 3)
    return FeatureModel(
        Source("model", "pixels", "pixels-16x16-rgb"), PixelBackbone.embed_dim, preprocess, PixelBackbone()
    )


def best_device() -> torch.device:
    """Return the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def extract(
    model: FeatureModel, uris: Iterable[str], *, batch_size: int, num_workers: int
) -> Generator[FeatureBatch, None, None]:
    """Yield the features of all images, in order; the same ones whatever the number of workers.

    Close the iterator (`contextlib.closing`) when leaving it early: that ends the threads.

    Args:
        model: whose backbone is put on the GPU when there is one, and into evaluation mode.
        uris: names as `store.images.read_bytes` takes them; read only a little ahead of the model.
        batch_size: images the model sees at a time (fewer in the last batch).
        num_workers: threads that read, decode and resize.
    """
    device = best_device()
    backbone = model.backbone.to(device).eval()
    running: tuple[ImageBatch, Tensor] | None = None
    for batch in load_batches(uris, model.preprocess, batch_size=batch_size, num_workers=num_workers):
        seen = bool(batch.indices)  # the last batch may hold nothing but failures
        tokens = (
            forward(backbone, model.preprocess, batch.pixels, device).cls_token if seen else torch.empty(0, model.dim)
        )
        started = (batch, tokens)
        if running is not None:  # fetched only now, so that a GPU has the next batch before it is asked for the last
            yield _fetch(*running)
        running = started
    if running is not None:
        yield _fetch(*running)


def forward(
    backbone: VisionTransformer | PixelBackbone, preprocess: Preprocess, pixels: Tensor, device: torch.device
) -> Features:
    """Return the features of pixels (B, C, S, S) uint8, on the device, without waiting for them.

    They are inference tensors: copy them before training on them. On a GPU the model runs in bfloat16 where that is
    safe.
    """
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return backbone.forward_features(normalise(pixels, preprocess))


def _fetch(batch: ImageBatch, cls_token: Tensor) -> FeatureBatch:
    features = cls_token.to("cpu", torch.float32, copy=True)  # a copy, for others may train on it
    return FeatureBatch(batch.indices, batch.facts, features, batch.failures, batch.waited_s)


def load_batches(
    uris: Iterable[str], preprocess: Preprocess, *, batch_size: int, num_workers: int
) -> Generator[ImageBatch, None, None]:
    """Yield all images, decoded and cropped, in order and `batch_size` at a time, decoding ahead in threads.

    Pillow, hashing and file reading let other threads run meanwhile; forked processes would not do, for FAISS hangs
    in them. At most two batches and a little for every thread are decoded ahead, so memory stays bounded.
    """
    numbered = enumerate(uris)
    ahead = 2 * batch_size // TASK_IMAGES + 2 * num_workers  # tasks
    tasks: deque[Future[list[tuple[int, Loaded | str]]]] = deque()
    loaded: list[tuple[int, Loaded]] = []
    failures: list[tuple[int, str]] = []
    waited_s = 0.0
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
    try:
        while True:
            while len(tasks) < ahead and (task := list(islice(numbered, TASK_IMAGES))):
                tasks.append(pool.submit(_load_all, task, preprocess))
            if not tasks:
                break
            start = time.perf_counter()
            results = tasks.popleft().result()
            waited_s += time.perf_counter() - start
            for index, result in results:
                if isinstance(result, str):
                    failures.append((index, result))
                    continue
                loaded.append((index, result))
                if len(loaded) == batch_size:
                    yield _batch(loaded, failures, waited_s)
                    loaded, failures, waited_s = [], [], 0.0
        if loaded or failures:
            yield _batch(loaded, failures, waited_s)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Loaded:
    """An image on its way into a batch."""

    facts: ImageFacts
    pixels: Tensor  # (C, S, S) uint8


def _load_all(task: list[tuple[int, str]], preprocess: Preprocess) -> list[tuple[int, Loaded | str]]:
    return [(index, load(uri, preprocess)) for index, uri in task]


def load(uri: str, preprocess: Preprocess) -> Loaded | str:
    """Return the image behind a uri, ready for the model, or the reason why there is none."""
    mode: ColourMode = "L" if preprocess.in_chans == 1 else "RGB"
    try:
        data = read_bytes(uri)
        picture, (width, height) = decode_sized(data, mode, preprocess.min_side)
    except UnreadableImage as problem:
        return problem.reason
    return Loaded(ImageFacts(image_id(data), width, height), crop_picture(picture, preprocess))


def _batch(loaded: list[tuple[int, Loaded]], failures: list[tuple[int, str]], waited_s: float) -> ImageBatch:
    indices = [index for index, _ in loaded]
    pixels = torch.stack([image.pixels for _, image in loaded]) if loaded else torch.empty(0)
    return ImageBatch(indices, [image.facts for _, image in loaded], pixels, failures, waited_s)
