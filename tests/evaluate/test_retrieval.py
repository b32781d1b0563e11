"""Retrieval: average precision and recall against their definition, written out."""

import numpy as np
import pytest

from dinov2_toolkit.evaluate import retrieval
from dinov2_toolkit.evaluate.retrieval import measure_retrieval
from dinov2_toolkit.evaluate.task import UNKNOWN_CLASS, Task


def task(num_train: int, num_test: int) -> Task:
    random = np.random.default_rng(0)
    centres = random.standard_normal((4, 6))
    train_labels, test_labels = random.integers(0, 4, num_train), random.integers(0, 4, num_test)
    train, test = (
        (centres[labels] + random.standard_normal((len(labels), 6))).astype(np.float32)
        for labels in (train_labels, test_labels)
    )
    train_uris = [f"train {row}" for row in range(num_train)]
    return Task(train, train_labels, test, test_labels, train_uris, [f"test {row}" for row in range(num_test)])


def average_precision(hits: list[bool]) -> float:
    """The mean, over the hits, of the share of hits up to each."""
    shares = [sum(hits[: place + 1]) / (place + 1) for place, hit in enumerate(hits) if hit]
    return sum(shares) / len(shares) if shares else 0.0


def test_figures_equal_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", 50 * 7)  # blocks of 7 queries
    given = task(50, 30)
    precisions, hits_at = [], {1: 0, 5: 0, 10: 0}
    train = given.train / np.linalg.norm(given.train, axis=1, keepdims=True)
    for vector, label in zip(given.test, given.test_labels, strict=True):
        hits = [bool(given.train_labels[row] == label) for row in np.argsort(-(train @ vector), kind="stable")]
        precisions.append(average_precision(hits))
        for k in hits_at:
            hits_at[k] += any(hits[:k])
    found = {measured.metric: measured for measured in measure_retrieval(given, None)}
    assert found["map"].value == pytest.approx(np.mean(precisions))
    for k, count in hits_at.items():
        assert found[f"recall@{k}"].value == pytest.approx(count / 30)
    assert found["map"].interval[0] < found["map"].value < found["map"].interval[1]


def test_an_image_does_not_find_itself() -> None:
    given = task(40, 0)
    same = Task(given.train, given.train_labels, given.train, given.train_labels, given.train_uris, given.train_uris)
    precisions = []
    train = given.train / np.linalg.norm(given.train, axis=1, keepdims=True)
    for row, vector in enumerate(train):
        others = [other for other in np.argsort(-(train @ vector), kind="stable") if other != row]
        precisions.append(
            average_precision([bool(given.train_labels[other] == given.train_labels[row]) for other in others])
        )
    assert next(measure_retrieval(same, None)).value == pytest.approx(np.mean(precisions))


def test_a_query_with_nothing_to_find_counts_zero(capsys: pytest.CaptureFixture[str]) -> None:
    pool = np.eye(2, dtype=np.float32)
    given = Task(pool, np.array([0, 1]), pool, np.array([0, UNKNOWN_CLASS]), ["a", "b"], ["c", "d"])
    assert {each.metric: each.value for each in measure_retrieval(given, (1,))} == {"map": 0.5, "recall@1": 0.5}
    assert "1 of 2 queries have no image of their class to find" in capsys.readouterr().err


def test_the_ranks_looked_at_can_be_chosen() -> None:
    assert [each.metric for each in measure_retrieval(task(20, 5), (2, 30))] == ["map", "recall@2"]
