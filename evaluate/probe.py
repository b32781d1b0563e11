"""How good are frozen features: several protocols, from images with a model or from embeddings.

train and test -> features -> protocol -> measurements with their intervals -> scores.parquet
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, open_model, with_choice
from ..features.extract.tokens import TokenChoice
from ..models.vit import VisionTransformer
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ..store.manifest import Provenance, Source
from .labelled import Side, check_classes, class_numbers, open_side, short_name, side_features
from .linear import BLOCKS, measure_linear
from .logreg import measure_logreg
from .masks import MaskedSide, open_masked_side
from .retrieval import measure_retrieval
from .scores import Measurement, Score, best_score, read_scores, show_scores, write_scores
from .segment import measure_segment
from .task import NO_SUCH_CLASS, Task
from .vote import measure_knn


@dataclass(frozen=True)
class ProbeSettings:
    """What `dinov2 evaluate probe` can be told, beside the options that all commands share."""

    models: tuple[str, ...] = ()  # none: the embeddings in the manifests, else the newest finished run, else copy
    methods: tuple[str, ...] = ("knn",)  # knn, linear, logreg, segment, retrieval
    ks: tuple[int, ...] | None = None  # None: those of the protocol, as far as the training set allows
    per_class: int | None = None  # knn: images of each class that vote; None: all
    labels: str = "folder"  # folder or column:NAME
    masks: str = "mask"  # segment: column of the manifests
    image_size: int | None = None  # segment: side of a window in pixels; None: the model's own
    batch_size: int = 64
    num_workers: int | None = None  # None: one a core


@dataclass(frozen=True)
class Contender:
    """What is measured: a model, or the embeddings that the manifests hold."""

    name: str
    source: Source | None
    model: str | None  # what opens it; None: the manifests' embeddings


def probe(train: str, test: str, output: str, settings: ProbeSettings, options: Options) -> Result | None:
    """Learn from one set to classify or segment another, and write the scores; return None after a dry run.

    `train` and `test` are embedding manifests or selections over them, or anything that names images; for `segment`
    manifests with masks. The result's value is the best figure.
    Raises ToolkitError when there are no labels, no two classes to tell apart, or no features to be had.
    """
    path = check_manifest_name(output)
    methods = tuple(dict.fromkeys(settings.methods))
    if settings.per_class is not None and "knn" not in methods:
        raise ToolkitError(
            f"--per-class {settings.per_class} is for --method knn alone; add it, or leave --per-class out"
        )
    roles = (("train", train), ("test", test))
    sides: list[Side] = []
    if set(methods) != {"segment"}:
        from_images = bool(settings.models) or "segment" in methods
        sides = [
            open_side(role, name, path, labels=settings.labels, limit=options.limit, from_images=from_images)
            for role, name in roles
        ]
        check_classes(*sides)
    masked: list[MaskedSide] = []
    if "segment" in methods:
        masked = [open_masked_side(role, name, settings.masks, options.limit) for role, name in roles]
    contenders = _contenders(sides, settings, options)
    provenance = Provenance(
        kind="scores",
        command="evaluate probe",
        parameters=_parameters(methods, settings, options),
        seed=options.seed,
        inputs=(
            *(side.source for side in sides or masked),
            *(contender.source for contender in contenders if contender.source),
        ),
        role="eval",
    )
    if not is_up_to_date(path, provenance, options):
        if options.dry_run:
            _describe(output, sides, masked, contenders, methods)
            return None
        with recorded(path) as finished:
            scores: list[Score] = []
            for contender in contenders:  # a model is let go before the next is opened
                scores += _scores(sides, masked, contender, methods, settings, options.seed)
            finished.append(write_scores(path, provenance, scores))
    elif options.dry_run:
        return None
    scores = read_scores(path)
    show_scores(scores)
    rows = [{**asdict(score), "parameters": json.loads(score.parameters)} for score in scores]
    return Result(output, {"rows": rows}, best_score(scores))


def parse_ks(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "10,20".

    Raises ToolkitError when something else stands there.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ToolkitError(f"--k {text!r} is no list of whole numbers above 0; write for example --k 10,20")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _parameters(methods: tuple[str, ...], settings: ProbeSettings, options: Options) -> dict[str, object]:
    """Return what the scores depend on."""
    parameters: dict[str, object] = {"methods": list(methods), "labels": settings.labels, "limit": options.limit}
    if {"knn", "retrieval"} & set(methods):
        parameters["k"] = None if settings.ks is None else list(settings.ks)
    if "knn" in methods:
        parameters["per_class"] = settings.per_class
    if "segment" in methods:
        parameters |= {"masks": settings.masks, "image_size": settings.image_size}
    return parameters


def _contenders(sides: list[Side], settings: ProbeSettings, options: Options) -> list[Contender]:
    manifests = [side.manifest for side in sides if side.manifest is not None]
    if not manifests:
        return [_named(name, options.seed) for name in settings.models or (None,)]
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
    return [Contender(short_name(source.path) if source else "unknown", source, None)]


def _named(name: str | None, seed: int) -> Contender:
    """Return a model as a contender; it is opened to be identified, and let go, for several may not fit in memory."""
    source = open_model(name, seed).source
    return Contender(short_name(source.path), source, source.path)


def _describe(
    output: str,
    sides: list[Side],
    masked: list[MaskedSide],
    contenders: list[Contender],
    methods: tuple[str, ...],
) -> None:
    train, test = (len(side.uris) for side in sides or masked)
    embedded = " and ".join(contender.name for contender in contenders)
    task = "embeddings," if sides and sides[0].manifest else f"images, embedded by {embedded},"
    console.say(
        f"would train {' and '.join(methods)} on {train:,} {task} test on {test:,} and write the scores to {output}"
    )


def _scores(
    sides: list[Side],
    masked: list[MaskedSide],
    contender: Contender,
    methods: tuple[str, ...],
    settings: ProbeSettings,
    seed: int,
) -> Iterator[Score]:
    """Yield what every protocol finds of a contender."""
    model = None if contender.model is None else open_model(contender.model, seed)
    task = _task(sides, model, methods, settings, seed) if sides else None
    for method in methods:
        for found in _measured(method, task, model, masked, settings, seed):
            yield Score(
                contender.name,
                method,
                json.dumps(found.parameters),
                found.metric,
                found.value,
                *found.interval,
                found.num_train,
                found.num_test,
            )


def _measured(
    method: str,
    task: Task | None,
    model: FeatureModel | None,
    masked: list[MaskedSide],
    settings: ProbeSettings,
    seed: int,
) -> Iterator[Measurement]:
    if method == "segment":
        assert model is not None, "segmentation is never of embeddings"
        train, test = masked
        return measure_segment(
            model,
            train,
            test,
            image_size=settings.image_size,
            batch_size=settings.batch_size,
            num_workers=settings.num_workers,
            seed=seed,
        )
    assert task is not None, "all others have labelled sides"
    match method:
        case "knn":
            return measure_knn(task, settings.ks, settings.per_class)
        case "linear":
            return measure_linear(task)
        case "logreg":
            return measure_logreg(task)
        case "retrieval":
            return measure_retrieval(task, settings.ks)
        case _:
            raise ValueError(f"method {method!r} is none of knn, linear, logreg, segment, retrieval")


def _task(
    sides: list[Side], model: FeatureModel | None, methods: tuple[str, ...], settings: ProbeSettings, seed: int
) -> Task:
    """Return the features and classes of both sides, by one pass of the model over the images."""
    blocks, has_mean = 1, False
    if "linear" in methods and model is not None and isinstance(model.backbone, VisionTransformer):
        blocks, has_mean = min(BLOCKS, model.backbone.depth), True
        model = with_choice(model, TokenChoice("cls+mean", blocks))
    (train, train_places), (test, test_places) = (
        side_features(side, model, batch_size=settings.batch_size, num_workers=settings.num_workers) for side in sides
    )
    if train.shape[1] != test.shape[1]:
        raise ToolkitError(
            f"train embeddings have {train.shape[1]} numbers and test embeddings {test.shape[1]};"
            " embed both by the same model"
        )
    train_labels, test_labels = (
        [side.labels[place] for place in places.tolist()]
        for side, places in zip(sides, (train_places, test_places), strict=True)
    )
    number = class_numbers(sides[0], train_labels)
    return Task(
        train,
        np.array([number[label] for label in train_labels]),
        test,
        np.array([number.get(label, NO_SUCH_CLASS) for label in test_labels]),
        [sides[0].uris[place] for place in train_places.tolist()],
        [sides[1].uris[place] for place in test_places.tolist()],
        blocks,
        has_mean,
        seed,
    )
