"""The labelled images that probes learn from and are tested on, and their features.

N images, E numbers a feature.
"""

import os
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, extract
from ..store import catalog
from ..store.cache import cache_folder
from ..store.manifest import Manifest, Source, open_manifest
from ..store.sources import ImageSource, check_labels, entries, open_source, survey
from ..store.vectors import Float32, Int64, has_vectors, open_vectors


@dataclass(frozen=True)
class Side:
    """The labelled images of --train or --test."""

    source: Source  # its role is train or test
    manifest: Manifest | None  # whose embeddings are taken; None: features are computed from the images
    rows: Int64  # (N,) of the manifest
    uris: list[str]  # (N,)
    labels: list[str]  # (N,)


def open_side(role: str, name: str, output: Path, *, labels: str, limit: int | None, from_images: bool) -> Side:
    """Open --train or --test and leave out what has no label, saying how much.

    Raises ToolkitError when nothing is left.
    """
    manifest = None if from_images else _with_vectors(name)
    opened = open_source(name) if manifest is None else ImageSource("manifest", str(manifest.path), manifest)
    check_labels(labels, [opened])
    own = {str(output.absolute()), str(catalog.catalog_path().absolute()), str(cache_folder().absolute())}
    content_id, _ = survey(opened, own.__contains__)
    listed = list(islice(entries(opened, labels, own.__contains__), limit))
    labelled = [(row, entry) for row, entry in enumerate(listed) if entry.label is not None]
    if not labelled:
        raise ToolkitError(
            f"none of the {len(listed):,} rows of {name} has a label, and a probe needs them;"
            " name their column by --labels column:NAME, or sort the images into a folder a class"
        )
    if len(labelled) < len(listed):
        console.say(f"{role}: {len(listed) - len(labelled):,} of {len(listed):,} rows have no label and are left out")
    rows = np.array([row for row, _ in labelled], dtype=np.int64)
    uris, named = [entry.uri for _, entry in labelled], [entry.label or "" for _, entry in labelled]
    return Side(Source(role, opened.path, content_id), manifest, rows, uris, named)


def _with_vectors(name: str) -> Manifest | None:
    """Return the manifest of that name if it has embeddings, or leads to them."""
    if not (name.endswith(".parquet") or Path(name, "_manifest.json").exists()):
        return None
    manifest = open_manifest(Path(name))
    return manifest if has_vectors(manifest) else None


def check_classes(train: Side, test: Side) -> None:
    """Say which test images are of a class that no training image has.

    Raises ToolkitError when the training images are all of one class.
    """
    known = class_numbers(train, train.labels)
    absent = [label for label in test.labels if label not in known]
    if absent:
        console.warn(
            f"{len(absent):,} of {len(test.labels):,} test images are of a class that no training image has"
            f" ({', '.join(sorted(set(absent))[:3])}{', ...' if len(set(absent)) > 3 else ''}); they count as wrong"
        )


def class_numbers(train: Side, labels: list[str]) -> dict[str, int]:
    """Return the number of each class, in alphabetical order.

    Raises ToolkitError when there is only one.
    """
    classes = sorted(set(labels))
    if len(classes) == 1:
        raise ToolkitError(
            f"all {len(labels):,} labelled images of {train.source.path} are {classes[0]!r};"
            " a probe needs two classes or more to tell apart"
        )
    return {label: number for number, label in enumerate(classes)}


def side_features(
    side: Side, model: FeatureModel | None, *, batch_size: int, num_workers: int | None
) -> tuple[Float32, Int64]:
    """Return the features (N, E) of a side and which of its images they are of; what cannot be read is said.

    They are the manifest's embeddings where the model is None.
    """
    if model is None:
        assert side.manifest is not None
        vectors = open_vectors(side.manifest).take(side.rows)
        return vectors.raw(0, len(vectors)), np.arange(len(vectors))
    features, places, failures = [np.empty((0, model.dim), np.float32)], [], []
    num_workers = num_workers or os.cpu_count() or 1
    description = f"{short_name(model.source.path)} on {side.source.role}"
    with (
        console.progress(description, len(side.uris), "images") as advance,
        closing(extract(model, side.uris, batch_size=batch_size, num_workers=num_workers)) as batches,
    ):
        for batch in batches:
            features.append(batch.features.numpy())
            places += batch.indices
            failures += batch.failures
            advance(len(batch.indices) + len(batch.failures))
    if not places:
        row, reason = failures[0]
        raise ToolkitError(f"no image of {side.source.path} can be read, first {side.uris[row]} ({reason}); check them")
    if failures:
        row, reason = failures[0]
        console.warn(f"{side.source.role}: {len(failures):,} images left out, first {side.uris[row]} ({reason})")
    return np.concatenate(features), np.array(places)


def held_back(labels: Int64, every: int, seed: int) -> Int64:
    """Return every so many-th image, in an order that is random within classes, so that the classes keep their shares.

    What is left is learnt from; these choose among what was learnt.
    """
    shuffled = np.random.default_rng([seed, 1]).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return by_class[every // 2 :: every]


def short_name(path: str) -> str:
    """Return a path below the working folder as it is written there, anything else as it is."""
    return os.path.relpath(path) if path.startswith(os.path.join(os.getcwd(), "")) else path
