"""What a self-join compares: runs of rows with rows, in batches after each of which it can be continued."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...store.vectors import Int64


@dataclass(frozen=True)
class Task:
    """Rows to be compared with a run of rows; with those after them where both are the same run."""

    left: Int64 | slice
    right: slice


Batch = Callable[[], Iterable[Task]]
