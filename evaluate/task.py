"""What a classification protocol is given, and what several of them do with it.

N training images, M test images, E numbers a feature, D numbers a class token, C classes.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import ToolkitError
from ..features.grouping import group_by
from ..store.vectors import Float32, Int64

MAX_TOPK = 5  # top-5 is measured too where there are more classes than that
UNKNOWN_CLASS = -2  # the label of a test image whose class no training image has; -1 is no prediction


@dataclass(frozen=True)
class Task:
    """Two splits of images, by their features and classes."""

    train: Float32  # (N, E): the class tokens of the last blocks, then, if E > blocks D, the mean patch token
    train_labels: Int64  # (N,) classes, 0..C-1
    test: Float32  # (M, E)
    test_labels: Int64  # (M,) classes, or UNKNOWN_CLASS
    train_uris: list[str]  # (N,)
    test_uris: list[str]  # (M,)
    blocks: int = 1
    has_mean: bool = False
    seed: int = 0
    class_names: tuple[str, ...] = ()  # (C,)

    @property
    def num_classes(self) -> int:
        """Return C."""
        return int(self.train_labels.max()) + 1

    @property
    def topk(self) -> int:
        """Return how many predictions an image are worth counting."""
        return MAX_TOPK if self.num_classes > MAX_TOPK else 1

    @property
    def embed_dim(self) -> int:
        """Return D."""
        return int(self.train.shape[1]) // (self.blocks + self.has_mean)

    def class_tokens(self) -> tuple[Float32, Float32]:
        """Return the last block's class tokens of the training and the test images, (N, D) and (M, D)."""
        last = slice((self.blocks - 1) * self.embed_dim, self.blocks * self.embed_dim)
        return np.ascontiguousarray(self.train[:, last]), np.ascontiguousarray(self.test[:, last])


def hold_out(labels: Int64, every: int, seed: int, what: str) -> tuple[Int64, Int64]:
    """Split images by row: those to train on, and one in `every` that chooses among what was trained.

    The order is random within classes, so that the classes keep their shares.
    Raises ToolkitError when there are too few for `what`.
    """
    if len(labels) < every:
        given = f"{len(labels)} labelled training images are too few for {what} on one image in {every}"
        raise ToolkitError(f"{given}; give at least {every}, or use --method knn")
    shuffled = np.random.default_rng([seed, 1]).permutation(len(labels))
    by_class = shuffled[group_by(labels[shuffled], int(labels.max()) + 1).rows]
    held_out = by_class[every // 2 :: every]
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def most_likely(logits: Tensor, topk: int) -> Int64:
    """Return the classes with the largest of logits (M, C), (M, topk), best first; of equals the lowest class."""
    order: Int64 = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :topk]
    return order
