"""How well each class is recognised, and which other classes its images are taken for.

M test images, C classes.
"""

from collections.abc import Iterator

import numpy as np

from ..store.vectors import Int64
from .scores import Measurement, bootstrap_interval
from .task import Task

MANY_CLASSES = 50  # of more, only the most frequent confusions are kept
MAX_CONFUSIONS = 500


def by_class(parameters: dict[str, object], predictions: Int64, task: Task) -> Iterator[Measurement]:
    """Yield `recall` of each class that has test images, and `confusion` of pairs of classes, by predictions (M,).

    A confusion is the share of the test images of `true_class` that are taken for `predicted_class`. Pairs that do not
    occur are left out; of more than MANY_CLASSES classes all but the MAX_CONFUSIONS pairs with the most images, of
    equals those that stand first in the alphabet.
    """
    names, labels = task.class_names or tuple(map(str, range(task.num_classes))), task.test_labels
    num_test = np.bincount(labels[labels >= 0], minlength=task.num_classes)
    num_train = np.bincount(task.train_labels, minlength=task.num_classes)

    def share(metric: str, of: int, count: int, taken_for: str | None = None) -> Measurement:
        correct = np.arange(num_test[of]) < count
        interval = bootstrap_interval(correct, task.seed)
        sizes = int(num_train[of]), int(num_test[of])
        return Measurement(parameters, metric, float(correct.mean()), interval, *sizes, names[of], taken_for)

    hits = np.bincount(labels[predictions == labels], minlength=task.num_classes)
    for number in np.flatnonzero(num_test).tolist():
        yield share("recall", number, int(hits[number]))
    wrong = (predictions != labels) & (labels >= 0) & (predictions >= 0)
    pairs, counts = np.unique(np.stack([labels[wrong], predictions[wrong]]), axis=1, return_counts=True)
    if task.num_classes > MANY_CLASSES:
        most = np.sort(np.argsort(-counts, kind="stable")[:MAX_CONFUSIONS])
        pairs, counts = pairs[:, most], counts[most]
    for (true, predicted), count in zip(pairs.T.tolist(), counts.tolist(), strict=True):
        yield share("confusion", true, count, names[predicted])
