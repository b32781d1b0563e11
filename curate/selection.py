"""What dedup, cluster, retrieve and union write: a selection of images, whose columns are read from disk.

R rows of a selection.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ToolkitError
from ..store import tables
from ..store.artifact import Options
from ..store.manifest import IMAGE_FIELDS, OPTIONAL_IMAGE_FIELDS, ROW_FIELD, ManifestWriter, Provenance
from ..store.vectors import Int64
from .inputs import PLACE_FIELD, EmbeddedImages, Input, model_of


@dataclass(frozen=True)
class Selection:
    """Rows to write, R of them: images of one or several manifests, and the columns that a step adds."""

    parts: tuple[tuple[EmbeddedImages, Int64], ...]  # images and the indices of those chosen, part by part
    places: Int64  # (R,) of these rows in the output
    added: dict[pa.Field, pa.Array]  # (R,) columns in the order of the output, also dictionaries of strings

    @property
    def schema(self) -> pa.Schema:
        """Return the columns: those of images, `row`, and what was added."""
        there = {name for images, _ in self.parts for name in images.schema().names}
        there |= {field.name for field in self.added} | {ROW_FIELD.name}
        fields = [field for field in (*IMAGE_FIELDS, *OPTIONAL_IMAGE_FIELDS, ROW_FIELD) if field.name in there]
        declared = {field.name for field in fields}
        return pa.schema([*fields, *(field for field in self.added if field.name not in declared)])

    def append_column(self, field: pa.Field, values: pa.Array) -> "Selection":
        """Return the selection with one more column, or with an image column replaced."""
        return replace(self, added={**self.added, field: values})

    def batches(self) -> Iterator[pa.Table]:
        """Yield the rows in the order of the output, some thousand at a time; sorted on disk where necessary."""
        added = {field.name: values for field, values in self.added.items()}
        schema = self.schema
        read = pa.schema([*(field for field in schema if field.name not in added), PLACE_FIELD])
        start = 0
        for table in self._in_place(read):
            columns = {name: column.slice(start, len(table)) for name, column in added.items()}
            columns |= {name: table.column(name) for name in schema.names if name not in added}
            yield pa.table([columns[field.name].cast(field.type) for field in schema], schema=schema)
            start += len(table)

    def _in_place(self, read: pa.Schema) -> Iterator[pa.Table | pa.RecordBatch]:
        """Yield the columns that are read, by place."""
        ascending = []  # the parts, each in the order of its manifest
        start = 0
        for images, indices in self.parts:
            order = np.argsort(indices, kind="stable")
            ascending.append((images, indices[order], self.places[start + order]))
            start += len(indices)
        stored = (table for part in ascending for table in _stored(*part, read))
        if bool(np.all(np.diff(np.concatenate([places for _, _, places in ascending])) > 0)):
            yield from stored
            return
        with tables.connect() as connection:
            connection.register("stored", tables.stream(read, stored))
            yield from connection.sql("select * from stored order by place").to_arrow_reader(tables.BATCH_ROWS)


def _stored(images: EmbeddedImages, indices: Int64, places: Int64, read: pa.Schema) -> Iterator[pa.Table]:
    """Yield columns of the images at `indices` (R,), ascending, and their places (R,)."""
    names = [name for name in read.names if name in images.schema().names]
    start = 0
    for table in images.batches(names, indices):
        stop = start + len(table)
        columns = {field.name: pa.nulls(len(table), field.type) for field in read}
        columns |= {name: table.column(name) for name in names}
        columns |= {"row": images.rows.take(pa.array(indices[start:stop])), "place": pa.array(places[start:stop])}
        if "weight" in columns:
            columns["weight"] = pc.fill_null(columns["weight"], 1.0)
        yield pa.table(columns, schema=read)
        start = stop


def selected(pool: EmbeddedImages, indices: Int64) -> Selection:
    """Return the images at `indices` as rows to write, in that order."""
    return Selection(((pool, indices),), np.arange(len(indices)), {})


def write_table(
    path: Path, rows: Selection | pa.Table, provenance: Provenance, figures: dict[str, object]
) -> Provenance:
    """Write a manifest and return its provenance, now with content id and figures."""
    with ManifestWriter(path, list(rows.schema), provenance) as writer:
        for table in rows.batches() if isinstance(rows, Selection) else [rows]:
            writer.write(table)
        writer.set_figures(**figures)
    return writer.provenance


def selection_provenance(
    command: str, parameters: dict[str, object], output: Path, options: Options, pool: Input, *others: Input
) -> Provenance:
    """Return the provenance of a selection of the pool's images; base and role are the pool's.

    Raises ToolkitError when the output is one of the inputs.
    """
    inputs = [source for part in (pool, *others) for source in part.sources()]
    base = pool.base()
    for source in [*inputs, *([] if base is None else [base])]:
        if Path(source.path).resolve() == output.resolve():
            raise ToolkitError(f"output {output} is what the step reads; choose another -o")
    model = model_of(pool.manifest) or pool.model()  # the base's own: what the next step will compare with
    return Provenance(
        kind="selection",
        command=command,
        parameters={**parameters, "limit": options.limit, **({} if pool.where is None else {"where": pool.where})},
        seed=options.seed,
        inputs=(*inputs, *([] if model is None else [model])),
        base=base,
        role="pool" if pool.manifest.provenance is None else pool.manifest.provenance.role,
    )
