"""SQL over the rows of manifests, which stream through it: in bounded memory, whatever their number and names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any  # of a row's values

import duckdb
import pyarrow as pa

from ..errors import ToolkitError
from ..store import tables
from ..store.content_id import data_content_id
from ..store.image_columns import image_batches, image_schema
from ..store.manifest import Manifest, Provenance, Source, open_manifest, removed_path
from .lineage import locate

Row = dict[str, Any]
KEY = "create macro image_key(image_id, uri) as md5_number(concat_ws(chr(0), image_id, uri))"
IMAGE_COLUMNS = ("image_id", "uri", "width", "height", "label")


@contextmanager
def asking(**rows: pa.RecordBatchReader) -> Iterator["Asking"]:
    """Open a database with streams under their names; each can be read once."""
    with tables.connect() as connection:
        connection.execute(KEY)
        for name, reader in rows.items():
            connection.register(name, reader)
        yield Asking(connection)


class Asking:
    """Answers queries as lists of rows."""

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection

    def __call__(self, query: str, **parameters: object) -> list[Row]:
        """Return the rows of an answer; `$name` in the query stands for a parameter."""
        result = self.connection.execute(query, parameters or None)
        names = [column[0] for column in result.description or ()]
        return [dict(zip(names, values, strict=True)) for values in result.fetchall()]

    def keep(self, table: str, query: str, **parameters: object) -> None:
        """Keep an answer as a table, on disk where it does not fit into memory."""
        self.connection.execute(f"create temp table {table} as {query}", parameters or None)


def ask(query: str, parameters: dict[str, object] | None = None, **rows: pa.RecordBatchReader) -> list[Row]:
    """Return the answer to one query over streams."""
    with asking(**rows) as answer:
        return answer(query, **(parameters or {}))


def stored(manifest: Manifest, columns: Sequence[str]) -> pa.RecordBatchReader:
    """Return columns of a manifest as a stream; one that it does not have is null."""
    present = [name for name in columns if name in manifest.names()]
    schema = pa.schema(
        [manifest.schema.field(name) if name in present else pa.field(name, pa.null()) for name in columns]
    ).remove_metadata()
    return tables.stream(schema, (_with_nulls(batch, schema) for batch in manifest.batches(present)))


def _with_nulls(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    nulls = pa.nulls(batch.num_rows)
    columns = [batch.column(name) if name in batch.schema.names else nulls for name in schema.names]
    return pa.table(columns, schema=schema)


def images(
    manifest: Manifest, columns: Sequence[str] = IMAGE_COLUMNS, more: Sequence[str] = ()
) -> pa.RecordBatchReader:
    """Return image columns of a manifest, ours or foreign, as a stream, and some others as they are stored."""
    fields = [field for field in image_schema(manifest) if field.name in columns]
    fields += [manifest.schema.field(name) for name in more]
    return tables.stream(pa.schema(fields).remove_metadata(), image_batches(manifest, columns, more=more))


def quoted(name: str) -> str:
    """Return the name of a column as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def find(source: Source, near: Path) -> Manifest | None:
    """Return the manifest that a step read, wherever it is now; None where it is gone, or another stands there."""
    path = locate(source, near)
    return None if path is None else opened(path)


def opened(path: Path) -> Manifest | None:
    """Return the manifest at a path; None where there is none that can be read."""
    try:
        return as_written(open_manifest(path))
    except ToolkitError:
        return None


def as_written(manifest: Manifest) -> Manifest:
    """Return a manifest of ours that no one has changed, or a foreign one.

    Vectors, which a report does not read, may be many gigabytes, and are not read here. Raises ToolkitError when it was
    changed: what is shown of it relies on how a step writes it.
    """
    if manifest.provenance is None or manifest.path.is_dir() or "embedding" in manifest.names():
        return manifest
    if data_content_id(manifest.path) != manifest.content_id:
        raise ToolkitError(f"{manifest.path} is not as it was written; make it again")
    return manifest


def removed_rows(manifest: Manifest) -> Manifest | None:
    """Return the rows that the step which made a manifest removed; None where that list is gone or of other work."""
    return beside(manifest, removed_path(manifest.path))


def beside(manifest: Manifest, path: Path) -> Manifest | None:
    """Return what the step which made a manifest wrote beside it; None where that is gone or of other work."""
    side, made = opened(path), manifest.provenance
    if side is None or made is None or side.provenance is None or not side.provenance.same_work(made):
        return None
    return side


def sources(provenance: Provenance, *roles: str) -> list[Source]:
    """Return the inputs of a step in these roles."""
    return [source for source in provenance.inputs if source.role in roles]
