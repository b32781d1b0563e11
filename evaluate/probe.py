"""How good frozen features are: several protocols, from images with a model or from embeddings.

train and test -> features -> protocol -> measurements with their intervals -> scores.parquet
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, open_model, with_choice
from ..features.extract.tokens import TokenChoice
from ..models.vit import VisionTransformer
from ..store import artifact
from ..store.artifact import Options, Result, check_manifest_name
from ..store.manifest import Provenance, Source, open_manifest
from .knn import measure_knn
from .labelled import LabelledSplit, number_classes, open_split, short_name, split_features
from .linear import BLOCKS, measure_linear
from .logreg import measure_logreg
from .masks import MaskedSplit, open_masked_split
from .retrieval import measure_retrieval
from .scores import Measurement, Score, best_score, score_row, show_scores, write_scores
from .segment import measure_segment
from .task import Task


@dataclass(frozen=True)
class ProbeSettings:
    """Options of `dinov2 evaluate probe`, besides those that all commands share."""

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
class Probed:
    """What is measured: a model, or the embeddings that the manifests hold."""

    name: str
    source: Source | None
    model: str | None  # what opens it; None: the manifests' embeddings


def probe(train: str, test: str, output: str, settings: ProbeSettings, options: Options) -> Result | None:
    """Train on one split to classify or segment another, and write the scores; return None after a dry run.

    `train` and `test` are embedding manifests or selections over them, or anything that names images; for `segment`
    manifests with masks. The result's value is the best figure.
    Raises ToolkitError when there are no labels, no two classes to tell apart, or no features.
    """
    path = check_manifest_name(output)
    methods = tuple(dict.fromkeys(settings.methods))
    if settings.per_class is not None and "knn" not in methods:
        raise ToolkitError(
            f"--per-class {settings.per_class} is for --method knn alone; add it, or leave --per-class out"
        )
    names = {"train": train, "test": test}
    labelled: list[LabelledSplit] = []  # none for segment alone
    masked: list[MaskedSplit] = []  # none without segment
    if set(methods) != {"segment"}:
        from_images = bool(settings.models) or "segment" in methods
        labelled = [
            open_split(role, name, path, labels=settings.labels, limit=options.limit, from_images=from_images)
            for role, name in names.items()
        ]
        labelled = number_classes(*labelled)
    if "segment" in methods:
        masked = [open_masked_split(role, name, settings.masks, options.limit) for role, name in names.items()]
    splits = labelled or masked
    probed = _probed(labelled, settings, options.seed)
    provenance = Provenance(
        kind="scores",
        command="evaluate probe",
        parameters=_parameters(methods, settings, options),
        seed=options.seed,
        inputs=(*(split.source for split in splits), *(each.source for each in probed if each.source)),
        role="eval",
    )

    def describe() -> None:
        num_train, num_test = (len(split.uris) for split in splits)
        models = " and ".join(each.name for each in probed)
        is_embedded = bool(labelled) and labelled[0].manifest is not None
        images = "embeddings," if is_embedded else f"images, embedded by {models},"
        console.say(
            f"would train {' and '.join(methods)} on {num_train:,} {images} test on {num_test:,}"
            f" and write the scores to {output}"
        )

    def work() -> Provenance:
        scores: list[Score] = []
        for each in probed:  # a model is freed before the next is opened
            scores += _scores(each, labelled, masked, methods, settings, options.seed)
        return write_scores(path, provenance, scores)

    if artifact.make(output, provenance, options, describe=describe, work=work) is None:
        return None
    scores = open_manifest(path).read().to_pylist()
    show_scores(scores)
    rows = [{**row, "parameters": json.loads(row["parameters"])} for row in scores]
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


def _probed(splits: list[LabelledSplit], settings: ProbeSettings, seed: int) -> list[Probed]:
    manifests = [split.manifest for split in splits if split.manifest is not None]
    if not manifests:
        # Each model is opened to identify it, and freed, for several may not fit in memory.
        sources = [open_model(name, seed).source for name in settings.models or (None,)]
        return [Probed(short_name(source.path), source, source.path) for source in sources]
    if len(manifests) < len(splits):
        bare = next(split.source for split in splits if split.manifest is None)
        raise ToolkitError(
            f"{bare.path} has no embeddings, but the other split has; embed --{bare.role} too, or give --model for both"
        )
    made_by = [manifest.provenance.model() if manifest.provenance else None for manifest in manifests]
    known = {source.content_id: source for source in made_by if source is not None}
    if len(known) > 1:
        raise ToolkitError(
            "the embeddings of --train and --test come from two models"
            f" ({', '.join(source.path for source in known.values())}); embed both by the same, or give --model"
        )
    source = next(iter(known.values()), None)
    return [Probed(short_name(source.path) if source else "unknown", source, None)]


def _scores(
    probed: Probed,
    labelled: list[LabelledSplit],
    masked: list[MaskedSplit],
    methods: tuple[str, ...],
    settings: ProbeSettings,
    seed: int,
) -> Iterator[Score]:
    """Yield what every protocol measures."""
    model = None if probed.model is None else open_model(probed.model, seed)
    task = _task(labelled, model, methods, settings, seed) if labelled else None
    for method in methods:
        if method == "segment":
            assert model is not None, "segmentation is never of embeddings"
            sizes = settings.batch_size, settings.num_workers
            measured = measure_segment(model, *masked, image_size=settings.image_size, sizes=sizes, seed=seed)
        else:
            assert task is not None, "all others have labelled splits"
            measured = _classified(method, task, settings)
        yield from (score_row(probed.name, method, each) for each in measured)


def _classified(method: str, task: Task, settings: ProbeSettings) -> Iterator[Measurement]:
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
    splits: list[LabelledSplit],
    model: FeatureModel | None,
    methods: tuple[str, ...],
    settings: ProbeSettings,
    seed: int,
) -> Task:
    """Return the features and classes of both splits, by one pass of the model over the images."""
    blocks, has_mean = 1, False
    if "linear" in methods and model is not None and isinstance(model.backbone, VisionTransformer):
        blocks, has_mean = min(BLOCKS, model.backbone.depth), True
        model = with_choice(model, TokenChoice("cls+mean", blocks))
    train, test = splits
    train_features, train_rows = split_features(train, model, settings.batch_size, settings.num_workers)
    test_features, test_rows = split_features(test, model, settings.batch_size, settings.num_workers)
    dims = train_features.shape[1], test_features.shape[1]
    if dims[0] != dims[1]:
        raise ToolkitError(
            f"train embeddings have {dims[0]} numbers and test embeddings {dims[1]}; embed both by the same model"
        )
    return Task(
        train_features,
        train.classes[train_rows],
        test_features,
        test.classes[test_rows],
        [train.uris[row] for row in train_rows],
        [test.uris[row] for row in test_rows],
        blocks,
        has_mean,
        seed,
    )
