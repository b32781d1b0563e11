"""k-NN accuracy of a run's features on labelled images while it trains; the training never sees the labels."""

from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ... import console
from ...errors import ToolkitError
from ...features.extract.extract import FeatureModel, extract
from ...features.knn import knn_guesses
from ...models.preprocess import Preprocess
from ...models.vit import VisionTransformer
from ...store.manifest import Source
from ...store.sources import entries, open_source
from ...store.vectors import Float32, Int64
from ..config import TrainConfig
from ..data.multicrop import preprocess_of
from ..engine.checkpoint import TrainedModel

K = 20  # neighbours; the protocol's temperature of 0.07 is in `features.knn`
UNKNOWN_CLASS = -1  # of a test image whose class no training image has: every guess is wrong
BATCH_SIZE = 64  # images of a forward pass; chosen


@dataclass(frozen=True)
class LabelledImages:
    """Images whose classes are known, as numbers from 0."""

    uris: list[str]  # (n,)
    classes: Int64  # (n,)


class LabelledSets(NamedTuple):
    """The images that vote, and those whose class is guessed."""

    train: LabelledImages
    test: LabelledImages


def labelled_sets(train: str, test: str) -> LabelledSets:
    """Return the labelled images of two manifests, or of two folders with a folder a class.

    Raises:
        ToolkitError: if one has no labels, or the images that vote are all of one class.
    """
    voting, guessed = _labelled("--eval-train", train), _labelled("--eval-test", test)
    numbers = {label: number for number, label in enumerate(sorted({label for _, label in voting}))}
    if len(numbers) < 2:
        raise ToolkitError(f"all labels of --eval-train {train} are {min(numbers)!r}; k-NN needs two classes or more")

    def numbered(images: list[tuple[str, str]]) -> LabelledImages:
        classes = np.array([numbers.get(label, UNKNOWN_CLASS) for _, label in images])
        return LabelledImages([uri for uri, _ in images], classes)

    return LabelledSets(numbered(voting), numbered(guessed))


def _labelled(option: str, name: str) -> list[tuple[str, str]]:
    found = entries(open_source(name), "folder", lambda path: False)
    images = [(entry.uri, entry.label) for entry in found if entry.label is not None]
    if not images:
        raise ToolkitError(f"{option} {name} has no labels; give a manifest with a label column, or a folder a class")
    return images


def knn_figures(model: TrainedModel | None, sets: LabelledSets, config: TrainConfig) -> dict[str, float]:
    """Return `knn`, the k-NN accuracy of the teacher's class tokens, 0 to 1; of several students `NAME_knn` of each.

    Empty without a model, as in all processes but the main one.
    """
    backbones = {} if model is None else dict(model.teacher.items())
    # Blocks are compiled for the batches of training, not for these.
    with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
        return {
            name.removesuffix("backbone") + "knn": knn_accuracy(
                part, sets, preprocess_of(config), num_workers=config.num_workers
            )
            for name, part in backbones.items()
            if isinstance(part, VisionTransformer)
        }


def knn_accuracy(backbone: VisionTransformer, sets: LabelledSets, preprocess: Preprocess, *, num_workers: int) -> float:
    """Return the share of test images, 0 to 1, whose class the 20 nearest training images vote for.

    Features are the class tokens; no random number is drawn. Images that cannot be read are left out, said on stderr.
    """
    model = FeatureModel(Source("model", "teacher", ""), backbone.embed_dim, preprocess, backbone)
    train_features, train_classes = _features(model, sets.train, num_workers)
    test_features, test_classes = _features(model, sets.test, num_workers)
    k = min(K, len(train_classes))
    guesses = knn_guesses(train_features, train_classes, test_features, (k,))[k]
    return float((guesses[:, 0] == test_classes).mean())


def _features(model: FeatureModel, images: LabelledImages, num_workers: int) -> tuple[Float32, Int64]:
    """Return the features (n, D) and classes (n,) of the images that can be read."""
    features, places, failures = [np.empty((0, model.dim), np.float32)], [], []
    with closing(extract(model, images.uris, batch_size=BATCH_SIZE, num_workers=max(1, num_workers))) as batches:
        for batch in batches:
            features.append(batch.features.numpy())
            places += batch.indices
            failures += batch.failures
    if failures:
        place, reason = failures[0]
        console.warn(f"k-NN: {len(failures):,} images left out, first {images.uris[place]} ({reason})")
    if not places:
        raise ToolkitError(f"no labelled image can be read, first {images.uris[0]}; check --eval-train and --eval-test")
    return np.concatenate(features), images.classes[places]
