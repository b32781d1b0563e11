"""Rows that an `embed` takes over from an earlier manifest of the same model and settings, without reading the images.

An image is known again by uri, size and time stamp, as they were when it was listed; and once it is read, by its bytes.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ...store.cache import cache_folder, cache_key
from ...store.manifest import Manifest, Source
from ...store.tables import connect
from .listing import Listing

NO_ROW = -1
OPEN_GROUPS = 2  # chosen: row groups of the earlier manifest that are kept decoded

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Known:
    """Which entries of a listing an earlier manifest has."""

    rows: Int64  # (N,) rows of the earlier manifest, NO_ROW where it has none
    num_listed: int  # rows of it whose uris are still listed, changed or not


def files_path(manifest: Source) -> Path:
    """Return where the sizes and time stamps of a manifest's files are kept, (2, rows) int64: in the cache."""
    return cache_folder() / f"{cache_key(manifest)}.files.npy"


def find_known(listing: Path, num_entries: int, earlier: Manifest) -> Known:
    """Return which entries of a listing are in an earlier manifest, unchanged by uri, size and time stamp.

    Where the cache has lost those, none is, and all images are read to be known by their bytes.
    """
    known = Known(np.full(num_entries, NO_ROW, np.int64), 0)
    path = files_path(earlier.source("earlier"))
    files = np.load(path, mmap_mode="r") if path.exists() else np.full((2, earlier.num_rows), -1, np.int64)
    rows = {"row": np.arange(earlier.num_rows), "size": files[0], "mtime_ns": files[1]}
    with connect() as database:
        database.register("listed", Listing(listing).numbered(["uri", "size", "mtime_ns"]))
        database.register("files", pa.table(rows))
        joined = database.sql(
            """
            with earlier as (
                select uri, min(file_row_number) as row from read_parquet(?, file_row_number = true) group by uri
            )
            select number, row, files.size = listed.size and files.mtime_ns = listed.mtime_ns as is_same
            from listed join earlier using (uri) join files using (row)
            where listed.reason is null
            """,
            params=[str(earlier.path)],
        ).to_arrow_reader(1 << 16)
        listed: list[Int64] = []
        for batch in joined:
            numbers, found = (batch.column(name).to_numpy() for name in ("number", "row"))
            is_same = batch.column("is_same").fill_null(False).to_numpy(zero_copy_only=False)
            known.rows[numbers[is_same]] = found[is_same]
            listed.append(np.unique(found))
    return Known(known.rows, len(np.unique(np.concatenate(listed))) if listed else 0)


def known_by_bytes(earlier: Manifest, rows: Int64) -> Callable[[str], int | None]:
    """Return what finds a row by its image_id, among those rows of an earlier manifest that `rows` does not hold."""
    wanted = np.ones(earlier.num_rows, bool)
    wanted[rows[rows != NO_ROW]] = False
    left = np.flatnonzero(wanted)
    ids: list[npt.NDArray[np.bytes_]] = [np.empty(0, "S32")]
    done = 0
    for batch in earlier.batches(["image_id"]):
        column = batch.column("image_id").filter(pa.array(wanted[done : done + len(batch)]))
        ids.append(np.array(column.to_pylist(), "S32"))
        done += len(batch)
    unsorted = np.concatenate(ids)
    order = np.argsort(unsorted, kind="stable")
    image_ids, left = unsorted[order], left[order]

    def find(image_id: str) -> int | None:
        key = np.bytes_(image_id.encode())
        place = int(np.searchsorted(image_ids, key))
        return int(left[place]) if place < len(image_ids) and image_ids[place] == key else None

    return find


class EarlierRows:
    """Rows of an earlier manifest in any order; quick where it is nearly that of the manifest."""

    def __init__(self, earlier: Manifest, columns: list[str]) -> None:
        self._columns = columns
        self._files = [pq.ParquetFile(part, pre_buffer=False) for part in earlier.parts]
        self._groups = [(file, group) for file in self._files for group in range(file.num_row_groups)]
        sizes = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = [0, *np.cumsum(sizes).tolist()]
        self._decoded: OrderedDict[int, pa.Table] = OrderedDict()

    def take(self, rows: Int64) -> pa.Table:
        """Return the columns of these rows, in this order."""
        pieces = []
        start = 0
        while start < len(rows):
            group = bisect_right(self._starts, int(rows[start])) - 1
            first, end = self._starts[group], self._starts[group + 1]
            outside = np.flatnonzero((rows[start:] < first) | (rows[start:] >= end))
            stop = start + int(outside[0]) if len(outside) else len(rows)
            pieces.append(self._group(group).take(pa.array(rows[start:stop] - first)))
            start = stop
        return pa.concat_tables(pieces)

    def _group(self, group: int) -> pa.Table:
        if group not in self._decoded:
            file, number = self._groups[group]
            self._decoded[group] = file.read_row_group(number, columns=self._columns)
            if len(self._decoded) > OPEN_GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(group)
        return self._decoded[group]
