"""k-nearest-neighbour classification of frozen features: what probes report and runs monitor.

N training images, M test images, D numbers a feature, C classes.
"""

import numpy as np

from .. import console
from ..store.manifest import Source
from ..store.vectors import Float32, Float64, Int64, Vectors
from .search.neighbors import SearchSettings, nearest

TEMPERATURE = 0.07
BLOCK_ROWS = 1_024  # test images searched at a time
BLOCK_VOTES = 4_000_000  # votes (image by class) counted at a time: 32 MB
EXACT = SearchSettings(memory=256 << 20, recall=1.0)  # chosen: larger blocks are no faster


def knn_predictions(
    train_features: Float32,
    train_labels: Int64,
    test_features: Float32,
    ks: tuple[int, ...],
    *,
    temperature: float = TEMPERATURE,
    topk: int = 1,
    progress: str | None = None,
) -> dict[int, Int64]:
    """Return, for each k, the classes that the k nearest training images vote for, (M, topk), best first.

    Features (N, D) and (M, D) of any length are compared by cosine, exactly; labels (N,) are 0..C-1; every k is in
    1..N. The similarities of the max(ks) nearest are put through one softmax at `temperature`; for each k, the first k
    weights are summed by class. Ties go to the lowest class, among neighbours to the first training row. A class
    without a vote is no prediction: its place holds -1. `progress` is what the progress line says, None for no line.

    Source: the k-NN evaluation of DINOv2, dinov2/eval/knn.py. There, classes without a vote may stand among the
    five best; here they never count.
    """
    max_k = max(ks)
    if not 1 <= min(ks) <= max_k <= len(train_labels):
        raise ValueError(f"ks {ks} must lie in 1..{len(train_labels)}, the number of training images")
    num_classes = int(train_labels.max()) + 1
    train, test = in_memory(train_features), in_memory(test_features)
    block_rows = max(1, min(BLOCK_ROWS, BLOCK_VOTES // num_classes))
    predictions: dict[int, list[Int64]] = {k: [] for k in ks}
    with console.progress(progress, len(test), "images") as advance:
        for start in range(0, len(test), block_rows):
            block = test.take(test.rows[start : start + block_rows])
            found = nearest(block, train, max_k, order=train.rows, search=EXACT, progress=None)
            labels = train_labels[found.indices]  # (B, max_k)
            weights = np.exp((found.similarities - found.similarities[:, :1]) / temperature)
            weights /= weights.sum(axis=1, keepdims=True)
            for k in ks:
                predictions[k].append(_most_voted(labels[:, :k], weights[:, :k], num_classes, topk))
            advance(len(block))
    return {k: np.concatenate(blocks) for k, blocks in predictions.items()}


def in_memory(features: Float32) -> Vectors:
    """Return features (N, D) as what a neighbour search takes."""
    return Vectors(features, np.arange(len(features)), Source("features", "", ""))


def _most_voted(labels: Int64, weights: Float64, num_classes: int, topk: int) -> Int64:
    """Return the classes with the largest sums of weights, (B, topk), of labels and weights (B, k)."""
    places = np.arange(len(labels))[:, None] * num_classes + labels
    votes = np.bincount(places.ravel(), weights.ravel(), len(labels) * num_classes).reshape(-1, num_classes)
    order = np.argsort(-votes, axis=1, kind="stable")[:, :topk]
    return np.where(np.take_along_axis(votes, order, axis=1) > 0, order, -1)
