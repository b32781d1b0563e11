"""What an `embed` keeps on disk until its output stands: a folder in the cache, from which a stopped run resumes.

lock              held while the command runs
provenance.json   of what is being made; its base is the manifest that rows are reused from
part-*.arrow      what became of entries, one row each; renamed into place when whole; its name ends in its digest
listing.arrow, todo.arrow, unmatched.arrow   written anew at every start (`listing`, `plan`)
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...features.extract.extract import FeatureBatch
from ...store.arrays import discard
from ...store.artifact import RUN_PROVENANCE
from ...store.cache import cache_folder, open_cache, remove_empty_cache
from ...store.files import flush, temporary_beside
from ...store.lock import held
from .listing import OUTPUT_COLUMNS

PART_BYTES = 64 << 20  # chosen: a part is written when it has as much,
PART_SECONDS = 10.0  # or is so old: what a kill can cost


def work_folder(output: Path) -> Path:
    """Return the folder in which the work on an output is kept."""
    return cache_folder() / f"embed-{blake2b(os.fsencode(output.absolute()), digest_size=8).hexdigest()}"


@contextmanager
def locked(folder: Path, output: Path) -> Iterator[None]:
    """Hold the work on an output; remove the folder afterwards when nothing is left to be done.

    Raises ToolkitError when another process has it.
    """
    open_cache()
    folder.mkdir(exist_ok=True)
    with held(folder / "lock", f"embedding to {output}"):
        try:
            yield
        finally:
            if not (folder / RUN_PROVENANCE).exists():
                shutil.rmtree(folder)
                remove_empty_cache()


def forget_work(folder: Path) -> None:
    """Remove the parts, as when the output stands."""
    (folder / RUN_PROVENANCE).unlink(missing_ok=True)
    for path in [*folder.glob("part-*.arrow"), *folder.glob(".*.tmp")]:
        path.unlink()


def read_arrow(path: Path) -> pa.Table:
    """Return an Arrow file; its rows stay on disk until they are used."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def finished_parts(folder: Path) -> list[Path]:
    """Return the parts, from the first written to the last."""
    return sorted(folder.glob("part-*.arrow"))


def discard_damaged_parts(folder: Path) -> None:
    """Remove the parts that are not as they were written, and say so: what they had is embedded again."""
    for path in finished_parts(folder):
        digest = path.stem.rpartition("-")[2]
        if _digest(path) != digest:
            discard(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def num_in_parts(folder: Path) -> int:
    """Return how many entries the parts have."""
    return sum(read_arrow(path).num_rows for path in finished_parts(folder))


class PartWriter:
    """Gathers rows, and writes a part when they are many or old enough; to be closed at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: list[pa.Table] = []
        self._num_bytes = 0
        self._since = time.monotonic()

    def add(self, table: pa.Table) -> None:
        """Take rows of a part."""
        self._tables.append(table)
        self._num_bytes += table.nbytes
        if self._num_bytes >= PART_BYTES or time.monotonic() - self._since >= PART_SECONDS:
            self.close()

    def close(self) -> None:
        """Write what was gathered."""
        tables, self._tables, self._num_bytes, self._since = self._tables, [], 0, time.monotonic()
        if tables:
            write_part(self._folder, pa.concat_tables(tables))


def write_part(folder: Path, table: pa.Table) -> None:
    """Write what became of some entries, whole or not at all."""
    with temporary_beside(folder / "part") as temporary:
        with pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table.combine_chunks())
        flush(temporary)
        os.replace(temporary, folder / f"part-{time.time_ns()}-{_digest(temporary)}.arrow")


def part_schema(fields: list[pa.Field]) -> pa.Schema:
    """Return the columns of a part; those of the output, `fields`, are null where an entry was not embedded.

    `reason` says why it was removed; `earlier_row` is the row of the earlier manifest that has the same bytes.
    """
    own = {"uri": pa.string(), "version": pa.int64(), "reason": pa.string(), "earlier_row": pa.int64()}
    found = {field.name: field.type for field in fields if field.name not in OUTPUT_COLUMNS}
    found["embedding"] = pa.list_(found["embedding"].value_field)  # null lists of a fixed size take as much as others
    return pa.schema(own | found)


def part_rows(
    batch: FeatureBatch, first: int, entries: Sequence[tuple[str, int]], schema: pa.Schema, dtype: str
) -> pa.Table:
    """Return what became of entries (uri, version), as rows of a part; `first` is the index of the first in `batch`."""
    with np.errstate(over="ignore"):  # too large for half precision is infinite, and found below
        vectors = batch.features.numpy().astype(dtype)  # (B, D)
        patches = [image.numpy().astype(dtype) for image in batch.patches]  # (B,) of (rows, columns, D)
    is_finite = np.isfinite(vectors).all(axis=1)
    if patches:
        is_finite &= np.array([bool(np.isfinite(image).all()) for image in patches])
    columns = {"embedding": pa.array(list(vectors), schema.field("embedding").type)}
    for name in ("image_id", "width", "height"):
        columns[name] = pa.array([getattr(fact, name) for fact in batch.facts], schema.field(name).type)
    if "patches" in schema.names:
        columns["grid_height"] = pa.array([image.shape[0] for image in patches], pa.int32())
        columns["grid_width"] = pa.array([image.shape[1] for image in patches], pa.int32())
        columns["patches"] = _patch_lists(patches, vectors.shape[1], schema.field("patches").type)

    indices = np.array(batch.indices, np.int64)
    rows = np.full(len(entries), -1)  # of the batch
    rows[indices[is_finite] - first] = np.flatnonzero(is_finite)
    embedded = pa.table(columns).take(pa.array(rows, mask=rows < 0))
    reasons = dict(batch.failures) | dict.fromkeys(indices[~is_finite].tolist(), "features that are not finite")
    known = dict(batch.known)
    all_indices = range(first, first + len(entries))
    own = [*zip(*entries, strict=True), [reasons.get(i) for i in all_indices], [known.get(i) for i in all_indices]]
    return pa.table([*own, *(embedded.column(name) for name in schema.names[len(own) :])], schema=schema)


def _patch_lists(patches: list[npt.NDArray[np.floating]], dim: int, kind: pa.DataType) -> pa.Array:
    """Return the patch tokens of images as lists of vectors."""
    flat = [np.empty((0, dim), kind.value_type.value_type.to_pandas_dtype())]
    flat += [image.reshape(-1, dim) for image in patches]
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(flat).reshape(-1)), type=kind.value_type)
    return pa.ListArray.from_arrays(pa.array(np.cumsum(list(map(len, flat))), pa.int32()), tokens, type=kind)
