"""The graph of similarities above a threshold, as far as a join knows it.

N vectors, E pairs.
"""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...store.vectors import Bools, Int64

SAVE_S = 60.0  # chosen: how often it is kept how far a join is


@dataclass
class Graph:
    """Components and degrees. A row points to a smaller row of its component, the smallest to itself.

    Threads may enter pairs at the same time; the order in which they come does not show.
    """

    weights: Int64  # (N,) for how many images a row stands
    enough: int  # a row with so many others above the threshold needs no more
    parent: Int64 = field(init=False)  # (N,)
    degree: Int64 = field(init=False)  # (N,) weight of the others above the threshold

    def __post_init__(self) -> None:
        self.parent = np.arange(len(self.weights))
        self.degree = self.weights - 1
        self._lock = threading.Lock()
        self._saved = time.monotonic()

    def add(self, left: Int64, right: Int64) -> None:
        """Enter pairs of rows above the threshold (E,), (E,), each of them once."""
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

        These have enough neighbours and are all of one component.
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

    def save(self, path: Path, done: int, *, at_once: bool = False) -> None:
        """Keep the graph on disk, and that `done` parts of the join are in it, if that was long ago."""
        if time.monotonic() - self._saved < SAVE_S and not at_once:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.save(file, np.stack([np.append(self.parent, done), np.append(self.degree, 0)]))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self._saved = time.monotonic()

    def load(self, path: Path) -> int:
        """Take up a graph that was kept, and return how many parts of the join are in it; 0 if none was."""
        if not path.exists():
            return 0
        kept = np.load(path)
        self.parent, self.degree = kept[0, :-1].copy(), kept[1, :-1].copy()
        return int(kept[0, -1])
