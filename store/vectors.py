"""A manifest's embeddings as one memory-mapped array."""

import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from .arrays import kept_array, new_array, seal
from .cache import cache_folder, cache_key, make_room, open_cache
from .files import replacing
from .manifest import Manifest, Source, open_manifest

RELEASED_BYTES = 256 << 20  # chosen: this much of a mapped array stays mapped when it is read in sequence
RELEASED_ROWS = 4_096  # when it is read row by row: the system maps 64 KB around every row
CONVERTED = 65_536  # numbers that `as_float32` converts at a time: they stay in the processor's cache
SIGN_AND_NUMBER = np.int32(-0x70000001)  # all but the three bits between sign and exponent
EXPONENT_STEP = np.float32(2.0**112)  # the exponent's bias is 15 in half precision, 127 in single

Bools = npt.NDArray[np.bool_]  # the array types of all rooms
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Stored = npt.NDArray[np.float16 | np.float32]
Floats = TypeVar("Floats", Float32, Float64)


@dataclass(frozen=True)
class Vectors:
    """The embeddings of a manifest's images, in its row order, read from disk as they are needed."""

    array: Stored  # (rows of the base, D), as stored
    rows: Int64  # (N,) rows of `array`
    base: Source  # the embedding manifest

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        """Return D, the length of a vector."""
        return int(self.array.shape[1])

    def raw(self, start: int, stop: int) -> Float32:
        """Return vectors start..stop as stored, (stop - start, D) float32."""
        rows = self.rows[start:stop]
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and np.all(np.diff(rows) == 1):
            return as_float32(self.array[rows[0] : rows[-1] + 1])  # a slice reads the disk in sequence
        if self.array.nbytes <= RELEASED_BYTES:
            return as_float32(self.array[rows])
        vectors = np.empty((stop - start, self.dim), np.float32)
        for first in range(0, len(rows), RELEASED_ROWS):
            part = rows[first : first + RELEASED_ROWS]
            vectors[first : first + len(part)] = as_float32(self.array[part])
            release(self.array)
        return vectors

    def unit(self, start: int, stop: int) -> Float32:
        """Return vectors start..stop at length 1, (stop - start, D) float32; a zero vector stays zero."""
        vectors = self.raw(start, stop)
        return unit_length(vectors, out=vectors if vectors.base is None else None)  # never into the stored array

    def exact(self, indices: Int64) -> Float64:
        """Return the vectors at `indices` (M,) at length 1 in float64, (M, D), for ties and thresholds."""
        return unit_length(self.array[self.rows[indices]].astype(np.float64))

    def take(self, indices: Int64) -> "Vectors":
        """Return the vectors at `indices` (M,), in that order; nothing is read yet."""
        return replace(self, rows=self.rows[indices])

    def are(self, other: "Vectors") -> bool:
        """Tell whether these are the other's vectors, row by row."""
        one, two = self.array, other.array
        same_file = isinstance(one, np.memmap) and isinstance(two, np.memmap) and one.filename == two.filename
        return (one is two or (same_file and one.shape == two.shape)) and np.array_equal(self.rows, other.rows)


def unit_length(vectors: Floats, out: Floats | None = None) -> Floats:
    """Return the rows of (N, D) at length 1, in `out` if given; a zero row stays zero."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    norms[norms == 0] = 1.0
    scaled: Floats = np.divide(vectors, norms[:, None], out=out)
    return scaled


def as_float32(stored: Stored) -> Float32:
    """Return finite numbers (N, D) as float32; what is so already is not copied."""
    if stored.dtype != np.float16 or stored.ndim != 2 or not stored.size:
        return np.asarray(stored, dtype=np.float32)
    # NumPy converts one number at a time. Half and single precision differ in the place of the exponent and in its
    # bias: shifting the bits and scaling by a power of two is exact, and three times as fast.
    vectors = np.empty(stored.shape, np.float32)
    bits = vectors.view(np.int32)
    num_rows = max(1, CONVERTED // stored.shape[1])
    for start in range(0, len(stored), num_rows):
        block = slice(start, start + num_rows)
        np.copyto(bits[block], np.ascontiguousarray(stored[block]).view(np.int16))
        np.left_shift(bits[block], 13, out=bits[block])
        np.bitwise_and(bits[block], SIGN_AND_NUMBER, out=bits[block])
        np.multiply(vectors[block], EXPONENT_STEP, out=vectors[block])
    return vectors


def release(array: npt.NDArray[np.generic]) -> None:
    """Unmap the pages of a mapped array that were read; they stay in the page cache while there is room."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class PageRelease:
    """Unmaps the pages of mapped arrays whenever 256 MB of them have been read."""

    def __init__(self, *arrays: npt.NDArray[np.generic]) -> None:
        self.arrays = arrays
        self.num_bytes = 0  # since the last time

    def add(self, num_bytes: int) -> None:
        """Count bytes that were read."""
        self.num_bytes += num_bytes
        if self.num_bytes > RELEASED_BYTES:
            self.num_bytes = 0
            for array in self.arrays:
                release(array)


def has_vectors(manifest: Manifest) -> bool:
    """Tell whether a step can find embeddings through this manifest."""
    return "embedding" in manifest.names() or _base_of(manifest) is not None


def open_vectors(manifest: Manifest, *, features: Manifest | None = None, limit: int | None = None) -> Vectors:
    """Return the embeddings of a manifest's rows: its own, those of its base, or those of `features`.

    `features` is another embedding manifest of the same images, matched by image_id and uri.
    Raises ToolkitError when there are none, the base is missing or has changed, or vectors are not finite.
    """
    base, rows = locate_vectors(manifest, features=features, limit=limit)
    return Vectors(_mapped_array(base), rows, base.source("base"))


def locate_vectors(
    manifest: Manifest, *, features: Manifest | None = None, limit: int | None = None
) -> tuple[Manifest, Int64]:
    """Return where the vectors are, unread: embedding manifest and rows (N,). ToolkitError as in `open_vectors`."""
    num_rows = manifest.num_rows if limit is None else min(limit, manifest.num_rows)
    if features is not None:
        if "embedding" not in features.names():
            raise ToolkitError(f"{features.path} has no `embedding` column; give --features an output of embed")
        return features, _matching_rows(manifest, features, num_rows)
    if "embedding" in manifest.names():
        return manifest, np.arange(num_rows, dtype=np.int64)
    wanted = _base_of(manifest)
    if wanted is None:
        raise _without_embeddings(manifest)
    base = _open_base(manifest, wanted)
    rows = _rows_of(manifest, base, num_rows)
    if rows.null_count:
        lacking = f"{rows.null_count} rows of {manifest.path} have no vector in {base.path}"
        raise ToolkitError(f"{lacking}; embed it again, or give --features")
    found: Int64 = rows.to_numpy()
    return base, found


def checked_rows(manifest: Manifest, limit: int | None = None) -> pa.Array:
    """Return the column `row` of a selection as `base_rows` does; ToolkitError where its base, if there, has fewer."""
    wanted = _base_of(manifest)
    path = None if wanted is None else Path(wanted.path)
    if path is None or not path.exists():
        return base_rows(manifest, limit)
    return _rows_of(manifest, open_manifest(path), limit)


def _rows_of(manifest: Manifest, base: Manifest, limit: int | None) -> pa.Array:
    rows = base_rows(manifest, limit)
    if (highest := pc.max(rows).as_py()) is not None and highest >= base.num_rows:
        what = f"`row` of {manifest.path} is {highest} (in its row {pc.index(rows, highest).as_py()})"
        raise ToolkitError(f"{what}, and {base.path} has {base.num_rows:,} rows; make {manifest.path} again")
    return rows


def base_rows(manifest: Manifest, limit: int | None = None) -> pa.Array:
    """Return the column `row` of a selection as int64, null where an image has no vector, (N,).

    Raises ToolkitError for what is no row number: text, a fraction, NaN, or less than 0.
    """
    if "row" not in manifest.names():
        raise ToolkitError(f"{manifest.path} refers to embeddings, but has no column `row`; make it again")
    column = manifest.read(["row"], limit).column("row")
    try:
        if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type)):
            raise ToolkitError(f"the `row` column of {manifest.path} holds {column.type}; it must hold whole numbers")
        rows = pc.cast(column, pa.int64()).combine_chunks()
    except pa.ArrowInvalid:  # which names one value, not the first
        values = column.cast(pa.float64(), safe=False).fill_null(0).to_numpy()
        row = int(np.argmax(~((np.floor(values) == values) & (np.abs(values) < 2.0**63))))
        raise ToolkitError(_no_row(manifest, row, values[row])) from None
    if (lowest := pc.min(rows).as_py()) is not None and lowest < 0:
        raise ToolkitError(_no_row(manifest, pc.index(rows, lowest).as_py(), lowest))
    return rows


def _no_row(manifest: Manifest, row: int, value: object) -> str:
    what = f"`row` of {manifest.path} is {value} (in its row {row})"
    return f"{what}; it must be a whole number from 0, the row of an image in its embeddings"


def scratch_size(base: Manifest) -> tuple[int, int]:
    """Return D, and how many bytes an embedding manifest would add to the cache: 0 when it is decoded already."""
    dim, dtype = _dimension(base)
    return dim, 0 if _decoded_path(base).exists() else base.num_rows * dim * dtype.itemsize


def _base_of(manifest: Manifest) -> Source | None:
    return manifest.provenance.base if manifest.provenance and "row" in manifest.names() else None


def _open_base(manifest: Manifest, wanted: Source) -> Manifest:
    recorded = Path(wanted.path)
    beside = manifest.path.absolute().parent / recorded.name  # of a folder that was moved as a whole
    path = recorded if recorded.exists() else beside
    if not path.exists():
        gone = f"the embeddings of {manifest.path} are gone: no {recorded}"
        raise ToolkitError(f"{gone}; make them again, or give --features")
    base = open_manifest(path)
    if base.content_id != wanted.content_id:
        raise ToolkitError(f"{path} has changed since {manifest.path} was made from it; make {manifest.path} again")
    return base


def _matching_rows(manifest: Manifest, base: Manifest, num_rows: int) -> Int64:
    keys = ["image_id", "uri"]
    for side in (manifest, base):
        if missing := [key for key in keys if key not in side.names()]:
            raise ToolkitError(f"{side.path} has no {missing[0]}, by which --features are matched; embed it here")
        for key in keys:
            if side.schema.field(key).type not in (pa.string(), pa.large_string()):
                kind = side.schema.field(key).type
                raise ToolkitError(f"the `{key}` column of {side.path} is {kind}; --features are matched by text")
    text = pa.schema([(key, pa.string()) for key in keys])
    wanted = manifest.read(keys, num_rows).cast(text).append_column("position", pa.array(np.arange(num_rows)))
    offered = base.read(keys).cast(text).append_column("base_row", pa.array(np.arange(base.num_rows)))
    joined = wanted.join(offered.group_by(keys).aggregate([("base_row", "min")]), keys, join_type="left outer")
    found = joined.sort_by("position").column("base_row_min")
    if found.null_count:
        absent = f"{found.null_count} of {num_rows} images of {manifest.path}"
        raise ToolkitError(f"{absent} are not in {base.path}; embed them too")
    return np.asarray(found, dtype=np.int64)


def _decoded_path(manifest: Manifest) -> Path:
    return cache_folder() / f"{cache_key(manifest.source('base'))}.npy"


def _mapped_array(manifest: Manifest) -> Stored:
    """Decode a manifest's `embedding` column once into a .npy file, and map it."""
    path = _decoded_path(manifest)
    dim, dtype = _dimension(manifest)
    array: Stored | None = kept_array(path, dtype, (manifest.num_rows, dim))
    if array is None:
        open_cache()
        make_room(manifest.num_rows * dim * dtype.itemsize)
        with replacing(path) as temporary:
            _decode(manifest, temporary, dim, dtype)
        seal(path)
        array = np.load(path, mmap_mode="r")
    return array


def _without_embeddings(manifest: Manifest) -> ToolkitError:
    columns = ", ".join(manifest.names())
    return ToolkitError(f"{manifest.path} has no embeddings (columns: {columns}); run `dinov2 curate embed` on it")


def _dimension(manifest: Manifest) -> tuple[int, np.dtype[np.float16] | np.dtype[np.float32]]:
    """Return D and the type that vectors are decoded to: half precision stays, all else becomes float32."""
    if manifest.num_rows == 0:
        raise ToolkitError(f"{manifest.path} has no rows; there is nothing to compare")
    if "embedding" not in manifest.names():
        raise _without_embeddings(manifest)
    kind = manifest.schema.field("embedding").type
    if not (pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise ToolkitError(f"the `embedding` column of {manifest.path} is {kind}; it must be a list of floats")
    if not pa.types.is_floating(kind.value_type):
        raise ToolkitError(f"the `embedding` column of {manifest.path} holds {kind.value_type}; it must hold floats")
    first = next(manifest.batches(["embedding"], 1)).column("embedding")[0].as_py()
    if not first:
        raise ToolkitError(f"row 0 of {manifest.path} has no embedding; remove such rows first")
    return len(first), np.dtype(np.float16) if pa.types.is_float16(kind.value_type) else np.dtype(np.float32)


def _decode(manifest: Manifest, target: Path, dim: int, dtype: np.dtype[np.float16] | np.dtype[np.float32]) -> None:
    array = new_array(target, dtype, (manifest.num_rows, dim))
    start = 0
    with console.progress(f"reading the vectors of {manifest.path.name}", manifest.num_rows, "rows") as advance:
        for batch in manifest.batches(["embedding"]):
            column = batch.column(0)
            stop = start + len(column)
            values = column.flatten().to_numpy(zero_copy_only=False)
            if column.null_count or len(values) != len(column) * dim:
                uneven = f"the embeddings of {manifest.path} are not all {dim} numbers long"
                raise ToolkitError(f"{uneven} (rows {start} to {stop - 1}); remove the others first")
            with np.errstate(over="ignore"):  # too large for single precision is infinite, and found below
                array[start:stop] = values.reshape(-1, dim)
            single = array[start:stop].astype(np.float32, copy=False)
            with np.errstate(over="ignore", invalid="ignore"):
                finite = np.isfinite(np.einsum("nd,nd->n", single, single))
            if not finite.all():
                row = start + int(np.argmin(finite))
                is_long = np.isfinite(values.reshape(-1, dim)[row - start]).all()
                what = "overflows float32" if is_long else "is not finite"
                raise ToolkitError(f"row {row} of {manifest.path} has a vector that {what}; remove such rows first")
            release(array)
            advance(len(column))
            start = stop
    del batch, column, values
    pa.default_memory_pool().release_unused()  # Arrow keeps up to 200 MB of what was read
