"""Encoded images in Parquet files, by row number; fast when rows are read more or less in order."""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import open_regular
from .limits import DEFAULT_LIMITS, Limits, UnreadableImage, check_bytes

PIECE_BYTES = 64 << 20  # chosen: about how much of a row group is decoded at a time
CACHE_BYTES = 256 << 20  # chosen: decoded pieces that are kept
OPEN_FILES = 16  # chosen: files, and places within their row groups, that are kept open

MOST_PACKED = 100  # chosen: encoded images hardly shrink, nor do pages of them

FileKey = tuple[str, int, int]  # path, time stamp, size: a file that was replaced is another file
GroupKey = tuple[FileKey, str, int]  # file, column, row group


@dataclass(frozen=True)
class OpenFile:
    """A Parquet file and where its row groups begin."""

    parquet: pq.ParquetFile
    first_rows: list[int]  # of every row group, then the number of rows


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of one column, decoded."""

    first_row: int
    values: pa.Array  # binary

    def __contains__(self, row: int) -> bool:
        return 0 <= row - self.first_row < len(self.values)


class ParquetRows:
    """Reads single values of binary columns, from any thread; keeps the files and pieces used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = lru_cache(OPEN_FILES)(_open)
        self._streams: OrderedDict[GroupKey, Iterator[Piece]] = OrderedDict()
        self._pieces: OrderedDict[tuple[GroupKey, int], Piece] = OrderedDict()  # by group and first row

    def read(self, path: str, column: str, row: int, limits: Limits = DEFAULT_LIMITS) -> bytes | None:
        """Return the bytes in `column`, or in its field `bytes` where it is a struct; None where they are null.

        Raises OSError or pyarrow's ArrowInvalid when the file cannot be read, LookupError when it has no such column
        or row, TypeError when the column does not hold bytes, UnreadableImage when they are too many.
        """
        status = os.stat(path)
        key = (path, status.st_mtime_ns, status.st_size)
        with self._lock:
            file = self._open(key)
            if row >= file.first_rows[-1]:
                raise LookupError(f"there is no row {row}; the file has {file.first_rows[-1]}")
            group = bisect_right(file.first_rows, row) - 1
            piece = self._find(file, (key, column, group), row, limits)
        value = piece.values[row - piece.first_row]
        if not value.is_valid:
            return None
        buffer = value.as_buffer()
        check_bytes(buffer.size, limits)
        return bytes(buffer)

    def _find(self, file: OpenFile, group: GroupKey, row: int, limits: Limits) -> Piece:
        for key, piece in reversed(self._pieces.items()):  # few, and nearly always the newest
            if key[0] == group and row in piece:
                self._pieces.move_to_end(key)
                return piece
        for stream in (
            self._streams.pop(group, iter(())),
            _decode(file, *group[1:], limits),
        ):
            for piece in stream:
                self._pieces[group, piece.first_row] = piece
                while len(self._pieces) > 1 and sum(kept.values.nbytes for kept in self._pieces.values()) > CACHE_BYTES:
                    self._pieces.popitem(last=False)
                if row in piece:
                    self._streams[group] = stream
                    if len(self._streams) > OPEN_FILES:
                        self._streams.popitem(last=False)
                    return piece
        raise LookupError(f"row group {group[2]} ends before row {row}")


def _check_size(group: pq.RowGroupMetaData, column: str, limits: Limits) -> None:
    """Raise UnreadableImage when the rows of a group are too large on average, or nearly empty ones unpack to much.

    Arrow unpacks whole pages, so a value that is too large must be found without reading it.
    """
    chunks = map(group.column, range(group.num_columns))
    for chunk in chunks:
        if chunk.path_in_schema in (column, f"{column}.bytes"):
            size, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            mean = size // max(group.num_rows, 1)
            if mean > 2 * limits.max_image_bytes:  # twice: what stands between the rows counts too
                raise UnreadableImage(
                    f"rows of {mean} bytes each, more than --max-image-bytes {limits.max_image_bytes}"
                )
            if size > limits.max_image_bytes and size > MOST_PACKED * packed:
                raise UnreadableImage(f"{packed:,} bytes that unpack to {size:,}, as no images do")


def _open(key: FileKey) -> OpenFile:
    open_regular(key[0]).close()
    # A row group may exceed the memory: it is read through a buffer, and not in advance.
    parquet = pq.ParquetFile(Path(key[0]), pre_buffer=False, buffer_size=1 << 20)
    sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
    return OpenFile(parquet, list(accumulate(sizes, initial=0)))


def _decode(file: OpenFile, column: str, group: int, limits: Limits) -> Iterator[Piece]:
    """Yield a column of a row group in pieces; raise UnreadableImage where that would take too much memory."""
    schema = file.parquet.schema_arrow
    if schema.get_field_index(column) < 0:
        raise LookupError(f"there is no column {column!r}")
    is_struct = pa.types.is_struct(schema.field(column).type)
    leaf = f"{column}.bytes" if is_struct else column
    metadata = file.parquet.metadata.row_group(group)
    _check_size(metadata, column, limits)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == leaf)
    piece_rows = max(1, metadata.num_rows * PIECE_BYTES // max(size, PIECE_BYTES))
    first_row = file.first_rows[group]
    # One thread: a single column gains nothing by more, and Arrow's pool may not survive a fork.
    for batch in file.parquet.iter_batches(piece_rows, row_groups=[group], columns=[leaf], use_threads=False):
        values = pc.struct_field(batch.column(0), "bytes") if is_struct else batch.column(0)
        if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
            raise TypeError(f"column {column!r} holds {values.type}, not bytes")
        yield Piece(first_row, values)
        first_row += len(values)


rows = ParquetRows()
# A forked process starts afresh: another thread may have held the lock, and files share their position.
os.register_at_fork(after_in_child=rows.__init__)  # type: ignore[misc]  # the same object, so that importers see it
