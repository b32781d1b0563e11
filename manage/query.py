"""SQL over the catalog and over manifests; the answer on the terminal, or as a manifest like any other."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..store import catalog, tables
from ..store.artifact import Options, Result, check_manifest_name, make
from ..store.manifest import IMAGE_FIELDS, Manifest, ManifestWriter, Provenance, Source, embedding_field

UNEVEN = "the vectors of the answer differ in length; select from manifests of one model"
CATALOG_TABLES = ("artifacts", "inputs", "metrics", "newest")


def sql(query: str, output: str | None, force: bool, as_json: bool) -> Result | None:
    """Run a query over the catalog's tables and any 'file.parquet' it names.

    Prints the rows as tab-separated lines with a header, control characters escaped, or as {"rows": [...]}; with
    `output`, writes them as a manifest and returns its name.
    Raises ToolkitError for a query that does not only read, or that DuckDB refuses, or an answer that is no manifest.
    """
    if output is not None:
        return _make_manifest(query, output, Options(force=force))
    with _connect() as connection:
        answer = tables.select(connection, query).to_arrow_table()
    if as_json:
        print(json.dumps({"rows": answer.to_pylist()}, default=str))
        return None
    for row in (answer.column_names, *(row.values() for row in answer.to_pylist())):
        print("\t".join("" if value is None else console.plain(str(value)) for value in row))
    return None


@contextmanager
def _connect() -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database with copies of the catalog's tables, which block nobody; its errors become ToolkitErrors."""
    with catalog.connect(read_only=True) as known:
        copies = {name: known.sql(f"from {name}").to_arrow_table() for name in CATALOG_TABLES}
    with tables.connect() as connection:
        for name, copy in copies.items():
            connection.register(name, copy)
        try:
            yield connection
        except duckdb.Error as problem:
            raise ToolkitError(f"the query failed ({tables.failure(problem)}); correct it") from None


def _make_manifest(query: str, output: str, options: Options) -> Result | None:
    path = check_manifest_name(output)
    sources = tables.named_manifests(query)
    if not sources:
        raise ToolkitError("the query names no 'file.parquet'; -o makes a manifest out of manifests")
    known = [source.provenance for source in sources if source.provenance is not None]
    models = {model.content_id: model for provenance in known if (model := provenance.model())}
    roles = {provenance.role for provenance in known}
    provenance = Provenance(
        kind="images",
        command="catalog sql",
        parameters={"query": query},
        inputs=(
            *(source.source("manifest") for source in sources),
            *tables.named_lists(query),
            *(models.values() if len(models) == 1 else ()),
        ),
        role=roles.pop() if len(roles) == 1 else "pool",
    )

    def work() -> Provenance:
        with _connect() as connection:
            answer = tables.select(connection, query).to_arrow_reader(tables.BATCH_ROWS)
            return _write_answer(path, answer, sources, provenance)

    return make(output, provenance, options, describe=lambda: None, work=work)


def _write_answer(
    path: Path, answer: pa.RecordBatchReader, sources: list[Manifest], provenance: Provenance
) -> Provenance:
    """Write the rows of an answer as a manifest; return its provenance."""
    if "embedding" in answer.schema.names:
        provenance = replace(provenance, kind="embeddings")
    elif "row" in answer.schema.names:
        provenance = replace(provenance, kind="selection", base=_common_base(sources))
    fields = _fields(answer.schema)
    rows = _as_manifest(tables.answer(answer), fields, sources)
    # The first rows tell how long vectors are where the manifest they come from does not.
    first = next(rows, pa.schema(fields).empty_table())
    with ManifestWriter(path, list(first.schema), provenance) as writer:
        for table in chain([first], rows):
            if table.schema.types != first.schema.types:
                raise ToolkitError(UNEVEN)
            writer.write(table)
        writer.set_figures(rows=writer.num_rows)
    console.say(f"{path}: {writer.num_rows:,} rows")
    return writer.provenance


def _fields(answer: pa.Schema) -> list[pa.Field]:
    """Return the columns to write: those of images, then others. ToolkitError without `uri`, or with doubles."""
    if "uri" not in answer.names:
        raise ToolkitError(f"the answer has no `uri` column (it has {', '.join(answer.names)}); select it too")
    twice = sorted({name for name in answer.names if answer.names.count(name) > 1})
    if twice:
        raise ToolkitError(f"the answer has {', '.join(twice)} twice; join by `using`, or name the columns to select")
    declared = {field.name for field in IMAGE_FIELDS}
    return [*IMAGE_FIELDS, *(field for field in answer if field.name not in declared)]


def _as_manifest(
    batches: Iterator[pa.RecordBatch], fields: list[pa.Field], sources: list[Manifest]
) -> Iterator[pa.Table]:
    """Yield the answer's rows with these columns; what the query left out is null."""
    for batch in batches:
        absent = {field.name: pa.nulls(batch.num_rows, field.type) for field in fields}
        columns = {**absent, **dict(zip(batch.schema.names, batch.columns, strict=True))}
        made = _as_fields(pa.table(columns).select(list(absent)), fields)
        yield _with_fixed_vectors(made, sources) if "embedding" in made.column_names else made


def _as_fields(table: pa.Table, fields: list[pa.Field]) -> pa.Table:
    for place, field in enumerate(fields):
        column = table.column(place)
        try:
            table = table.set_column(place, field, pc.cast(column, field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
            what = f"the column `{field.name}` of the answer is {column.type}, and of a manifest {field.type}"
            raise ToolkitError(f"{what}; cast or rename it in the query") from None
    return table


def _with_fixed_vectors(table: pa.Table, sources: list[Manifest]) -> pa.Table:
    """Give the vectors, which DuckDB returns as float32 lists, the type they had in the manifest they come from."""
    kinds = [source.schema.field("embedding").type for source in sources if "embedding" in source.names()]
    vectors = table.column("embedding")
    if not all(_is_vectors(kind) for kind in (*kinds, vectors.type)):
        raise ToolkitError(f"`embedding` of the answer is {vectors.type}, not lists of floats; name it otherwise")
    lengths = pc.unique(pc.list_value_length(vectors)).to_pylist()  # None: a row without a vector
    if len(lengths) != 1 or not lengths[0]:
        raise ToolkitError(UNEVEN)
    field = embedding_field(lengths[0], (kinds[0] if kinds else vectors.type).value_type)
    return table.set_column(table.column_names.index("embedding"), field, vectors.cast(field.type))


def _is_vectors(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _common_base(sources: list[Manifest]) -> Source:
    """Return the embedding manifest that `row` counts in. Raises ToolkitError when the query mixes several."""
    known = [source.provenance.base for source in sources if source.provenance is not None]
    bases = {base.content_id: base for base in known if base is not None}
    if len(bases) != 1:
        listed = ", ".join(base.path for base in bases.values()) or "none"
        raise ToolkitError(f"`row` needs one embedding manifest (found {listed}); leave `row` out of the query")
    return next(iter(bases.values()))
