"""How good are frozen features: k-NN and a linear classifier, from images with a model or from embeddings.

train and test, labelled -> features -> guesses -> accuracy with its interval -> scores.parquet
"""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .. import console
from ..errors import ToolkitError
from ..features.extract import FeatureModel, extract, open_model
from ..features.knn import TEMPERATURE, knn_guesses
from ..store import catalog
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ..store.manifest import Manifest, Provenance, Source, open_manifest
from ..store.sources import ImageSource, check_labels, entries, open_source, survey
from ..store.vectors import Float32, Int64, cache_folder, has_vectors, open_vectors
from .linear import BATCH_SIZE, HELD_BACK, LEARNING_RATES, num_steps, train_linear_probe
from .scores import Score, bootstrap_interval, read_scores, show_scores, write_scores

DEFAULT_KS = (10, 20, 100, 200)
MAX_GUESSES = 5  # the five best guesses count too where there are more classes than that
NO_SUCH_CLASS = -2  # the truth of a test image whose class no training image has; -1 is a guess that is none


@dataclass(frozen=True)
class ProbeSettings:
    """What `dinov2 evaluate probe` can be told, beside the options that all commands share."""

    models: tuple[str, ...] = ()  # none: the embeddings in the manifests, else the newest finished run, else pixels
    methods: tuple[str, ...] = ("knn",)  # knn, linear
    ks: tuple[int, ...] | None = None  # None: those of DEFAULT_KS that the training set allows
    labels: str = "folder"  # folder or column:NAME
    batch_size: int = 64
    num_workers: int | None = None  # None: one a core


@dataclass(frozen=True)
class Side:
    """The labelled images of --train or --test."""

    source: Source  # its role is train or test
    manifest: Manifest | None  # whose embeddings are taken; None: features are computed from the images
    rows: Int64  # (N,) of the manifest
    uris: list[str]  # (N,)
    labels: list[str]  # (N,)


@dataclass(frozen=True)
class Contender:
    """What is measured: a model, or the embeddings that the manifests hold."""

    name: str
    source: Source | None
    model: FeatureModel | None  # None: the manifests' embeddings


def probe(train: str, test: str, output: str, settings: ProbeSettings, options: Options) -> Result | None:
    """Learn from one labelled set to classify another, and write the scores; return None after a dry run.

    `train` and `test` are embedding manifests or selections over them, or anything that names images.
    The result's value is the highest accuracy.
    Raises ToolkitError when there are no labels, no two classes to tell apart, or no features to be had.
    """
    path = check_manifest_name(output)
    sides = [_open_side("train", train, path, settings, options), _open_side("test", test, path, settings, options)]
    _check_classes(*sides)
    contenders = _contenders(sides, settings, options)
    provenance = Provenance(
        kind="scores",
        command="evaluate probe",
        parameters={
            "methods": list(settings.methods),
            "k": list(settings.ks or DEFAULT_KS),
            "labels": settings.labels,
            "limit": options.limit,
        },
        seed=options.seed,
        inputs=(*(side.source for side in sides), *(each.source for each in contenders if each.source)),
        role="eval",
    )
    if not is_up_to_date(path, provenance, options):
        if options.dry_run:
            _describe(path, sides, contenders, settings)
            return None
        with recorded(path) as finished:
            finished.append(write_scores(path, provenance, list(_measure(sides, contenders, settings, options))))
    elif options.dry_run:
        return None
    scores = read_scores(path)
    show_scores(scores)
    rows = [{**asdict(score), "parameters": json.loads(score.parameters)} for score in scores]
    return Result(output, {"rows": rows}, max(score.value for score in scores if score.metric == "top1"))


def parse_ks(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "10,20".

    Raises ToolkitError when something else stands there.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ToolkitError(f"--k {text!r} is no list of whole numbers above 0; write for example --k 10,20")
    return tuple(dict.fromkeys(int(part) for part in parts))


# What is compared with what


def _open_side(role: str, name: str, output: Path, settings: ProbeSettings, options: Options) -> Side:
    """Open --train or --test and leave out what has no label, saying how much.

    Raises ToolkitError when nothing is left.
    """
    manifest = _with_vectors(name) if not settings.models else None
    opened = open_source(name) if manifest is None else ImageSource("manifest", str(manifest.path), manifest)
    check_labels(settings.labels, [opened])
    own = {str(output.absolute()), str(catalog.catalog_path().absolute()), str(cache_folder().absolute())}
    content_id, _ = survey(opened, own.__contains__)
    listed = list(islice(entries(opened, settings.labels, own.__contains__), options.limit))
    labelled = [(row, entry) for row, entry in enumerate(listed) if entry.label is not None]
    if not labelled:
        raise ToolkitError(
            f"none of the {len(listed):,} rows of {name} has a label, and a probe needs them;"
            " name their column by --labels column:NAME, or sort the images into a folder a class"
        )
    if len(labelled) < len(listed):
        console.say(f"{role}: {len(listed) - len(labelled):,} of {len(listed):,} rows have no label and are left out")
    rows = np.array([row for row, _ in labelled], dtype=np.int64)
    uris, labels = [entry.uri for _, entry in labelled], [entry.label or "" for _, entry in labelled]
    return Side(Source(role, opened.path, content_id), manifest, rows, uris, labels)


def _with_vectors(name: str) -> Manifest | None:
    """Return the manifest of that name if it has embeddings, or leads to them."""
    if not (name.endswith(".parquet") or Path(name, "_manifest.json").exists()):
        return None
    manifest = open_manifest(Path(name))
    return manifest if has_vectors(manifest) else None


def _check_classes(train: Side, test: Side) -> None:
    known = _class_numbers(train, train.labels)
    absent = [label for label in test.labels if label not in known]
    if absent:
        console.warn(
            f"{len(absent):,} of {len(test.labels):,} test images are of a class that no training image has"
            f" ({', '.join(sorted(set(absent))[:3])}{', ...' if len(set(absent)) > 3 else ''}); they count as wrong"
        )


def _class_numbers(train: Side, labels: list[str]) -> dict[str, int]:
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


def _contenders(sides: list[Side], settings: ProbeSettings, options: Options) -> list[Contender]:
    manifests = [side.manifest for side in sides if side.manifest is not None]
    if not manifests:
        models = [open_model(name, options.seed) for name in settings.models or (None,)]
        return [Contender(_short(model.source.path), model.source, model) for model in models]
    if len(manifests) < len(sides):
        bare = next(side.source for side in sides if side.manifest is None)
        raise ToolkitError(
            f"{bare.path} has no embeddings, but the other side has; embed --{bare.role} too, or give --model for both"
        )
    made_by = [manifest.provenance.model() if manifest.provenance else None for manifest in manifests]
    known = {source.content_id: source.path for source in made_by if source is not None}
    if len(known) > 1:
        raise ToolkitError(
            f"the embeddings of --train and --test come from two models ({', '.join(known.values())});"
            " embed both by the same, or give --model"
        )
    source = next((source for source in made_by if source is not None), None)
    return [Contender(_short(source.path) if source else "unknown", source, None)]


def _short(path: str) -> str:
    """Return a path below the working folder as it is written there, anything else as it is."""
    return os.path.relpath(path) if path.startswith(os.path.join(os.getcwd(), "")) else path


def _describe(path: Path, sides: list[Side], contenders: list[Contender], settings: ProbeSettings) -> None:
    train, test = sides
    embedded = " and ".join(contender.name for contender in contenders)
    task = "embeddings," if train.manifest else f"images, embedded by {embedded},"
    console.say(
        f"would train {' and '.join(settings.methods)} on {len(train.labels):,} {task}"
        f" test on {len(test.labels):,} and write the scores to {path}"
    )


# Measuring


def _measure(
    sides: list[Side], contenders: list[Contender], settings: ProbeSettings, options: Options
) -> Iterator[Score]:
    for contender in contenders:
        (train, train_labels), (test, test_labels) = (_features(side, contender.model, settings) for side in sides)
        if train.shape[1] != test.shape[1]:
            raise ToolkitError(
                f"train embeddings have {train.shape[1]} numbers and test embeddings {test.shape[1]};"
                " embed both by the same model"
            )
        number = _class_numbers(sides[0], train_labels)
        targets = np.array([number[label] for label in train_labels])
        truth = np.array([number.get(label, NO_SUCH_CLASS) for label in test_labels])
        num_guesses = MAX_GUESSES if len(number) > MAX_GUESSES else 1
        for method in dict.fromkeys(settings.methods):
            for parameters, guesses in _guesses(method, train, targets, test, num_guesses, settings, options.seed):
                for metric, correct in _correct(guesses, truth):
                    yield Score(
                        contender.name,
                        method,
                        json.dumps(parameters),
                        metric,
                        float(correct.mean()),
                        *bootstrap_interval(correct, options.seed),
                        len(train),
                        len(test),
                    )


def _features(side: Side, model: FeatureModel | None, settings: ProbeSettings) -> tuple[Float32, list[str]]:
    """Return the features (N, D) of a side and their labels; what cannot be read is left out, and said."""
    if side.manifest is not None:
        vectors = open_vectors(side.manifest).take(side.rows)
        return np.array(vectors.raw(0, len(vectors))), side.labels  # a copy: torch warns of arrays it cannot write to
    assert model is not None
    features, rows, failures = [np.empty((0, model.dim), np.float32)], [], []
    num_workers = settings.num_workers or os.cpu_count() or 1
    with (
        console.progress(f"{_short(model.source.path)} on {side.source.role}", len(side.uris), "images") as advance,
        closing(extract(model, side.uris, batch_size=settings.batch_size, num_workers=num_workers)) as batches,
    ):
        for batch in batches:
            features.append(batch.features.numpy())
            rows += batch.indices
            failures += batch.failures
            advance(len(batch.indices) + len(batch.failures))
    if not rows:
        row, reason = failures[0]
        raise ToolkitError(f"no image of {side.source.path} can be read, first {side.uris[row]} ({reason}); check them")
    if failures:
        row, reason = failures[0]
        console.warn(f"{side.source.role}: {len(failures):,} images left out, first {side.uris[row]} ({reason})")
    return np.concatenate(features), [side.labels[row] for row in rows]


def _guesses(
    method: str,
    train: Float32,
    targets: Int64,
    test: Float32,
    num_guesses: int,
    settings: ProbeSettings,
    seed: int,
) -> Iterator[tuple[dict[str, object], Int64]]:
    """Yield the protocol's parameters and what it guesses for the test images, (M, num_guesses) classes."""
    match method:
        case "knn":
            ks = usable_ks(settings.ks, len(train))
            for k, guesses in knn_guesses(train, targets, test, ks, num_guesses=num_guesses).items():
                yield {"k": k, "temperature": TEMPERATURE, "similarity": "cosine"}, guesses
        case "linear":
            steps = num_steps(len(train))
            classifier = train_linear_probe(train, targets, steps=steps, seed=seed)
            parameters = {
                "learning_rate": classifier.learning_rate,
                "learning_rates": list(LEARNING_RATES),
                "chosen_on": f"1/{HELD_BACK} of train",
                "steps": steps,
                "batch_size": BATCH_SIZE,
                "augmentation": "none, features computed once",
            }
            yield parameters, classifier.guesses(test, num_guesses)
        case _:
            raise ValueError(f"method {method!r} is neither knn nor linear")


def usable_ks(ks: tuple[int, ...] | None, num_train: int) -> tuple[int, ...]:
    """Return those of `ks` (None: DEFAULT_KS, at least `num_train`) that a training set of this size allows.

    Raises ToolkitError when none is left.
    """
    usable = tuple(k for k in ks or DEFAULT_KS if k <= num_train)
    if not usable and ks is not None:
        raise ToolkitError(
            f"k {', '.join(map(str, ks))} is above the {num_train:,} training images; choose a lower --k"
        )
    if left_out := [str(k) for k in ks or DEFAULT_KS if k > num_train]:
        console.say(f"k {', '.join(left_out)} left out: there are {num_train:,} training images")
    return usable or (num_train,)


def _correct(guesses: Int64, truth: Int64) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    yield "top1", guesses[:, 0] == truth
    if guesses.shape[1] > 1:
        yield "top5", (guesses == truth[:, None]).any(axis=1)
