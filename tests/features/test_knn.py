"""k-NN classification against the protocol written out in numpy."""

import numpy as np
import pytest

from dinov2_toolkit.features import knn
from dinov2_toolkit.features.knn import knn_predictions


def brute_force(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int, max_k: int, topk: int) -> np.ndarray:
    """The protocol image by image: softmax over the max_k nearest, then the first k weights summed by class."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    test = test / np.linalg.norm(test, axis=1, keepdims=True)
    ranked = []
    for vector in test:
        similarities = train @ vector
        near = np.argsort(-similarities, kind="stable")[:max_k]
        weights = np.exp(similarities[near] / 0.07)
        weights /= weights.sum()
        votes = np.zeros(labels.max() + 1)
        for row, weight in zip(near[:k], weights[:k], strict=True):
            votes[labels[row]] += weight
        order = np.argsort(-votes, kind="stable")[:topk]
        ranked.append([number if votes[number] > 0 else -1 for number in order])
    return np.array(ranked)


def test_predictions_equal_a_brute_force_of_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "BLOCK_VOTES", 8 * 7)  # blocks of 7 test images
    random = np.random.default_rng(0)
    labels = random.integers(0, 8, 300)
    centres = random.standard_normal((8, 16)) * 0.6
    train = (centres[labels] + random.standard_normal((300, 16))).astype(np.float32)
    test = (centres[random.integers(0, 8, 100)] + random.standard_normal((100, 16))).astype(np.float32)
    found = knn_predictions(train, labels, test, (1, 5, 20, 300), topk=5)
    for k, predictions in found.items():
        np.testing.assert_array_equal(predictions, brute_force(train, labels, test, k, 300, 5))


def test_the_length_of_a_vector_does_not_count() -> None:
    train = np.array([[100.0, 1.0], [0.1, 0.1]], dtype=np.float32)
    test = np.array([[3.0, 2.9]], dtype=np.float32)
    assert knn_predictions(train, np.array([0, 1]), test, (1,))[1].tolist() == [[1]]


def test_near_votes_outweigh_many_far_ones() -> None:
    train = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]], dtype=np.float32)
    test = np.array([[1.0, 0.05]], dtype=np.float32)
    assert knn_predictions(train, np.array([1, 0, 0]), test, (3,))[3].tolist() == [[1]]


def test_equal_votes_go_to_the_lowest_class() -> None:
    train = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    test = np.array([[1.0, 0.0]], dtype=np.float32)
    assert knn_predictions(train, np.array([2, 1, 0]), test, (2,), topk=3)[2].tolist() == [[1, 2, -1]]


def test_equally_near_neighbours_count_in_training_order() -> None:
    train = np.ones((50, 4), dtype=np.float32)
    labels = np.array([3, 1, 1] + [0] * 47)
    found = knn_predictions(train, labels, train[:1], (1, 2, 3))
    assert {k: predictions.tolist() for k, predictions in found.items()} == {1: [[3]], 2: [[1]], 3: [[1]]}


def test_a_class_without_a_vote_is_no_prediction() -> None:
    train = np.eye(6, dtype=np.float32)
    found = knn_predictions(train, np.arange(6), train[4:5], (1,), topk=5)
    assert found[1].tolist() == [[4, -1, -1, -1, -1]]


@pytest.mark.parametrize("ks", [(4,), (0, 2)])
def test_k_beyond_the_training_set_is_refused(ks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must lie in 1..3"):
        knn_predictions(np.eye(3, dtype=np.float32), np.arange(3), np.eye(3, dtype=np.float32), ks)
