"""The graph of similarities above a threshold, as far as a join has found it.

N vectors, E pairs.
"""

import threading
from dataclasses import dataclass, field

import numpy as np

from ...store.vectors import Bools, Int64


@dataclass
class Graph:
    """Components and degrees. A row points to a smaller row of its component, the smallest to itself.

    Threads may add pairs at the same time; their order does not change the result.
    """

    weights: Int64  # (N,) how many images a row stands for
    enough: int  # a row with so many others above the threshold needs no more
    parent: Int64 = field(init=False)  # (N,)
    degree: Int64 = field(init=False)  # (N,) weight of the others above the threshold

    def __post_init__(self) -> None:
        self.parent = np.arange(len(self.weights))
        self.degree = self.weights - 1
        self._lock = threading.Lock()

    def add(self, left: Int64, right: Int64) -> None:
        """Add pairs of rows above the threshold (E,), (E,), each of them once."""
        with self._lock:
            np.add.at(self.degree, left, self.weights[right])
            np.add.at(self.degree, right, self.weights[left])
            while len(left):
                one, other = self._roots(left), self._roots(right)
                between = one != other
                left, right, one, other = left[between], right[between], one[between], other[between]
                np.minimum.at(self.parent, np.maximum(one, other), np.minimum(one, other))

    def _roots(self, rows: Int64) -> Int64:
        root = self.parent[rows]
        while not np.array_equal(up := self.parent[root], root):
            root = up
        self.parent[rows] = root
        return root

    def closed(self, left: Int64, right: Int64) -> tuple[Bools, Bools]:
        """Tell which rows of `left` and of `right` need not be compared with each other.

        Those have enough neighbours and are all of one component.
        """
        is_left, is_right = self.degree[left] >= self.enough, self.degree[right] >= self.enough
        if not (is_left.any() and is_right.any()):
            return np.zeros(len(left), bool), np.zeros(len(right), bool)
        with self._lock:
            left_roots, right_roots = self._roots(left), self._roots(right)
        roots, counts = np.unique(left_roots[is_left], return_counts=True)
        most = roots[counts.argmax()]
        return is_left & (left_roots == most), is_right & (right_roots == most)

    def components(self) -> Int64:
        """Return the smallest row of every row's component, (N,)."""
        with self._lock:
            while not np.array_equal(up := self.parent[self.parent], self.parent):
                self.parent = up
            return self.parent
