"""The exact self-join by bounds: cells that cannot hold a neighbour above the threshold are not visited.

N rows, D numbers a vector, K cells.
"""

from collections.abc import Callable, Iterable
from .cells import Cells
from ..store.vectors import Vectors
from .exact_search import SearchSettings
def bounded_batches(by_cell: Vectors, cells: Cells, threshold: float, search: SearchSettings) -> list[Callable[[], Iterable[object]]] | None:
    return None
