"""Rows grouped by an integer label: one stable sort, and where each label's rows begin.

N rows, K labels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..store.vectors import Int64


@dataclass(frozen=True)
class Groups:
    """The rows of every label."""

    rows: Int64  # (N,) row numbers, by label; within a label by the keys given, then rising
    offsets: Int64  # (K + 1,) the rows of label l are rows[offsets[l]:offsets[l + 1]]

    @property
    def sizes(self) -> Int64:
        """Return how many rows every label has, (K,)."""
        return np.diff(self.offsets)

    def of(self, label: int) -> Int64:
        """Return the rows of one label."""
        return self.rows[self.offsets[label] : self.offsets[label + 1]]

    def ranks(self) -> Int64:
        """Return the place of every row among those of its label, (N,), counted from 0."""
        ranks = np.empty(len(self.rows), np.int64)
        ranks[self.rows] = np.arange(len(self.rows)) - np.repeat(self.offsets[:-1], self.sizes)
        return ranks


def group_by(labels: npt.NDArray[np.integer], num_labels: int, *keys: npt.NDArray[np.generic]) -> Groups:
    """Group rows by label.

    Args:
        labels: (N,) integers from 0 to `num_labels` - 1.
        keys: (N,) each; rows of one label are ordered by the first, ties by the second and so on, then by row.
    """
    rows = np.lexsort((*reversed(keys), labels)) if keys else np.argsort(labels, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=num_labels))])
    return Groups(rows, offsets)
