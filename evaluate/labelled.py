"""The labelled images that probes are trained and tested on, and their features.

N images, E numbers a feature.
"""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from .. import console
from ..cores import usable_cores
from ..errors import ToolkitError
from ..features.extract.extract import FeatureBatch, FeatureModel, extract
from ..store.cache import cache_folder
from ..store.manifest import Manifest, Source, is_manifest_name, open_manifest
from ..store.places import catalog_path
from ..store.sources import ImageSource, check_labels, entries, listing_id, open_source
from ..store.vectors import Float32, Int64, has_vectors, open_vectors
from .masks import MaskedSplit
from .task import UNKNOWN_CLASS


@dataclass(frozen=True)
class LabelledSplit:
    """The labelled images of --train or --test."""

    source: Source  # its role is train or test
    manifest: Manifest | None  # whose embeddings are taken; None: features are computed from the images
    rows: Int64  # (N,) of the manifest
    uris: list[str]  # (N,)
    labels: list[str]  # (N,)
    classes: Int64 = field(default_factory=lambda: np.empty(0, np.int64))  # (N,) numbers of the labels


def open_split(role: str, name: str, output: Path, labels: str, limit: int | None, from_images: bool) -> LabelledSplit:
    """Open --train or --test and leave out what has no label, saying how much.

    Raises ToolkitError when nothing is left.
    """
    manifest = open_manifest(Path(name)) if is_manifest_name(name) and not from_images else None
    if manifest is not None and not has_vectors(manifest):
        manifest = None
    source = open_source(name) if manifest is None else ImageSource("manifest", str(manifest.path), manifest)
    check_labels(labels, [source])
    own = {str(path.absolute()) for path in (output, catalog_path(), cache_folder())}
    content_id = listing_id(source, own.__contains__)
    listed = list(islice(entries(source, labels, own.__contains__), limit))
    labelled = [(row, entry.uri, entry.label) for row, entry in enumerate(listed) if entry.label is not None]
    if not labelled:
        raise ToolkitError(
            f"none of the {len(listed):,} rows of {name} has a label, and a probe needs them;"
            " name their column by --labels column:NAME, or sort the images into a folder a class"
        )
    if len(labelled) < len(listed):
        console.say(f"{role}: {len(listed) - len(labelled):,} of {len(listed):,} rows have no label and are left out")
    rows, uris, classes = (list(column) for column in zip(*labelled, strict=True))
    return LabelledSplit(Source(role, source.path, content_id), manifest, np.array(rows, np.int64), uris, classes)


def number_classes(train: LabelledSplit, test: LabelledSplit) -> list[LabelledSplit]:
    """Return both splits with their classes, numbered by the alphabet, UNKNOWN_CLASS for those of test images alone.

    Raises ToolkitError when the training images are all of one class.
    """
    classes = sorted(set(train.labels))
    if len(classes) == 1:
        found = f"all {len(train.labels):,} labelled images of {train.source.path} are {classes[0]!r}"
        raise ToolkitError(f"{found}; a probe needs two classes or more to tell apart")
    numbers = {label: number for number, label in enumerate(classes)}
    if unknown := [label for label in test.labels if label not in numbers]:
        listed = ", ".join(sorted(set(unknown))[:3]) + (", ..." if len(set(unknown)) > 3 else "")
        of_all = f"{len(unknown):,} of {len(test.labels):,}"
        console.warn(f"{of_all} test images are of a class that no training image has ({listed}); they count as wrong")
    labels = ([numbers.get(label, UNKNOWN_CLASS) for label in split.labels] for split in (train, test))
    return [replace(split, classes=np.array(of_split)) for split, of_split in zip((train, test), labels, strict=True)]


def warn_of_shared(train: LabelledSplit, test: LabelledSplit) -> None:
    """Say how many test images are training images too, by their uris, or by their bytes where manifests know them."""
    keys = [[split.uris] for split in (train, test)]
    for split, own in zip((train, test), keys, strict=True):
        if split.manifest is not None and "image_id" in split.manifest.names():
            own.append(split.manifest.read(["image_id"]).column("image_id").take(split.rows).to_pylist())
    shared = np.zeros(len(test.uris), np.bool_)
    for of_train, of_test in zip(*keys, strict=False):
        known = set(of_train) - {None}
        shared |= [key in known for key in of_test]
    if shared.any():
        of_all = f"{shared.sum():,} of {len(shared):,}"
        console.warn(f"{of_all} test images are training images too; leave them out, or the scores are too good")


def split_features(
    split: LabelledSplit, model: FeatureModel | None, batch_size: int, num_workers: int | None
) -> tuple[Float32, Int64, list[str]]:
    """Return the features (N, E), classes (N,) and uris of the images of a split that can be read.

    The features are the manifest's embeddings where the model is None.
    """
    if model is None:
        assert split.manifest is not None
        vectors = open_vectors(split.manifest).take(split.rows)
        return vectors.raw(0, len(vectors)), split.classes, split.uris
    features, rows = [], []
    for batch in extract_split(model, split, batch_size, num_workers):
        features.append(batch.features.numpy())
        rows += batch.indices
    return np.concatenate(features), split.classes[rows], [split.uris[row] for row in rows]


def extract_split(
    model: FeatureModel, split: LabelledSplit | MaskedSplit, batch_size: int, num_workers: int | None
) -> Iterator[FeatureBatch]:
    """Yield the features of a split's images; a warning says what cannot be read.

    Raises ToolkitError when no image can be read.
    """
    failures, uris, source = [], split.uris, split.source
    num_workers = num_workers or usable_cores()
    with (
        console.progress(f"{short_name(model.source.path)} on {source.role}", len(uris), "images") as advance,
        closing(extract(model, uris, batch_size=batch_size, num_workers=num_workers)) as batches,
    ):
        for batch in batches:
            if not batch.features.isfinite().all():
                first = uris[batch.indices[0]]
                raise ToolkitError(
                    f"features of {model.source.path} are not finite, first near {first}; name another --model"
                )
            yield batch
            failures += batch.failures
            advance(len(batch.indices) + len(batch.failures))
    if failures:
        row, reason = failures[0]
        if len(failures) == len(uris):
            raise ToolkitError(f"no image of {source.path} can be read, first {uris[row]} ({reason}); check them")
        console.warn(f"{source.role}: {len(failures):,} images left out, first {uris[row]} ({reason})")


def short_name(path: str) -> str:
    """Return a path below the working folder as it is written there, anything else as it is."""
    return os.path.relpath(path) if path.startswith(os.path.join(os.getcwd(), "")) else path
