"""What is embedded already, in an earlier manifest or in the parts of a stopped run, and where its rows are.

An image is recognised by its uri and its version (size and time stamp of the file), without opening it; once it is
read, by its bytes. Rows are counted through the earlier manifest, then through the parts.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...store import tables
from ...store.cache import cache_folder, cache_key
from ...store.manifest import Manifest, Source
from ...store.vectors import Int64
from .listing import SLICE_ENTRIES
from .parts import read_arrow

OPEN_GROUPS = 2  # chosen: row groups of the earlier manifest that are kept decoded

EARLIER_SCHEMA = pa.schema({"uri": pa.string(), "image_id": pa.string(), "version": pa.int64(), "row": pa.int64()})
READ_SCHEMA = pa.schema({"uri": pa.string(), "version": pa.int64(), "row": pa.int64(), "reason": pa.string()})


def versions_path(manifest: Source) -> Path:
    """Return where the versions of a manifest's files are kept, (rows,) int64: in the cache."""
    return cache_folder() / f"{cache_key(manifest)}-versions.npy"


def settled(folder: Path, earlier: Manifest | None, parts: list[Path]) -> Iterator[pa.Table]:
    """Yield the listing in order, a little at a time, with the `row` that each entry has; null where it has none.

    The `reason` is what the listing or a part says; `is_read` tells that a part has the entry.
    """
    with _joined(folder, earlier, parts) as connection:
        batches = connection.sql(
            """
            with known as (
                select uri, version, row, null as reason, false as is_read from earlier where version is not null
                union all
                select uri, version, row, reason, true as is_read from read
            ), once as (
                select uri, version, min(row) as row, any_value(reason) as reason, bool_or(is_read) as is_read
                from known group by uri, version
            )
            select listed.* replace (coalesce(listed.reason, once.reason) as reason),
                row, coalesce(is_read, false) as is_read
            from listed left join once using (uri, version)
            order by number
            """
        ).to_arrow_reader(tables.BATCH_ROWS)
        for batch in batches:
            for start in range(0, len(batch), SLICE_ENTRIES):
                yield pa.Table.from_batches([batch.slice(start, SLICE_ENTRIES)])


def write_unmatched(folder: Path, earlier: Manifest) -> int:
    """Write image_id and row of what an earlier manifest has beyond the listing; return how many uris are gone."""
    num_gone = 0
    with _joined(folder, earlier, []) as connection:
        unmatched = connection.sql(
            """
            select image_id, row, uri not in (select uri from listed where reason is null) as is_gone
            from earlier anti join listed using (uri, version)
            order by image_id, row
            """
        ).to_arrow_reader(tables.BATCH_ROWS)
        with pa.ipc.new_file(str(folder / "unmatched.arrow"), unmatched.schema) as writer:
            for batch in unmatched:
                writer.write_batch(batch)
                num_gone += int(batch.column("is_gone").true_count)
    return num_gone


def recogniser(folder: Path) -> Callable[[str], int | None]:
    """Return what finds the row of an image by its image_id, in what `write_unmatched` wrote."""
    ids, rows, _ = read_arrow(folder / "unmatched.arrow").columns

    def find(image_id: str) -> int | None:
        place = bisect_left(ids, image_id, key=lambda each: each.as_py())
        return rows[place].as_py() if place < len(ids) and ids[place].as_py() == image_id else None

    return find


@contextmanager
def _joined(folder: Path, earlier: Manifest | None, parts: list[Path]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database with the tables `listed`, `earlier` and `read`; the last two can be scanned once."""
    with tables.connect() as connection:
        connection.register("listed", read_arrow(folder / "listing.arrow"))
        connection.register("earlier", tables.stream(EARLIER_SCHEMA, _earlier_rows(earlier)))
        connection.register("read", tables.stream(READ_SCHEMA, _read_rows(earlier, parts)))
        yield connection


def _earlier_rows(earlier: Manifest | None) -> Iterator[pa.Table]:
    """Yield what an earlier manifest has; without versions where the cache has lost them."""
    if earlier is None:
        return
    path = versions_path(earlier.source("earlier"))
    versions = np.load(path, mmap_mode="r") if path.exists() else np.broadcast_to(-1, earlier.num_rows)
    start = 0
    for batch in earlier.batches(["uri", "image_id"]):
        stop = start + len(batch)
        version = pa.array(versions[start:stop], mask=versions[start:stop] < 0)
        yield pa.table([*batch.columns, version, np.arange(start, stop)], schema=EARLIER_SCHEMA)
        start = stop


def _read_rows(earlier: Manifest | None, parts: list[Path]) -> Iterator[pa.Table]:
    """Yield what parts have; an entry whose bytes the earlier manifest has, with its row there."""
    start = 0 if earlier is None else earlier.num_rows
    for part in parts:
        uri, version, reason, earlier_row = read_arrow(part).select(["uri", "version", "reason", "earlier_row"]).columns
        stop = start + len(uri)
        rows = pc.coalesce(earlier_row, pa.array(np.arange(start, stop)))
        table = pa.table([uri, version, rows, reason], schema=READ_SCHEMA)
        yield table if earlier is not None else table.filter(pc.is_null(earlier_row))
        start = stop


class StoredRows:
    """The rows of an earlier manifest and of parts, in any order; quick where that is nearly the order of the files."""

    def __init__(self, earlier: Manifest | None, parts: list[Path], schema: pa.Schema) -> None:
        self.num_earlier = 0 if earlier is None else earlier.num_rows
        self._schema, self._parts = schema, parts
        files = [] if earlier is None else [pq.ParquetFile(part, pre_buffer=False) for part in earlier.parts]
        self._groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        sizes = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = np.cumsum([0, *sizes, *(read_arrow(part).num_rows for part in parts)])
        self._decoded = lru_cache(OPEN_GROUPS)(self._decode)

    def take(self, rows: Int64) -> pa.Table:
        """Return these rows, in this order."""
        pieces = np.searchsorted(self._starts, rows, side="right") - 1  # row groups, then parts
        taken = [self._schema.empty_table()]
        for piece in np.unique(pieces).tolist():
            is_part = piece >= len(self._groups)
            table = read_arrow(self._parts[piece - len(self._groups)]) if is_part else self._decoded(piece)
            within = pa.array(rows[pieces == piece] - self._starts[piece])
            taken.append(table.select(self._schema.names).take(within).cast(self._schema))
        order = np.argsort(np.argsort(pieces, kind="stable"))
        return pa.concat_tables(taken).take(pa.array(order))

    def _decode(self, piece: int) -> pa.Table:
        file, group = self._groups[piece]
        return file.read_row_group(group, columns=self._schema.names)
