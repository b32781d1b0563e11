"""The k-NN protocol: the nearest training images vote, of all or of a few random ones of each class.

N training images, M test images, R draws.
"""

from collections.abc import Iterator

import numpy as np

from .. import console
from ..errors import ToolkitError
from ..features.grouping import group_by
from ..features.knn import TEMPERATURE, knn_predictions
from ..store.vectors import Int64
from .by_class import by_class
from .scores import Correct, Measurement, accuracies, resampled_interval
from .task import Task

DEFAULT_KS = (10, 20, 100, 200)
NUM_DRAWS = 10  # chosen: of a few images a class


def measure_knn(task: Task, ks: tuple[int, ...] | None, per_class: int | None) -> Iterator[Measurement]:
    """Yield the accuracy of the votes of the k nearest training images, for each k.

    For the most accurate k, of equals the smallest, also what `by_class` yields.
    With `per_class`, only so many images of each class vote, drawn NUM_DRAWS times: the value is the mean over the
    draws, its interval covers images and draws, and `top1_std` is the standard deviation over the draws.
    Raises ToolkitError when a k is above the number of training images that vote.
    Source: the k-NN evaluation of DINOv2, dinov2/eval/knn.py.
    """
    train, test = task.class_tokens()
    parameters: dict[str, object] = {"temperature": TEMPERATURE, "similarity": "cosine"}
    if per_class is None:
        ks = usable_ks(ks, len(train))
        progress = "searching neighbours"
        predictions = knn_predictions(train, task.train_labels, test, ks, topk=task.topk, progress=progress)
        for k in ks:
            yield from accuracies({"k": k, **parameters}, predictions[k], task.test_labels, len(train), task.seed)
        best = max(ks, key=lambda k: (int((predictions[k][:, 0] == task.test_labels).sum()), -k))
        yield from by_class({"k": best, **parameters}, predictions[best][:, 0], task)
        return

    drawn = [draw_per_class(task.train_labels, per_class, task.seed, draw) for draw in range(NUM_DRAWS)]
    num_train = len(drawn[0])
    ks = usable_ks(ks, num_train)
    parameters |= {"per_class": per_class, "draws": NUM_DRAWS}
    correct: dict[int, list[Correct]] = {k: [] for k in ks}
    for rows in drawn:
        for k, of_k in knn_predictions(train[rows], task.train_labels[rows], test, ks).items():
            correct[k].append(of_k[:, 0] == task.test_labels)
    for k in ks:
        yield from _over_draws({"k": k, **parameters}, np.stack(correct[k]), num_train, task.seed)


def draw_per_class(labels: Int64, per_class: int, seed: int, draw: int) -> Int64:
    """Return the rows of `per_class` random images of each class, all where it has fewer, in rising order."""
    shuffled = np.random.default_rng([seed, 3, draw]).permutation(len(labels))
    ranks = group_by(labels[shuffled], int(labels.max()) + 1).ranks()
    return np.sort(shuffled[ranks < per_class])


def _over_draws(parameters: dict[str, object], correct: Correct, num_train: int, seed: int) -> Iterator[Measurement]:
    """Yield mean and standard deviation over the draws of what is correct, (R, M)."""
    num_draws, num_test = correct.shape
    by_draw = correct.mean(axis=1)

    def resampled_mean(random: np.random.Generator) -> float:
        draws, images = random.integers(num_draws, size=num_draws), random.integers(num_test, size=num_test)
        return float(correct[draws].mean(axis=0)[images].mean())

    interval = resampled_interval(resampled_mean, seed)
    yield Measurement(parameters, "top1", float(by_draw.mean()), interval, num_train, num_test)
    interval = resampled_interval(lambda random: float(random.choice(by_draw, num_draws).std(ddof=1)), seed)
    yield Measurement(parameters, "top1_std", float(by_draw.std(ddof=1)), interval, num_train, num_test)


def usable_ks(ks: tuple[int, ...] | None, num_train: int) -> tuple[int, ...]:
    """Return `ks`; None: those of DEFAULT_KS that a training set of this size allows, at least its size.

    Raises ToolkitError when one of them is above it.
    """
    if ks is None:
        usable = tuple(k for k in DEFAULT_KS if k <= num_train)
        if left_out := [str(k) for k in DEFAULT_KS if k > num_train]:
            console.say(f"k {', '.join(left_out)} left out: there are {num_train:,} training images")
        return usable or (num_train,)
    if above := [str(k) for k in ks if k > num_train]:
        raise ToolkitError(f"k {', '.join(above)} is above the {num_train:,} training images; choose a lower --k")
    return ks
