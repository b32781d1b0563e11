"""The image columns of any manifest, ours or a Parquet file of other origin."""

import json
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import ToolkitError
from .manifest import IMAGE_FIELDS, OPTIONAL_IMAGE_FIELDS, Manifest

URI_COLUMNS = ("uri", "path", "image", "file_name")


def read_images(manifest: Manifest, limit: int | None = None, label_column: str = "label") -> pa.Table:
    """Return image_id, uri, width, height and label of every row, and source and weight where there are such columns.

    Of a foreign file a `uri`, `path` or `image` column is enough (Hugging Face's `image: struct<bytes, path>`
    becomes parquet:// names); what it does not say is null. Relative names count from its folder; labels become
    strings, Hugging Face's class numbers their names.
    """
    present = manifest.names()
    optional = [field for field in OPTIONAL_IMAGE_FIELDS if field.name in present]
    schema = pa.schema([*IMAGE_FIELDS, *optional])
    wanted = [field.name for field in schema if field.name in present and field.name not in ("uri", "label")]
    table = manifest.read(wanted, limit) if wanted else None
    num_rows = manifest.num_rows if limit is None else min(limit, manifest.num_rows)
    columns = {name: pa.nulls(num_rows, schema.field(name).type) for name in schema.names}
    if table is not None:
        columns.update({name: _cast(table.column(name), schema.field(name), manifest) for name in wanted})
    columns["uri"] = _uris(manifest, limit, num_rows)
    columns["label"] = _labels(manifest, label_column, limit, num_rows)
    return pa.table(columns, schema=schema)


def has_images(manifest: Manifest) -> bool:
    """Tell whether the manifest names images at all."""
    return any(name in manifest.names() for name in URI_COLUMNS)


def _uris(manifest: Manifest, limit: int | None, num_rows: int) -> pa.ChunkedArray | pa.Array:
    name = next((name for name in URI_COLUMNS if name in manifest.names()), None)
    if name is None:
        return pa.nulls(num_rows, pa.string())
    kind = manifest.schema.field(name).type
    if pa.types.is_struct(kind):
        return _struct_uris(manifest, name, limit, num_rows)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.array(_row_uris(manifest, name, num_rows), pa.string())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)):
        raise ToolkitError(f"the `{name}` column of {manifest.path} is {kind}; it must hold names or encoded images")
    column = pc.cast(manifest.read([name], limit).column(name), pa.string())
    if manifest.provenance is not None:
        return column  # ours are absolute already
    return pa.array([_absolute(uri, manifest.path) for uri in column.to_pylist()], pa.string())


def _struct_uris(manifest: Manifest, name: str, limit: int | None, num_rows: int) -> pa.Array:
    """Name an image by its row where the file holds its bytes, by its path where it does not."""
    inside = _row_uris(manifest, name, num_rows)
    if _holds_all_bytes(manifest, name):
        return pa.array(inside, pa.string())
    uris: list[str | None] = []
    for batch in manifest.batches([name], limit):
        structs = batch.column(0)
        holds = pc.is_valid(pc.struct_field(structs, "bytes")).to_pylist()
        has_path = structs.type.get_field_index("path") >= 0
        paths = pc.struct_field(structs, "path").to_pylist() if has_path else [None] * len(holds)
        for held, path in zip(holds, paths, strict=True):
            uris.append(inside[len(uris)] if held else _absolute(path, manifest.path))
    return pa.array(uris, pa.string())


def _holds_all_bytes(manifest: Manifest, name: str) -> bool:
    """Tell by the footers alone, for the bytes may be many gigabytes, that no row lacks them."""
    for part in manifest.parts:
        metadata = pq.read_metadata(part)
        for group in range(metadata.num_row_groups):
            chunks = [metadata.row_group(group).column(index) for index in range(metadata.num_columns)]
            statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{name}.bytes"]
            if not statistics or statistics[0] is None or statistics[0].null_count != 0:
                return False
    return True


def _row_uris(manifest: Manifest, name: str, num_rows: int) -> list[str]:
    column = "" if name == "image" else f"&column={quote(name)}"
    uris: list[str] = []
    for part in manifest.parts:
        place = quote(str(part.absolute()))
        uris += [f"parquet://{place}?row={row}{column}" for row in range(pq.read_metadata(part).num_rows)]
    return uris[:num_rows]


def _absolute(uri: str | None, manifest_path: Path) -> str | None:
    if uri is None or "://" in uri:
        return uri
    return str(manifest_path.absolute().parent / uri)


def _labels(manifest: Manifest, name: str, limit: int | None, num_rows: int) -> pa.ChunkedArray | pa.Array:
    if name not in manifest.names():
        return pa.nulls(num_rows, pa.string())
    column = manifest.read([name], limit).column(name)
    names = _class_names(manifest, name)
    if names and pa.types.is_integer(column.type):
        has_name = pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names)))  # -1: a test split without labels
        return pc.take(pa.array(names, pa.string()), pc.if_else(has_name, column, None))
    return _cast(column, pa.field(name, pa.string()), manifest)


def _cast(column: pa.ChunkedArray, field: pa.Field, manifest: Manifest) -> pa.ChunkedArray:
    try:
        return pc.cast(column, field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ToolkitError(
            f"the `{field.name}` column of {manifest.path} is {column.type} and cannot be read as {field.type};"
            " rename or drop it"
        ) from None


def _class_names(manifest: Manifest, column: str) -> list[str]:
    """Return the class names that Hugging Face's `datasets` keeps in the schema metadata."""
    text = (manifest.schema.metadata or {}).get(b"huggingface")
    if text is None:
        return []
    features = json.loads(text).get("info", {}).get("features", {})
    feature = features.get(column)
    return [str(name) for name in feature.get("names", [])] if isinstance(feature, dict) else []
