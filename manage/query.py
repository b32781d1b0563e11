"""SQL over the catalog and over manifests; the answer on the terminal, or as a manifest like any other."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa

from .. import console
from ..errors import ToolkitError
from ..store import catalog
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date
from ..store.manifest import IMAGE_FIELDS, Manifest, ManifestWriter, Provenance, Source, embedding_field, open_manifest

PARQUET_NAME = re.compile(r"""'([^']+\.parquet)'""")


def sql(query: str, output: str | None, force: bool, as_json: bool) -> Result | None:
    """Run a query over the catalog's tables and any 'file.parquet' it names.

    Prints the rows as tab-separated lines with a header, or as {"rows": [...]}; with `output`, writes them as a
    manifest and returns its name.
    Raises ToolkitError for a query that DuckDB refuses, or an answer that cannot be a manifest.
    """
    if output is not None:
        return _write(query, output, Options(force=force))
    with catalog.connect(read_only=True) as connection:
        answer = _run(connection, query)
    rows = answer.to_pylist()
    if as_json:
        print(json.dumps({"rows": rows}, default=str))
    else:
        print("\t".join(answer.column_names))
        for row in rows:
            print("\t".join("" if value is None else str(value) for value in row.values()))
    return None


def _run(connection: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    try:
        relation = connection.sql(query)
        if relation is None:
            raise ToolkitError(f"{query!r} has no answer; ask with select")
        return relation.to_arrow_table()
    except duckdb.Error as problem:
        raise ToolkitError(f"the query failed ({' '.join(str(problem).split())}); mend it") from None


def _write(query: str, output: str, options: Options) -> Result:
    path = check_manifest_name(output)
    sources = [open_manifest(Path(name)) for name in dict.fromkeys(PARQUET_NAME.findall(query))]
    if not sources:
        raise ToolkitError("the query names no 'file.parquet'; -o makes a manifest out of manifests")
    known = [source.provenance for source in sources if source.provenance is not None]
    models = {model.content_id: model for provenance in known if (model := provenance.model())}
    roles = {provenance.role for provenance in known}
    provenance = Provenance(
        kind="images",
        command="catalog sql",
        parameters={"query": query},
        inputs=(*(source.source("manifest") for source in sources), *(models.values() if len(models) == 1 else ())),
        role=roles.pop() if len(roles) == 1 else "pool",
    )
    if is_up_to_date(path, provenance, options):
        return Result(output)

    start = time.monotonic()
    with catalog.connect(read_only=True) as connection:
        table = _with_image_columns(_run(connection, query))
    if "embedding" in table.column_names:
        table = _with_fixed_vectors(table, sources)
        provenance = replace(provenance, kind="embeddings")
    elif "row" in table.column_names:
        provenance = replace(provenance, kind="selection", base=_common_base(sources))
    with ManifestWriter(path, list(table.schema), provenance) as writer:
        writer.write(table)
    catalog.record(path, writer.provenance, time.monotonic() - start)
    console.say(f"{output}: {writer.num_rows:,} rows")
    return Result(output, {"rows": writer.num_rows})


def _with_image_columns(answer: pa.Table) -> pa.Table:
    """Put the image columns first, at their declared types; what the query left out is null."""
    if "uri" not in answer.column_names:
        raise ToolkitError(f"the answer has no `uri` column (it has {', '.join(answer.column_names)}); select it too")
    columns = {
        field.name: answer.column(field.name).cast(field.type)
        if field.name in answer.column_names
        else pa.nulls(answer.num_rows, field.type)
        for field in IMAGE_FIELDS
    }
    columns.update({name: answer.column(name) for name in answer.column_names if name not in columns})
    return pa.table(columns)


def _with_fixed_vectors(table: pa.Table, sources: list[Manifest]) -> pa.Table:
    """Give the vectors, which DuckDB returns as float32 lists, the type they had in the manifest they come from."""
    stored = next(source.schema.field("embedding").type for source in sources if "embedding" in source.names())
    vectors = table.column("embedding").combine_chunks()
    values = vectors.flatten().cast(stored.value_type)
    dim = len(values) // max(len(vectors), 1)
    if len(values) != dim * len(vectors):
        raise ToolkitError("the vectors of the answer differ in length; select from manifests of one model")
    column = pa.FixedSizeListArray.from_arrays(values, max(dim, 1))
    field = embedding_field(max(dim, 1), stored.value_type)
    return table.set_column(table.column_names.index("embedding"), field, column.cast(field.type))


def _common_base(sources: list[Manifest]) -> Source:
    """Return the embedding manifest that `row` counts in.

    Raises ToolkitError when the query mixes several.
    """
    bases: dict[str, Source] = {}
    for source in sources:
        base = source.provenance.base if source.provenance else None
        if base is not None:
            bases[base.content_id] = base
    if len(bases) != 1:
        listed = ", ".join(base.path for base in bases.values()) or "none"
        raise ToolkitError(f"`row` needs one embedding manifest (found {listed}); leave `row` out of the query")
    return next(iter(bases.values()))
