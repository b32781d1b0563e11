"""Which image of a group is kept: every image gets a rank, the preferred one the lowest.

N images.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ... import console
from ...errors import ToolkitError, nearest
from ...store.manifest import Manifest
from ...store.vectors import Int64
from ..inputs import EmbeddedImages


@dataclass(frozen=True)
class Keep:
    """What --keep asks for."""

    text: str  # as it was given
    column: str | None = None  # whose value decides; None: the size in pixels, or for `first` the row
    values: tuple[str, ...] = ()  # of the column, best first; empty: the largest is best


def parse_keep(text: str, manifest: Manifest) -> Keep:
    """Return what `largest`, `first`, `column:NAME` or `column:NAME=A,B` asks for.

    Raises ToolkitError when it is none of these, or the manifest has no such column.
    """
    if text in ("largest", "first"):
        return Keep(text)
    name = text.removeprefix("column:")
    if name == text or not name:
        raise ToolkitError(
            f"--keep {text} is none of largest, first, column:NAME and column:NAME=A,B; give one of these"
        )
    if name in manifest.names():
        return Keep(text, name)
    name, _, listed = name.partition("=")
    if name not in manifest.names():
        names = manifest.names()
        what = f"--keep {text}: {manifest.path} has no such column{nearest(name, names)}"
        raise ToolkitError(f"{what}; it has {', '.join(names)}")
    values = tuple(value.strip() for value in listed.split(","))
    if "" in values or len(set(values)) < len(values):
        raise ToolkitError(f"--keep {text}: name every value of {name} once, the best first, as in {name}=curated,web")
    return Keep(text, name, values)


def preference(keep: Keep, images: EmbeddedImages) -> Int64:
    """Return the rank of every image, (N,); 0 = most preferred.

    Unknown sizes count as the smallest. Of a column's listed values the first is best, then come values that are not
    listed, then null; images with the same value are ranked by size. Ties are broken by (image_id, uri, row).
    Raises ToolkitError when the column cannot be compared.
    """
    if keep.text == "first":
        return np.arange(len(images))
    keys: dict[str, pa.ChunkedArray | Int64] = {}
    if keep.column is not None:
        column = images.column(keep.column)
        keys["value"] = _scores(keep, column) if keep.values else column
    if keep.column is None or keep.values:
        width, height = (pc.cast(images.image_column(name), pa.int64()) for name in ("width", "height"))
        keys["pixels"] = pc.fill_null(pc.multiply(width, height), 0)
    try:
        order = pc.sort_indices(
            pa.table({**keys, "order": images.order}),
            sort_keys=[*((name, "descending") for name in keys), ("order", "ascending")],
        ).to_numpy()
    except (pa.ArrowTypeError, pa.ArrowNotImplementedError):
        raise ToolkitError(
            f"--keep {keep.text}: a column of {column.type} has no largest value; name another"
        ) from None
    return np.argsort(order)


def _scores(keep: Keep, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return how good every value is: 1 and more for the listed ones, 0 for others, -1 for null."""
    try:
        values = pc.cast(column, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ToolkitError(f"--keep {keep.text}: a column of {column.type} cannot be listed; name another") from None
    best_last = pa.array(keep.values[::-1])
    if missing := best_last.filter(pc.invert(pc.is_in(best_last, value_set=values.unique()))).to_pylist():
        console.warn(f"--keep {keep.text}: no image has {keep.column} {', '.join(reversed(missing))}")
    scores = pc.add(pc.fill_null(pc.index_in(values, value_set=best_last), -1), 1)
    return pc.if_else(pc.is_null(values), -1, scores)


def preferred(labels: Int64, rank: Int64) -> Int64:
    """Return for every image the one of the lowest rank with the same label, (N,).

    Args:
        labels: (N,) from 0 to N - 1.
        rank: (N,) no two the same.
    """
    best = np.empty(len(labels), np.int64)
    worst_first = np.argsort(rank)[::-1]
    best[labels[worst_first]] = worst_first  # of equal labels the last one counts
    return best[labels]
