"""How well a run's features tell labelled images apart, watched while it trains; labels never reach the training."""

from contextlib import closing
from dataclasses import dataclass

import numpy as np

from ... import console
from ...errors import ToolkitError
from ...features.extract.extract import FeatureModel, extract
from ...features.knn import knn_guesses
from ...models.preprocess import Preprocess
from ...models.vit import VisionTransformer
from ...store.manifest import Source
from ...store.sources import entries, open_source
from ...store.vectors import Float32, Int64

K = 20  # neighbours; the protocol's temperature of 0.07 is in `features.knn`
UNKNOWN_CLASS = -1  # of a test image whose class no training image has: no vote is right
BATCH_SIZE = 64  # images at a time; chosen


@dataclass(frozen=True)
class LabelledImages:
    """Images whose classes are known, as numbers from 0."""

    uris: list[str]  # (n,)
    classes: Int64  # (n,)


@dataclass(frozen=True)
class LabelledSets:
    """The images that vote, and those whose class is guessed."""

    train: LabelledImages
    test: LabelledImages


def labelled_sets(train: str, test: str) -> LabelledSets:
    """Return the labelled images of two manifests, or of two folders with a folder a class.

    Raises:
        ToolkitError: if one has no labels, or the images that vote are all of one class.
    """
    named = {option: _labelled(option, name) for option, name in (("--eval-train", train), ("--eval-test", test))}
    numbers = {label: number for number, label in enumerate(sorted({label for _, label in named["--eval-train"]}))}
    if len(numbers) < 2:
        raise ToolkitError(f"all labels of --eval-train {train} are {min(numbers)!r}; k-NN needs two classes or more")
    return LabelledSets(
        *(
            LabelledImages(
                [uri for uri, _ in images], np.array([numbers.get(label, UNKNOWN_CLASS) for _, label in images])
            )
            for images in named.values()
        )
    )


def _labelled(option: str, name: str) -> list[tuple[str, str]]:
    found = [(entry.uri, entry.label) for entry in entries(open_source(name), "folder", lambda path: False)]
    images = [(uri, label) for uri, label in found if label is not None]
    if not images:
        raise ToolkitError(f"{option} {name} has no labels; give a manifest with a label column, or a folder a class")
    return images


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
    workers = max(1, num_workers)
    with closing(extract(model, images.uris, batch_size=BATCH_SIZE, num_workers=workers)) as batches:
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
