"""The k-NN protocol: few images a class, drawn again and again, and what k it allows."""

import numpy as np
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.evaluate.knn import NUM_DRAWS, draw_per_class, measure_knn
from dinov2_toolkit.evaluate.task import Task
from dinov2_toolkit.features.knn import knn_predictions


def task(seed: int = 0) -> Task:
    random = np.random.default_rng(0)
    centres = random.standard_normal((3, 8))
    train_labels, test_labels = np.repeat([0, 1, 2], [40, 20, 5]), np.arange(60) % 3
    train, test = (
        (centres[labels] + random.standard_normal((len(labels), 8))).astype(np.float32)
        for labels in (train_labels, test_labels)
    )
    return Task(train, train_labels, test, test_labels, [], [], seed=seed)


def test_a_draw_holds_so_many_of_each_class_and_all_of_smaller_ones() -> None:
    labels = task().train_labels
    rows = draw_per_class(labels, 10, seed=0, draw=0)
    assert np.bincount(labels[rows]).tolist() == [10, 10, 5]
    assert (np.diff(rows) > 0).all()
    assert not np.array_equal(rows, draw_per_class(labels, 10, seed=0, draw=1))
    np.testing.assert_array_equal(rows, draw_per_class(labels, 10, seed=0, draw=0))


def test_the_value_is_the_mean_and_the_spread_the_deviation_over_the_draws() -> None:
    few = task()
    mean, spread = measure_knn(few, (1,), 4)
    accuracies = []
    for draw in range(NUM_DRAWS):
        rows = draw_per_class(few.train_labels, 4, 0, draw)
        predictions = knn_predictions(few.train[rows], few.train_labels[rows], few.test, (1,))[1]
        accuracies.append(np.mean(predictions[:, 0] == few.test_labels))
    assert (mean.metric, spread.metric) == ("top1", "top1_std")
    assert mean.value == pytest.approx(np.mean(accuracies))
    assert spread.value == pytest.approx(np.std(accuracies, ddof=1))
    assert mean.interval[0] < mean.value < mean.interval[1]
    assert mean.num_train == 12
    assert mean.parameters["per_class"] == 4


def test_all_of_each_class_is_what_no_limit_gives() -> None:
    mean, spread = measure_knn(task(), (5,), 40)
    whole, *_ = measure_knn(task(), (5,), None)
    assert mean.value == pytest.approx(whole.value)
    assert spread.value == 0


def test_a_k_above_the_few_that_vote_is_an_error() -> None:
    with pytest.raises(ToolkitError, match="k 20 is above the 12 training images"):
        list(measure_knn(task(), (1, 20), 4))
