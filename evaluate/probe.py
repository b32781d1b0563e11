"""How good frozen features are: several protocols, from images with a model or from embeddings.

train and test -> features -> protocol -> measurements with their intervals -> scores.parquet
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from .. import console
from ..errors import ToolkitError
from ..features.extract.extract import FeatureModel, open_model, with_choice
from ..features.extract.tokens import TokenChoice
from ..models.vit import VisionTransformer
from ..store import artifact
from ..store.artifact import Options, Result, check_manifest_name
from ..store.manifest import Provenance, Source, open_manifest
from .knn import measure_knn
from .labelled import LabelledSplit, number_classes, open_split, short_name, split_features, warn_of_shared
from .linear import BLOCKS, measure_linear
from .logreg import measure_logreg
from .masks import MaskedSplit, open_masked_split
from .retrieval import measure_retrieval
from .scores import Measurement, Score, best_score, overall, score_row, show_scores, write_scores
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


def probe(train: str, test: str, output: str, settings: ProbeSettings, options: Options) -> Result | None:
    """Train on one split to classify or segment another, and write the scores; return None after a dry run.

    `train` and `test` are embedding manifests or selections over them, or anything that names images; for `segment`
    manifests with masks. The result's value is the best figure.
    Raises ToolkitError when there are no labels, no two classes to tell apart, or no features.
    """
    path = check_manifest_name(output)
    methods, per_class = tuple(dict.fromkeys(settings.methods)), settings.per_class
    settings = replace(settings, methods=methods)
    if per_class is not None and "knn" not in methods:
        raise ToolkitError(f"--per-class {per_class} is for --method knn alone; add it, or leave --per-class out")
    names = {"train": train, "test": test}
    labelled: list[LabelledSplit] = []  # none for segment alone
    masked: list[MaskedSplit] = []  # none without segment
    if set(methods) != {"segment"}:
        from_images = bool(settings.models) or "segment" in methods
        wanted = path, settings.labels, options.limit, from_images
        labelled = number_classes(*(open_split(role, name, *wanted) for role, name in names.items()))
        warn_of_shared(*labelled)
    if "segment" in methods:
        masked = [open_masked_split(role, name, settings.masks, options.limit) for role, name in names.items()]
    splits = labelled or masked
    models = _models(labelled, settings, options.seed)
    inputs = (*(split.source for split in splits), *(model for model in models if model))
    parameters = _parameters(settings, options)
    provenance = Provenance("scores", "evaluate probe", parameters, options.seed, inputs, role="eval")

    def describe() -> None:
        num_train, num_test = (len(split.uris) for split in splits)
        by = " and ".join(map(_name, models))
        train_on = f"{num_train:,} {'embeddings' if _are_embedded(labelled) else f'images, embedded by {by}'}"
        test_on = f"test on {num_test:,} and write the scores to {output}"
        console.say(f"would train {' and '.join(methods)} on {train_on}, {test_on}")

    def work() -> Provenance:
        # Each model is freed before the next is opened.
        rows = [row for model in models for row in _scores(model, labelled, masked, settings, options.seed)]
        return write_scores(path, provenance, rows)

    if artifact.make(output, provenance, options, describe=describe, work=work) is None:
        return None
    scores = open_manifest(path).read().to_pylist()
    show_scores(scores)
    rows = [{**row, "parameters": json.loads(row["parameters"])} for row in overall(scores)]
    return Result(output, {"rows": rows}, best_score(scores))


def parse_ks(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as "10,20".

    Raises ToolkitError when something else stands there.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ToolkitError(f"--k {text!r} is no list of whole numbers above 0; write for example --k 10,20")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _parameters(settings: ProbeSettings, options: Options) -> dict[str, object]:
    """Return what the scores depend on."""
    methods = settings.methods
    parameters: dict[str, object] = {"methods": list(methods), "labels": settings.labels, "limit": options.limit}
    if {"knn", "retrieval"} & set(methods):
        parameters["k"] = None if settings.ks is None else list(settings.ks)
    if "knn" in methods:
        parameters["per_class"] = settings.per_class
    if "segment" in methods:
        parameters |= {"masks": settings.masks, "image_size": settings.image_size}
    return parameters


def _name(model: Source | None) -> str:
    return "unknown" if model is None else short_name(model.path)


def _are_embedded(splits: list[LabelledSplit]) -> bool:
    return any(split.manifest is not None for split in splits)


def _models(splits: list[LabelledSplit], settings: ProbeSettings, seed: int) -> list[Source | None]:
    """Return the models to measure; of embeddings the one that made them, None where it is not known."""
    manifests = [split.manifest for split in splits if split.manifest is not None]
    if not manifests:
        # Each model is opened to identify it, and freed, for several may not fit in memory.
        return [open_model(name, seed).source for name in settings.models or (None,)]
    if len(manifests) < len(splits):
        bare = next(split.source for split in splits if split.manifest is None)
        raise ToolkitError(
            f"{bare.path} has no embeddings, but the other split has; embed --{bare.role} too, or give --model for both"
        )
    made_by = [manifest.provenance.model() if manifest.provenance else None for manifest in manifests]
    known = {source.content_id: source for source in made_by if source is not None}
    if len(known) > 1:
        paths = ", ".join(source.path for source in known.values())
        raise ToolkitError(
            f"the embeddings of --train and --test come from two models ({paths}); embed both by the same, or"
            " give --model"
        )
    return [next(iter(known.values()), None)]


def _scores(
    source: Source | None, labelled: list[LabelledSplit], masked: list[MaskedSplit], settings: ProbeSettings, seed: int
) -> Iterator[Score]:
    """Yield what every protocol measures of a model."""
    model = None if source is None or _are_embedded(labelled) else open_model(source.path, seed)
    task = _task(labelled, model, settings, seed) if labelled else None
    for method in settings.methods:
        if method == "segment":
            assert model is not None, "segmentation is never of embeddings"
            sizes = settings.batch_size, settings.num_workers
            measured = measure_segment(model, *masked, image_size=settings.image_size, sizes=sizes, seed=seed)
        else:
            assert task is not None, "all others have labelled splits"
            protocols: dict[str, Callable[[Task], Iterator[Measurement]]] = {
                "knn": partial(measure_knn, ks=settings.ks, per_class=settings.per_class),
                "linear": measure_linear,
                "logreg": measure_logreg,
                "retrieval": partial(measure_retrieval, ks=settings.ks),
            }
            measured = protocols[method](task)
        yield from (score_row(_name(source), method, each) for each in measured)


def _task(splits: list[LabelledSplit], model: FeatureModel | None, settings: ProbeSettings, seed: int) -> Task:
    """Return the features and classes of both splits, by one pass of the model over the images."""
    blocks, has_mean = 1, False
    if "linear" in settings.methods and model is not None and isinstance(model.backbone, VisionTransformer):
        blocks, has_mean = min(BLOCKS, model.backbone.depth), True
        model = with_choice(model, TokenChoice("cls+mean", blocks))
    names = dict(zip(splits[0].classes.tolist(), splits[0].labels, strict=True))
    read = (split_features(split, model, settings.batch_size, settings.num_workers) for split in splits)
    (train, train_labels, train_uris), (test, test_labels, test_uris) = read
    if train.shape[1] != test.shape[1]:
        dims = f"train embeddings have {train.shape[1]} numbers and test embeddings {test.shape[1]}"
        raise ToolkitError(f"{dims}; embed both by the same model")
    class_names = tuple(names[number] for number in range(len(names)))
    return Task(train, train_labels, test, test_labels, train_uris, test_uris, blocks, has_mean, seed, class_names)
