"""k-nearest-neighbour classification of frozen features: what probes report, and what a run watches.

N training images, M test images, D numbers a feature, C classes.
"""

import numpy as np
import torch

from ..store.vectors import Float32, Int64, unit_length

TEMPERATURE = 0.07
BLOCK_ELEMENTS = 16_000_000  # similarities held at once: 64 MB


def knn_guesses(
    train_features: Float32,
    train_labels: Int64,
    test_features: Float32,
    ks: tuple[int, ...],
    *,
    temperature: float = TEMPERATURE,
    num_guesses: int = 1,
) -> dict[int, Int64]:
    """Return, for each k, the classes that the k nearest training images vote for, (M, num_guesses), best first.

    Features (N, D) and (M, D) of any length are compared by cosine; labels (N,) are 0..C-1; every k is in 1..N.
    The similarities of the max(ks) nearest are put through one softmax at `temperature`; for each k, the first k
    weights are summed by class. Ties go to the lowest class, among neighbours to the first training row. A class
    without a vote is no guess: its place holds -1.

    Source: the k-NN evaluation of DINOv2, dinov2/eval/knn.py. There, classes without a vote may stand among the
    five best; here they never count.
    """
    max_k = max(ks)
    if not 1 <= min(ks) <= max_k <= len(train_labels):
        raise ValueError(f"ks {ks} must lie in 1..{len(train_labels)}, the number of training images")
    num_classes = int(train_labels.max()) + 1
    train = torch.from_numpy(unit_length(train_features))
    labels = torch.from_numpy(train_labels)
    guesses: dict[int, list[Int64]] = {k: [] for k in ks}
    block_rows = max(1, BLOCK_ELEMENTS // len(train_labels))
    for start in range(0, len(test_features), block_rows):
        test = torch.from_numpy(unit_length(test_features[start : start + block_rows]))
        similarities, rows = _largest(test @ train.T, max_k)
        weights = torch.softmax(similarities / temperature, dim=1)
        for k in ks:
            votes = torch.zeros(len(test), num_classes).scatter_add_(1, labels[rows[:, :k]], weights[:, :k])
            guesses[k].append(_ranked(votes.numpy(), num_guesses))
    return {k: np.concatenate(blocks) for k, blocks in guesses.items()}


def _largest(similarities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row of (B, N) and their columns, both (B, k), in descending order.

    Equal values stand in the order of their columns, also where only some of them are among the k.
    """
    values, columns = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    if values.shape[1] > k:  # topk takes any of the values that tie at its end
        for row in torch.nonzero(values[:, k - 1] == values[:, k]).flatten().tolist():
            columns[row, :k] = similarities[row].argsort(descending=True, stable=True)[:k]
    columns = columns[:, :k].sort(dim=1).values
    values = similarities.gather(1, columns)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), columns.gather(1, order)


def _ranked(votes: Float32, num_guesses: int) -> Int64:
    order = np.argsort(-votes, axis=1, kind="stable")[:, :num_guesses]
    return np.where(np.take_along_axis(votes, order, axis=1) > 0, order, -1)
