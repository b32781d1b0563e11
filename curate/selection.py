"""What dedup, cluster and retrieve write: a selection of images, read again from disk row by row.

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
    """Rows to write, R of them: images of one or several manifests, and what a step found of each."""

    parts: tuple[tuple[EmbeddedImages, Int64], ...]  # images and which of them, one part after the other
    places: Int64  # (R,) where each of these rows goes
    added: dict[pa.Field, pa.Array]  # (R,) columns in the order of what is written, also dictionaries of strings

    @property
    def num_rows(self) -> int:
        """Return R."""
        return len(self.places)

    @property
    def schema(self) -> pa.Schema:
        """Return the columns: those of images, `row`, and what was added."""
        there = {name for images, _ in self.parts for name in images.schema().names}
        there |= {field.name for field in self.added} | {ROW_FIELD.name}
        fields = [field for field in (*IMAGE_FIELDS, *OPTIONAL_IMAGE_FIELDS, ROW_FIELD) if field.name in there]
        declared = {field.name for field in fields}
        return pa.schema([*fields, *(field for field in self.added if field.name not in declared)])

    def append_column(self, field: pa.Field, values: pa.Array) -> "Selection":
        """Return the selection with one more column, or with another instead of an image column."""
        return replace(self, added={**self.added, field: values})

    def batches(self) -> Iterator[pa.Table]:
        """Yield the rows some thousand at a time; those that do not rise are sorted on disk if they must."""
        added = {field.name: values for field, values in self.added.items()}
        schema = self.schema
        read = pa.schema([*(field for field in schema if field.name not in added), PLACE_FIELD])
        start = 0
        for batch in self._in_place(read):
            given = [
                added[field.name].slice(start, batch.num_rows) if field.name in added else batch.column(field.name)
                for field in schema
            ]
            columns = [column.cast(field.type) for column, field in zip(given, schema, strict=True)]
            yield pa.table(columns, schema=schema)
            start += batch.num_rows

    def _in_place(self, read: pa.Schema) -> Iterator[pa.Table | pa.RecordBatch]:
        rising = [np.argsort(indices, kind="stable") for _, indices in self.parts]
        starts = np.cumsum([0, *(len(by) for by in rising)])
        order = np.concatenate([by + start for by, start in zip(rising, starts, strict=False)])
        places = self.places[order]
        if bool(np.all(np.diff(places) > 0)):
            yield from self._rising(read, order)
            return
        with tables.connect() as connection:
            connection.register("taken", tables.stream(read, self._rising(read, order)))
            yield from connection.sql("select * from taken order by place").to_arrow_reader(tables.BATCH_ROWS)

    def _rising(self, read: pa.Schema, order: Int64) -> Iterator[pa.Table]:
        """Yield the rows of part after part as they stand on disk; the `order` (R,) of `places` goes with them."""
        start = 0
        part_start = 0
        for images, indices in self.parts:
            names = [name for name in read.names if name in images.schema().names]
            for table in images.batches(names, indices[order[part_start : part_start + len(indices)] - part_start]):
                mine = order[start : start + table.num_rows]
                columns = {name: table.column(name) for name in names}
                columns[ROW_FIELD.name] = images.rows.take(pa.array(indices[mine - part_start]))
                columns[PLACE_FIELD.name] = pa.array(self.places[mine])
                columns = {**{field.name: pa.nulls(table.num_rows, field.type) for field in read}, **columns}
                if "weight" in columns:
                    columns["weight"] = pc.fill_null(columns["weight"], 1.0)
                yield pa.table(columns, schema=read)
                start += table.num_rows
            part_start += len(indices)


def selected(pool: EmbeddedImages, indices: Int64) -> Selection:
    """Return the images at `indices` as rows to write, in that order."""
    return Selection(((pool, indices),), np.arange(len(indices)), {})


def write_table(
    path: Path, table: pa.Table | Selection, provenance: Provenance, figures: dict[str, object]
) -> Provenance:
    """Write a manifest and return its provenance, now with content id and figures."""
    with ManifestWriter(path, list(table.schema), provenance) as writer:
        for part in [table] if isinstance(table, pa.Table) else table.batches():
            writer.write(part)
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
