"""k-NN accuracy of a run's features on labelled images while it trains; the training never sees the labels."""

from collections.abc import Iterable, Mapping
from contextlib import closing, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ... import console
from ...errors import ToolkitError
from ...features.extract.extract import FeatureModel, extract
from ...features.knn import knn_predictions
from ...features.launch import ALONE, Group
from ...models.preprocess import Preprocess
from ...models.vit import VisionTransformer
from ...store.manifest import Source
from ...store.sources import entries, open_source
from ...store.vectors import Float32
from ..config import TrainConfig
from ..counter_rng import derived_seed
from ..data.multicrop import preprocess_of
from ..engine.checkpoint import TrainedModel

K = 20  # neighbours; the protocol's temperature of 0.07 is in `features.knn`
MAX_HELD_OUT = 20_000  # labelled images of --eval-share; chosen
BATCH_SIZE = 64  # images of a forward pass; chosen


class BestKnn:
    """The best k-NN accuracy of a run so far, from the figures of its logged steps; of several students their mean."""

    def __init__(self, rows: Iterable[Mapping[str, float]]) -> None:
        self.step: int | None = None
        self.accuracy = 0.0
        self.num_since = 0  # k-NN that were not better
        for row in rows:
            self.add(row)

    def add(self, figures: Mapping[str, float]) -> bool:
        """Take in a step's figures; tell whether its k-NN is better than all before."""
        found = [value for name, value in figures.items() if name == "knn" or name.endswith("_knn")]
        if not found:
            return False
        accuracy = sum(found) / len(found)
        if self.step is not None and accuracy <= self.accuracy:
            self.num_since += 1
            return False
        self.step, self.accuracy, self.num_since = int(figures["step"]), accuracy, 0
        return True

    def has_stalled(self, early_stop: int) -> bool:
        """Tell whether so many k-NN in a row were not better; 0 means never."""
        return 0 < early_stop <= self.num_since


class LabelledImages(NamedTuple):
    """Images and the names of their classes."""

    uris: list[str]  # (n,)
    labels: NDArray[np.str_]  # (n,)


LabelledSets = tuple[LabelledImages, LabelledImages]  # those that vote, and those whose class is predicted


def labelled_sets(train: str, test: str) -> LabelledSets:
    """Return the labelled images of two manifests, or of two folders with a folder a class.

    Raises:
        ToolkitError: if one has no labels, or the images that vote are all of one class.
    """
    voting, tested = _labelled("--eval-train", train), _labelled("--eval-test", test)
    if len(labels := set(voting.labels.tolist())) < 2:
        raise ToolkitError(f"all labels of --eval-train {train} are {min(labels)!r}; k-NN needs two classes or more")
    return voting, tested


def held_out(manifest: str, share: float, seed: int) -> LabelledSets:
    """Return a manifest's labelled images, a random share of them as those whose class is predicted by the others.

    At most 20,000 images in all, so that a k-NN takes minutes whatever the manifest.

    Raises:
        ToolkitError: if it has no labels, or the images that vote are all of one class.
    """
    images = _labelled("--eval-share needs labels:", manifest)
    order = np.random.default_rng(derived_seed(seed, "held out", 0)).permutation(len(images.uris))[:MAX_HELD_OUT]
    num_tested = max(1, round(share * len(order)))
    tested, voting = (
        LabelledImages([images.uris[row] for row in rows], images.labels[rows])
        for rows in (np.sort(order[:num_tested]), np.sort(order[num_tested:]))
    )
    if len(labels := set(voting.labels.tolist())) < 2:
        what = f"besides the held-out ones all labels of {manifest} are {sorted(labels)}"
        raise ToolkitError(f"--eval-share {share:g}: {what}; k-NN needs two classes or more")
    return voting, tested


def _labelled(option: str, name: str) -> LabelledImages:
    found = entries(open_source(name), "folder", lambda path: False)
    images = [(entry.uri, entry.label) for entry in found if entry.label is not None]
    if not images:
        raise ToolkitError(f"{option} {name} has no labels; give a manifest with a label column, or a folder a class")
    return LabelledImages([uri for uri, _ in images], np.array([label for _, label in images]))


def knn_figures(
    model: TrainedModel, sets: LabelledSets, config: TrainConfig, processes: Group = ALONE
) -> dict[str, float]:
    """Return `knn`, the k-NN accuracy of the teacher's class tokens, 0 to 1; of several students `NAME_knn` of each.

    The same in all processes, which must all call it with the same model, and share the work.
    """
    backbones = {name: part for name, part in model.teacher.items() if isinstance(part, VisionTransformer)}
    preprocess, num_workers = preprocess_of(config), config.num_workers
    # Blocks are compiled for the batches of training, not for these.
    with torch.compiler.set_stance("force_eager") if config.compile else nullcontext():
        return {
            name.removesuffix("backbone") + "knn": knn_accuracy(
                part, sets, preprocess, num_workers=num_workers, processes=processes
            )
            for name, part in backbones.items()
        }


def knn_accuracy(
    backbone: VisionTransformer,
    sets: LabelledSets,
    preprocess: Preprocess,
    *,
    num_workers: int,
    processes: Group = ALONE,
) -> float:
    """Return the share of test images, 0 to 1, whose class the 20 nearest training images vote for by class tokens.

    Each process computes the features of its share of both, and predicts its share of the test images. Batches are the
    same whatever the number of processes, and so is the result, bit for bit on CPUs.
    """
    model = FeatureModel(Source("model", "teacher", ""), backbone.embed_dim, preprocess, backbone)
    voting, tested = sets
    shares = processes.gather(_features(model, voting, num_workers, processes))
    rows = np.concatenate([share.rows for share in shares])
    order = np.argsort(rows)
    train_features = np.concatenate([share.features for share in shares])[order]
    _say_unreadable(voting, len(rows), [it for share in shares for it in share.unreadable], processes)
    names, train_classes = np.unique(voting.labels[rows[order]], return_inverse=True)

    own = _features(model, tested, num_workers, processes)
    num_right = 0
    if len(own.rows):
        k = min(K, len(train_classes))
        predictions = knn_predictions(train_features, train_classes, own.features, (k,))[k]
        num_right = int((names[predictions[:, 0]] == tested.labels[own.rows]).sum())
    results = processes.gather((num_right, len(own.rows), own.unreadable))
    num_tested = sum(number for _, number, _ in results)
    _say_unreadable(tested, num_tested, [it for *_, unreadable in results for it in unreadable], processes)
    return sum(right for right, *_ in results) / num_tested


class _Share(NamedTuple):
    """A process's share of some images."""

    features: Float32  # (n, D) of those that can be read
    rows: NDArray[np.int64]  # (n,)
    unreadable: list[tuple[int, str]]  # the others, and why


def _features(model: FeatureModel, images: LabelledImages, num_workers: int, processes: Group) -> _Share:
    """Return the features of this process's share of the images: every so many-th batch."""
    rows = np.arange(len(images.uris))
    batches = np.split(rows, rows[BATCH_SIZE::BATCH_SIZE])[processes.rank :: processes.count]
    own = np.concatenate([rows[:0], *batches])
    # None ends a batch, also where an image of it cannot be read.
    uris = [uri for batch in batches for uri in [*(images.uris[row] for row in batch), None]]
    features, indices, unreadable = [np.empty((0, model.dim), np.float32)], list[int](), list[tuple[int, str]]()
    with closing(extract(model, uris, batch_size=BATCH_SIZE, num_workers=max(1, num_workers))) as found:
        for part in found:
            features.append(part.features.numpy())
            indices += part.indices
            unreadable += [(int(own[index]), reason) for index, reason in part.failures]
    return _Share(np.concatenate(features), own[indices], unreadable)


def _say_unreadable(images: LabelledImages, num_read: int, unreadable: list[tuple[int, str]], processes: Group) -> None:
    """Warn of images that cannot be read; raise ToolkitError where none can."""
    if unreadable and processes.is_first:
        row, reason = min(unreadable)
        console.warn(f"k-NN: {len(unreadable):,} images left out, first {images.uris[row]} ({reason})")
    if not num_read:
        raise ToolkitError(f"no labelled image can be read, first {images.uris[0]}; check the --eval options")
