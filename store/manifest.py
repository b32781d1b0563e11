"""Manifests: the Parquet files that every command reads and writes, with their columns and their provenance."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ToolkitError
from .content_id import HashingFile, foreign_content_id
from .files import check_regular, replacing
from .json_text import json_object
from .renamed import COLUMNS, FIGURES, PARAMETERS, with_present_names, with_present_settings

FORMAT_VERSION = 1
PROVENANCE_KEY = "dinov2_toolkit"  # schema metadata: the Provenance as JSON, known before the first row
RESULT_KEY = "dinov2_toolkit_result"  # file metadata: content id and figures as JSON, known after the last row
ROW_GROUP_ROWS = 16_384  # chosen: a row group of 384 half floats is 12 MB, small enough to stream
PATCH_GROUP_ROWS = 64  # chosen: 256 patches of 384 half floats are 200 KB an image

MOST_NUMBERS, MOST_NUMBERS_PER_BYTE = 1 << 28, 100  # chosen: vectors hardly shrink, so a larger file holds them
SHOWN_BYTES = 80  # of a malformed value in a message
FIELD_TYPES = {  # of a provenance as JSON
    "format": int,
    "kind": str,
    "command": str,
    "parameters": dict,
    "seed": int,
    "inputs": list,
    "role": str,
    "version": str,
    "figures": dict,
    "content_id": str,
}
NOT_WRITTEN: dict[str, object] = {"figures": {}, "content_id": ""}  # what a file without them means

Rows = npt.NDArray[np.int64]

IMAGE_FIELDS = (
    pa.field("image_id", pa.string()),  # BLAKE2b-128 of the encoded bytes, hex
    pa.field("uri", pa.string()),  # absolute path, URL, or parquet://FILE?row=N
    pa.field("width", pa.int32()),  # pixels, after EXIF orientation
    pa.field("height", pa.int32()),
    pa.field("label", pa.string()),  # null where there is none
)
OPTIONAL_IMAGE_FIELDS = (
    pa.field("source", pa.string()),  # the query set or part by which the image came
    pa.field("weight", pa.float32()),  # how often training draws it; 1 where absent
)
ROW_FIELD = pa.field("row", pa.int64())  # row in the embedding manifest that the selection refers to
SELECTION_FIELDS = (
    pa.field("duplicates", pa.int32()),  # dedup: how many images this one stands for, itself left out
    pa.field("distance", pa.float32()),  # cluster: to the nearest centroid of the finest level
    pa.field("query_id", pa.string()),  # retrieve: image_id of the query
    pa.field("rank", pa.int32()),  # retrieve: 1 is the query's nearest
    pa.field("similarity", pa.float32()),  # retrieve: cosine to the query, in [-1, 1]
)
REMOVED_FIELDS = (
    pa.field("uri", pa.string()),
    pa.field("reason", pa.string()),
    pa.field("duplicate_of", pa.string()),  # uri of the kept image, or of the evaluation image it resembles
    pa.field("similarity", pa.float32()),
)
GROUP_FIELDS = (  # dedup, of what stays and what goes alike
    pa.field("group_id", pa.int64()),  # row of the first image of its group
    pa.field("min_similarity_to_kept", pa.float32()),  # lowest in the group; null where the image is alone
)
# dedup with pixel verification, of what goes: to `duplicate_of`; null where their pixels were not compared
PIXEL_DIFFERENCE_FIELD = pa.field("pixel_difference", pa.float32())
PROJECTION_FIELDS = (  # map: where an image lies
    pa.field("projection_x", pa.float32()),
    pa.field("projection_y", pa.float32()),
)
NEIGHBORS_FIELD = pa.field(  # map: the nearest rows of the same manifest, counted from 0, and 1 less the cosine to each
    "neighbors", pa.struct({"ids": pa.list_(pa.int64()), "distances": pa.list_(pa.float32())})
)
THUMBNAIL_FIELD = pa.field("thumbnail", pa.struct({"bytes": pa.binary(), "path": pa.string()}))  # map: encoded, and uri
SCORE_FIELDS = (
    pa.field("model", pa.string()),
    pa.field("method", pa.string()),
    pa.field("parameters", pa.string()),  # JSON
    pa.field("metric", pa.string()),
    pa.field("value", pa.float64()),
    pa.field("low", pa.float64()),  # 95 % interval
    pa.field("high", pa.float64()),
    pa.field("num_train", pa.int64()),
    pa.field("num_test", pa.int64()),
    pa.field("true_class", pa.string()),  # null: of all classes
    pa.field("predicted_class", pa.string()),  # only of a confusion
)


def embedding_field(dim: int, dtype: pa.DataType) -> pa.Field:
    """Return the column of `dim` numbers an image; `dtype` is pa.float16() or pa.float32()."""
    return pa.field("embedding", pa.list_(pa.field("element", dtype, nullable=False), dim), nullable=False)


def patch_fields(dim: int, dtype: pa.DataType) -> list[pa.Field]:
    """Return the columns of an image's patch tokens: vectors of `dim` numbers, row by row of a grid of that size."""
    vector = pa.list_(pa.field("element", dtype, nullable=False), dim)
    return [
        pa.field("grid_height", pa.int32()),  # patches
        pa.field("grid_width", pa.int32()),
        pa.field("patches", pa.list_(pa.field("element", vector, nullable=False)), nullable=False),
    ]


def cluster_field(level: int) -> pa.Field:
    """Return the column of cluster numbers at a level; level 0 is the finest."""
    return pa.field(f"cluster_{level}", pa.int32())


@dataclass(frozen=True)
class Source:
    """Something a step read: a manifest, a folder, a model."""

    role: str  # images, manifest, queries, pool, against, model, train, test, ...
    path: str
    content_id: str


@dataclass(frozen=True)
class Provenance:
    """How a manifest came about; equal provenance means equal rows."""

    kind: str  # embeddings, selection, removed, scores, metrics, run
    command: str  # "curate dedup"
    parameters: dict[str, object]
    seed: int = 0
    inputs: tuple[Source, ...] = ()
    base: Source | None = None  # the embedding manifest that `row` counts in
    role: str = "pool"  # pool, queries or eval: what bare commands take it for
    version: str = ""
    figures: dict[str, object] = field(default_factory=dict)  # what the step measured: thresholds, recall, counts
    content_id: str = ""  # made while writing

    def same_work(self, other: "Provenance") -> bool:
        """Tell whether both describe the same command on the same contents with the same settings."""

        def work(of: Provenance) -> tuple[object, ...]:
            inputs = [(source.role, source.content_id) for source in of.inputs]
            return of.command, json.loads(json.dumps(of.parameters)), of.seed, inputs

        return work(self) == work(other)

    def model(self) -> Source | None:
        """Return the model that made the vectors, where it is known."""
        return next((source for source in self.inputs if source.role == "model"), None)


@dataclass(frozen=True)
class Piece:
    """Some rows of one part of a manifest."""

    part: Path
    rows: Rows  # (B,) of the part, rising
    batch: pa.RecordBatch  # (B,)


@dataclass(frozen=True)
class Manifest:
    """An opened manifest: one Parquet file or a folder of parts, ours or anybody's."""

    path: Path
    parts: tuple[Path, ...]
    schema: pa.Schema
    num_rows: int
    provenance: Provenance | None  # None for a foreign file
    content_id: str
    old_names: dict[str, str] = field(default_factory=dict, compare=False)  # present column name -> that in the file

    def names(self) -> list[str]:
        """Return the column names."""
        return [str(name) for name in self.schema.names]

    def pieces(self, columns: list[str], limit: int | None = None, rows: Rows | None = None) -> Iterator[Piece]:
        """Yield the columns in row order, a row group or less at a time, with the places of the rows.

        With `limit` only the first so many rows; of `rows` (R,), rising, only these, and no row group without any.
        """
        stored = [self.old_names.get(name, name) for name in columns]
        end = self.num_rows if limit is None else min(limit, self.num_rows)
        start = 0  # of the row group, then of the batch
        for part in self.parts:
            part_start = start
            # A row group may exceed the memory: it is read through a buffer, and not in advance.
            with _whole(part), pq.ParquetFile(part, pre_buffer=False, buffer_size=1 << 20) as file:
                for group in range(file.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    if len(_within(rows, start, min(stop, end))):
                        # One thread: a row group of so few rows gains nothing by more, and memory stays in bounds.
                        for batch in file.iter_batches(ROW_GROUP_ROWS, [group], stored, use_threads=False):
                            wanted = _within(rows, start, min(start + batch.num_rows, end))
                            if len(wanted):
                                taken = batch.slice(0, len(wanted)) if rows is None else batch.take(wanted - start)
                                yield Piece(part, wanted - part_start, taken.rename_columns(columns))
                            start += batch.num_rows
                    start = stop

    def batches(self, columns: list[str], limit: int | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the columns in row order, a row group or less at a time; `limit` ends it after so many rows."""
        return (piece.batch for piece in self.pieces(columns, limit))

    def read(self, columns: list[str] | None = None, limit: int | None = None) -> pa.Table:
        """Return the columns (all by default) as one table."""
        columns = self.names() if columns is None else columns
        schema = pa.schema([self.schema.field(name) for name in columns])
        return pa.Table.from_batches(self.batches(columns, limit), schema.remove_metadata())

    def source(self, role: str) -> Source:
        """Return this manifest as an input of a step."""
        return Source(role, str(self.path.absolute()), self.content_id)


@contextmanager
def _whole(part: Path) -> Iterator[None]:
    """Raise ToolkitError where a Parquet file turns out to be damaged while it is read."""
    try:
        yield
    except (pa.ArrowException, OSError) as problem:
        if isinstance(problem, MemoryError) or getattr(problem, "errno", None) is not None:
            raise
        reason = " ".join(str(problem).split())[:300]
        raise ToolkitError(f"{part} is damaged ({reason}); make it again, or take a copy that is whole") from None


def _within(rows: Rows | None, start: int, stop: int) -> Rows:
    """Return the rows from start up to stop: those of `rows`, or all."""
    if rows is None:
        return np.arange(start, stop)
    first, last = np.searchsorted(rows, [start, stop])
    return rows[first:last]


def is_manifest_name(name: str) -> bool:
    """Tell whether a command takes a name for a manifest's: a Parquet file, or a folder with `_manifest.json`."""
    return name.endswith(".parquet") or Path(name, "_manifest.json").exists()


def open_manifest(path: Path) -> Manifest:
    """Open a Parquet file, or a folder of parts with `_manifest.json`; ToolkitError when it is missing or neither."""
    if not path.exists():
        raise ToolkitError(f"no manifest at {path}; check the path, or make one with `dinov2 curate embed`")
    if check_regular(path).is_dir():
        return _open_parts(path)
    try:
        with pq.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
        names = schema.names
    except (pa.ArrowInvalid, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise ToolkitError(f"{path} is not a readable Parquet file ({reason}); name a manifest") from None
    except UnicodeDecodeError as problem:
        raise ToolkitError(f"{path} has a column whose name is not UTF-8 ({problem.object!r}); rename it") from None
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ToolkitError(f"{path} has two columns {twice!r}; rename or drop one")
    _check_declared(path, schema, metadata.num_rows)
    kept: dict[bytes, bytes] = metadata.metadata or {}
    if RESULT_KEY.encode() not in kept:
        return Manifest(path, (path,), schema, metadata.num_rows, None, foreign_content_id(path))
    parts = [_metadata_values(kept.get(key.encode(), b""), key, path) for key in (PROVENANCE_KEY, RESULT_KEY)]
    try:
        provenance = provenance_from({**parts[0], **parts[1]}, path)
    except ValueError as problem:
        raise ToolkitError(f"{problem}; make the file again") from None
    old_names = {new: old for old, new in COLUMNS.items() if old in names and new not in names}
    present = {old: new for new, old in old_names.items()}
    schema = pa.schema([each.with_name(present.get(each.name, each.name)) for each in schema], schema.metadata)
    return Manifest(path, (path,), schema, metadata.num_rows, provenance, provenance.content_id, old_names)


def _check_declared(path: Path, schema: pa.Schema, num_rows: int) -> None:
    """Raise ToolkitError when a file declares more vectors than it can hold, which would be allocated."""
    kind = schema.field("embedding").type if "embedding" in schema.names else None
    if kind is None or not pa.types.is_fixed_size_list(kind):
        return
    declared, held = num_rows * kind.list_size, path.stat().st_size
    if declared > MOST_NUMBERS and declared > MOST_NUMBERS_PER_BYTE * held:
        raise ToolkitError(
            f"{path} declares {num_rows:,} vectors of {kind.list_size:,} numbers in {held:,} bytes; make it again"
        )


def _metadata_values(text: bytes, key: str, path: Path) -> dict[str, Any]:
    """Return what a key of a file's metadata holds as JSON. Raises ToolkitError where it is no JSON object."""
    try:
        return json_object(text)
    except ValueError:
        shown = ascii(text[:SHOWN_BYTES].decode(errors="replace"))
        raise ToolkitError(
            f"{path} has metadata {key!r} that is no JSON object ({shown}); make the file again"
        ) from None


def _open_parts(path: Path) -> Manifest:
    listing = path / "_manifest.json"
    if not listing.exists():
        raise ToolkitError(f"{path} is a folder without _manifest.json, so no manifest; name a Parquet file")
    opened = [open_manifest(part) for part in part_paths(path)]
    if not opened:
        raise ToolkitError(f"{listing} lists no parts; make the manifest again")
    digest = hashlib.blake2b("\n".join(part.content_id for part in opened).encode(), digest_size=16).hexdigest()
    parts = tuple(part.path for part in opened)
    for part in opened:
        if not part.schema.equals(opened[0].schema):
            other = f"{part.path} ({', '.join(part.names())}) and {parts[0]} ({', '.join(opened[0].names())})"
            raise ToolkitError(f"the parts {other} have different columns; give all of them the same")
    return replace(opened[0], path=path, parts=parts, num_rows=sum(part.num_rows for part in opened), content_id=digest)


def part_paths(path: Path) -> list[Path]:
    """Return the files of a manifest: itself, or what the `_manifest.json` of its folder lists; none without one."""
    if not path.is_dir():
        return [path]
    listing = path / "_manifest.json"
    if not listing.exists():
        return []
    names = _metadata_values(check_regular(listing).read_bytes(), "parts", listing).get("parts")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        what = f"{listing} has {ascii(names)[:SHOWN_BYTES]} for its parts"
        raise ToolkitError(f'{what}; it must be a list of file names, such as {{"parts": ["0.parquet"]}}')
    for name in names:
        if "\0" in name or (path / name).is_dir():
            raise ToolkitError(f"{listing} lists {ascii(name)[:SHOWN_BYTES]}, which is no file; list files alone")
    return [path / name for name in names]


def provenance_values(provenance: Provenance) -> dict[str, Any]:
    """Return the provenance as plain values for JSON; `provenance_from` is its inverse."""
    return {"format": FORMAT_VERSION, **asdict(provenance)}


def provenance_from(values: Any, path: Path) -> Provenance:
    """Return the provenance that was kept as JSON in `path`.

    Raises ToolkitError when a newer toolkit wrote it, and ValueError when none did.
    """
    key, value = "format", values
    try:
        values = dict(values)
        for key, kind in FIELD_TYPES.items():
            value = values.get(key, NOT_WRITTEN.get(key))
            if type(value) is not kind or (isinstance(value, str) and "\0" in value):
                raise TypeError
        if values["format"] > FORMAT_VERSION:
            raise ToolkitError(f"{path} was written by a newer toolkit ({values['version']}); update this one")
        key, value = "inputs", values["inputs"]
        inputs = tuple(map(_source_from, value))
        key, value = "base", values.get("base")
        base = None if value is None else _source_from(value)
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{path} has a provenance whose {key!r} is {ascii(value)[:SHOWN_BYTES]}") from None
    is_run, parameters = values["kind"] == "run", values["parameters"]
    present = {
        "parameters": with_present_settings(parameters) if is_run else with_present_names(parameters, PARAMETERS),
        "figures": with_present_names(values.get("figures", {}), FIGURES),
        "inputs": inputs,
        "base": base,
    }
    known = {name: value for name, value in {**values, **present}.items() if name in Provenance.__dataclass_fields__}
    return Provenance(**known)


def _source_from(values: dict[str, str]) -> Source:
    """Return an input as it was kept. Raises TypeError or KeyError where it is none."""
    source = Source(values["role"], values["path"], values["content_id"])
    if not all(type(value) is str and "\0" not in value for value in (source.role, source.path, source.content_id)):
        raise TypeError
    return source


class ManifestWriter:
    """Writes a manifest, as a context manager; after an exception the old file, if any, stands as it was.

    After the block, `provenance.content_id` is set and the file stands.
    """

    def __init__(self, path: Path, fields: list[pa.Field], provenance: Provenance) -> None:
        self.path = path
        self.provenance = replace(provenance, version=toolkit_version())
        known = provenance_values(self.provenance)
        del known["figures"], known["content_id"]  # not known yet
        self.schema = pa.schema(fields, {PROVENANCE_KEY: json.dumps(known, sort_keys=True)})
        self.num_rows = 0
        self._waiting = self.schema.empty_table()

    def __enter__(self) -> "ManifestWriter":
        self._writing = self._open()
        self._writer = self._writing.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:  # as contextlib has it
        self._writing.__exit__(*problem)

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetWriter]:
        leaves = _leaf_paths(self.schema)
        plain = [leaf for leaf in leaves if leaf.startswith(("embedding.", "patches."))]
        # Dictionaries slow the reading of vectors sixfold, and compression gains nothing on them.
        how = {
            "use_dictionary": [leaf for leaf in leaves if leaf not in plain],
            "compression": {leaf: "NONE" if leaf in plain else "ZSTD" for leaf in leaves},
        }
        with replacing(self.path) as temporary, HashingFile(temporary) as file:
            with pq.ParquetWriter(pa.PythonFile(file, mode="w"), self.schema, **how) as writer:
                yield writer
                if len(self._waiting):
                    writer.write_table(self._waiting.combine_chunks())
                self.provenance = replace(self.provenance, content_id=file.digest.hexdigest())
                result = {"content_id": self.provenance.content_id, "figures": self.provenance.figures}
                writer.add_key_value_metadata({RESULT_KEY: json.dumps(result, sort_keys=True)})

    def write(self, table: pa.Table) -> None:
        """Append rows; columns are put in the declared order and cast to the declared types.

        Rows wait until a row group is full, so that the file does not depend on the pieces in which they come.
        """
        self._waiting = pa.concat_tables([self._waiting, table.select(self.schema.names).cast(self.schema)])
        self.num_rows += table.num_rows
        group_rows = PATCH_GROUP_ROWS if "patches" in self.schema.names else ROW_GROUP_ROWS
        while len(self._waiting) >= group_rows:
            self._writer.write_table(self._waiting.slice(0, group_rows).combine_chunks())
            self._waiting = self._waiting.slice(group_rows)

    def set_figures(self, **figures: object) -> None:
        """Add what was measured on the way to the provenance."""
        self.provenance = replace(self.provenance, figures={**self.provenance.figures, **figures})


def _leaf_paths(schema: pa.Schema) -> list[str]:
    """Return the Parquet names of all leaf columns, such as `image.bytes` and `embedding.list.element`."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(index).path for index in range(len(parquet))]


def toolkit_version() -> str:
    """Return the installed version of the toolkit."""
    return version("dinov2-toolkit")


def removed_path(path: Path) -> Path:
    """Return where the rows that a step dropped are listed: NAME.removed.parquet beside NAME.parquet."""
    return path.with_name(path.name.removesuffix(".parquet") + ".removed.parquet")
