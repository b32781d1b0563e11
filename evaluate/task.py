"""What a classification protocol is given: features and classes of training and test images.

N training images, M test images, E numbers a feature, D numbers a class token.
"""

from dataclasses import dataclass

import numpy as np

from ..store.vectors import Float32, Int64

MAX_GUESSES = 5  # the five best guesses count too where there are more classes than that
NO_SUCH_CLASS = -2  # the truth of a test image whose class no training image has; -1 is a guess that is none


@dataclass(frozen=True)
class Task:
    """Two sets of images, by their features and classes."""

    train: Float32  # (N, E): the class tokens of the last blocks, then, if E > blocks D, the mean patch token
    targets: Int64  # (N,) classes, 0..C-1
    test: Float32  # (M, E)
    truth: Int64  # (M,) classes, or NO_SUCH_CLASS
    train_names: list[str]  # (N,) uris
    test_names: list[str]  # (M,)
    blocks: int = 1
    has_mean: bool = False
    seed: int = 0

    @property
    def num_classes(self) -> int:
        """Return C."""
        return int(self.targets.max()) + 1

    @property
    def num_guesses(self) -> int:
        """Return how many guesses are worth counting."""
        return MAX_GUESSES if self.num_classes > MAX_GUESSES else 1

    @property
    def embed_dim(self) -> int:
        """Return D."""
        return int(self.train.shape[1]) // (self.blocks + self.has_mean)

    @property
    def train_tokens(self) -> Float32:
        """Return the last block's class tokens of the training images, (N, D)."""
        return np.ascontiguousarray(self.train[:, self._last])

    @property
    def test_tokens(self) -> Float32:
        """Return the last block's class tokens of the test images, (M, D)."""
        return np.ascontiguousarray(self.test[:, self._last])

    @property
    def _last(self) -> slice:
        return slice((self.blocks - 1) * self.embed_dim, self.blocks * self.embed_dim)
