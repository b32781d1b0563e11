"""Recall by class and confusions, against counting by hand."""

import numpy as np
import pytest

from dinov2_toolkit.evaluate import by_class as module
from dinov2_toolkit.evaluate.by_class import by_class
from dinov2_toolkit.evaluate.knn import measure_knn
from dinov2_toolkit.evaluate.scores import Measurement
from dinov2_toolkit.evaluate.task import UNKNOWN_CLASS, Task

NAMES = ("cat", "dog", "emu")


def task(test_labels: list[int], train_labels: list[int]) -> Task:
    nothing = np.zeros((0, 1), np.float32)
    return Task(nothing, np.array(train_labels), nothing, np.array(test_labels), [], [], class_names=NAMES)


def plain(measured: list[Measurement]) -> list[tuple[str, str | None, str | None, float, int, int]]:
    return [
        (each.metric, each.true_class, each.predicted_class, each.value, each.num_train, each.num_test)
        for each in measured
    ]


def test_recall_and_confusions_are_shares_of_the_test_images_of_a_class() -> None:
    of = task([0, 0, 0, 0, 1, 1, UNKNOWN_CLASS], [0, 0, 1, 2])
    measured = list(by_class({"k": 3}, np.array([0, 1, 1, 2, 1, 1, 0]), of))
    assert plain(measured) == [
        ("recall", "cat", None, 0.25, 2, 4),
        ("recall", "dog", None, 1.0, 1, 2),
        ("confusion", "cat", "dog", 0.5, 2, 4),
        ("confusion", "cat", "emu", 0.25, 2, 4),
    ]
    assert all(each.interval[0] <= each.value <= each.interval[1] for each in measured)
    assert measured[0].parameters == {"k": 3}


def test_of_many_classes_only_the_most_frequent_confusions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MANY_CLASSES", 2)
    monkeypatch.setattr(module, "MAX_CONFUSIONS", 2)
    of = task([0, 0, 1, 1, 2, 2], [0, 1, 2])
    measured = list(by_class({}, np.array([1, 2, 0, 0, 1, 1]), of))
    confusions = [row[1:4] for row in plain(measured) if row[0] == "confusion"]
    assert confusions == [("dog", "cat", 1.0), ("emu", "dog", 1.0)]


def test_the_classes_are_those_of_the_best_number_of_neighbours() -> None:
    train = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
    of = Task(train, np.array([0, 0, 1]), train[2:], np.array([1]), [], [], class_names=("a", "b"))
    measured = list(measure_knn(of, (3, 1), None))
    assert [(each.metric, each.value) for each in measured] == [("top1", 1.0), ("top1", 1.0), ("recall", 1.0)]
    assert measured[-1].parameters["k"] == 1 and measured[-1].true_class == "b"
