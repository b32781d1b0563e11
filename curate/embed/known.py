"""The rows of an earlier manifest by the bytes of their images: what need not be decoded again."""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa

UNMATCHED = "unmatched.arrow"  # image_id and row of what an earlier manifest has beyond the listing, by image_id


@dataclass(frozen=True)
class KnownRows:
    """Finds the earlier row of an image_id; can be pickled, and then opens the file anew."""

    path: Path

    def __call__(self, image_id: str) -> int | None:
        """Return the row, None where there is none."""
        ids, rows = _columns(self.path)
        place = bisect_left(ids, image_id, key=lambda each: each.as_py())
        row: int | None = rows[place].as_py() if place < len(ids) and ids[place].as_py() == image_id else None
        return row


@cache  # in a process that reads for one run
def _columns(path: Path) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    ids, rows, _ = pa.ipc.open_file(pa.memory_map(str(path))).read_all().columns
    return ids, rows
