"""What the sources of an `embed` list, on disk: written in one walk, read piece by piece, whatever its length."""

import os
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...store.sources import Entry

PIECE_ENTRIES = 1_024  # chosen: entries that are Python objects at a time

SCHEMA = pa.schema(  # the fields of an Entry
    [
        pa.field("uri", pa.string()),
        pa.field("label", pa.string()),
        pa.field("reason", pa.string()),  # why it is no image, where that is known
        pa.field("source", pa.string()),
        pa.field("weight", pa.float32()),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
    ]
)

Int64 = npt.NDArray[np.int64]


def write_listing(path: Path, entries: Iterable[Entry]) -> None:
    """Write all entries, and put the file in its place when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    following = iter(entries)
    values = attrgetter(*SCHEMA.names)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(str(temporary), SCHEMA, options=options) as writer:
        while piece := list(islice(following, PIECE_ENTRIES)):
            columns = zip(*map(values, piece), strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
    os.replace(temporary, path)


class Listing:
    """A written listing; entries are numbered from 0."""

    def __init__(self, path: Path) -> None:
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))

    def pieces(self) -> Iterator[pa.RecordBatch]:
        """Yield all entries in order, `PIECE_ENTRIES` at a time."""
        for piece in range(self._file.num_record_batches):
            yield self._file.get_batch(piece)

    def uris(self, numbers: Int64) -> Iterator[str]:
        """Yield the uris of the entries with these ascending numbers."""
        for piece, within in groupby(numbers.tolist(), lambda number: number // PIECE_ENTRIES):
            places = pa.array([number % PIECE_ENTRIES for number in within])
            yield from self._file.get_batch(piece).column("uri").take(places).to_pylist()

    def numbered(self, columns: list[str]) -> pa.RecordBatchReader:
        """Return the columns and `reason` of all entries, and their `number`, to be read once."""
        names = [*columns, "reason"]
        schema = pa.schema([*(SCHEMA.field(name) for name in names), pa.field("number", pa.int64())])

        def batches() -> Iterator[pa.RecordBatch]:
            for piece, batch in enumerate(self.pieces()):
                numbers = pa.array(np.arange(len(batch)) + piece * PIECE_ENTRIES)
                yield pa.record_batch([*(batch.column(name) for name in names), numbers], schema=schema)

        return pa.RecordBatchReader.from_batches(schema, batches())
