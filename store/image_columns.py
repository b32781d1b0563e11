"""The image columns of any manifest, ours or a Parquet file of other origin."""

from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import ToolkitError
from .json_text import json_object
from .manifest import IMAGE_FIELDS, OPTIONAL_IMAGE_FIELDS, SHOWN_BYTES, Manifest, Piece
from .vectors import Int64

URI_COLUMNS = ("uri", "path", "image", "file_name")


def read_images(manifest: Manifest, limit: int | None = None, label_column: str = "label") -> pa.Table:
    """Return image_id, uri, width, height and label of every row, and source and weight where there are such columns.

    Of a foreign file a `uri`, `path` or `image` column is enough (Hugging Face's `image: struct<bytes, path>`
    becomes parquet:// names); what it does not say is null. Relative names count from its folder; labels become
    strings, Hugging Face's class numbers their names.
    """
    batches = image_batches(manifest, limit=limit, label_column=label_column)
    return pa.concat_tables([image_schema(manifest).empty_table(), *batches])


def image_schema(manifest: Manifest) -> pa.Schema:
    """Return the image columns that `read_images` gives for a manifest."""
    present = manifest.names()
    return pa.schema([*IMAGE_FIELDS, *(field for field in OPTIONAL_IMAGE_FIELDS if field.name in present)])


def image_batches(
    manifest: Manifest,
    columns: Collection[str] | None = None,
    *,
    more: Collection[str] = (),
    rows: Int64 | None = None,
    limit: int | None = None,
    label_column: str = "label",
) -> Iterator[pa.Table]:
    """Yield the same some thousand rows at a time, holding no more.

    Args:
        columns: names of image columns to read; all by default.
        more: other columns of the manifest that come along as they are.
        rows: (R,) the rows wanted, rising; row groups without any are not read. All by default.
        limit: the first so many rows of the manifest.
    """
    schema = image_schema(manifest)
    wanted = [field for field in schema if columns is None or field.name in columns]
    made_from = _made_from(manifest, [field.name for field in wanted], label_column)
    fields = [*wanted, *(manifest.schema.field(name) for name in more)]
    read = list(dict.fromkeys([*made_from.values(), *more]))
    for piece in manifest.pieces(read, limit, rows):
        for name in made_from.values():
            _check_text(manifest, name, piece)
        made = []
        for field in wanted:
            if field.name == "uri":
                made.append(column_uris(manifest, made_from.get("uri"), piece))
            elif field.name not in made_from:
                made.append(pa.nulls(len(piece.rows), field.type))
            elif field.name == "label":
                made.append(_labels(manifest, label_column, piece.batch.column(label_column)))
            else:
                made.append(_cast(piece.batch.column(field.name), field, manifest))
        others = [piece.batch.column(name) for name in more]
        yield pa.Table.from_arrays([*made, *others], schema=pa.schema(fields).remove_metadata())


def _check_text(manifest: Manifest, name: str, piece: Piece) -> None:
    """Raise ToolkitError for the first text of a column that is not UTF-8; Arrow takes a file's word for it."""
    column = piece.batch.column(name)
    if pa.types.is_struct(column.type) and column.type.get_field_index("path") >= 0:
        column = pc.struct_field(column, "path")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, value in zip(piece.rows.tolist(), column.cast(pa.large_binary()).to_pylist(), strict=True):
            if value is not None and value.decode(errors="replace").encode() != value:
                what = f"`{name}` of {piece.part} is not UTF-8 in row {row} ({value[:SHOWN_BYTES]!r})"
                raise ToolkitError(f"{what}; correct it") from None
        raise


def has_images(manifest: Manifest) -> bool:
    """Tell whether the manifest names images at all."""
    return _uri_column(manifest) is not None


def _made_from(manifest: Manifest, wanted: list[str], label_column: str) -> dict[str, str]:
    """Return the manifest's column from which each image column is made, where one must be read."""
    present = manifest.names()
    made_from = {name: name for name in wanted if name in present and name not in ("uri", "label")}
    if "label" in wanted and label_column in present:
        made_from["label"] = label_column
    name = _uri_column(manifest)
    if "uri" in wanted and name is not None:
        kind = manifest.schema.field(name).type
        is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if not is_bytes and not (pa.types.is_struct(kind) and _holds_all_bytes(manifest, name)):
            made_from["uri"] = name
    return made_from


def _uri_column(manifest: Manifest) -> str | None:
    return next((name for name in URI_COLUMNS if name in manifest.names()), None)


def column_uris(manifest: Manifest, name: str | None, piece: Piece) -> pa.Array:
    """Return the names of a piece's images, made from column `name`; None: by row, for the file holds their bytes."""
    if name is None:
        column = _uri_column(manifest)
        return pa.nulls(len(piece.rows), pa.string()) if column is None else row_uris(piece, column)
    kind = manifest.schema.field(name).type
    if pa.types.is_struct(kind):
        return _struct_uris(manifest, name, piece)
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(held) or pa.types.is_large_string(held)):
        raise ToolkitError(f"the `{name}` column of {manifest.path} is {kind}; it must hold names or encoded images")
    column = pc.cast(piece.batch.column(name), pa.string())
    return absolute_uris(column, manifest.path) if manifest.provenance is None else column  # ours are absolute already


def _struct_uris(manifest: Manifest, name: str, piece: Piece) -> pa.Array:
    """Name an image by its row where the file holds its bytes, by its path where it does not."""
    structs = piece.batch.column(name)
    holds = pc.is_valid(pc.struct_field(structs, "bytes"))
    has_path = structs.type.get_field_index("path") >= 0
    paths = pc.struct_field(structs, "path") if has_path else pa.nulls(len(structs), pa.string())
    return pc.if_else(holds, row_uris(piece, name), absolute_uris(pc.cast(paths, pa.string()), manifest.path))


def _holds_all_bytes(manifest: Manifest, name: str) -> bool:
    """Tell by the footers alone, for the bytes may be many gigabytes, that no row lacks them."""
    for metadata in map(pq.read_metadata, manifest.parts):
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks = {chunk.path_in_schema: chunk for chunk in map(group.column, range(group.num_columns))}
            chunk = chunks.get(f"{name}.bytes")
            if chunk is None or chunk.statistics is None or chunk.statistics.null_count != 0:
                return False
    return True


def row_uris(piece: Piece, name: str) -> pa.Array:
    """Return names by row of what the file itself holds in a column."""
    column = "" if name == "image" else f"&column={quote(name)}"
    rows = pc.cast(pa.array(piece.rows), pa.string())
    return pc.binary_join_element_wise(f"parquet://{quote(str(piece.part.absolute()))}?row=", rows, column, "")


def absolute_uris(uris: pa.Array, manifest_path: Path) -> pa.Array:
    """Return names as they are where they are URLs or absolute paths, else from the manifest's folder."""
    is_whole = pc.or_(pc.match_substring(uris, "://"), pc.starts_with(uris, "/"))
    if pc.all(is_whole).as_py() is not False:  # of nothing but nulls, null
        return uris
    folder = manifest_path.absolute().parent
    joined = [None if name is None else str(folder / name) for name in uris.to_pylist()]
    return pc.if_else(is_whole, uris, pa.array(joined, pa.string()))


def _labels(manifest: Manifest, name: str, column: pa.Array) -> pa.Array:
    names = _class_names(manifest, name)
    if names and pa.types.is_integer(column.type):
        has_name = pc.and_(pc.greater_equal(column, 0), pc.less(column, len(names)))  # -1: a test split without labels
        return pc.take(pa.array(names, pa.string()), pc.if_else(has_name, column, None))
    return _cast(column, pa.field(name, pa.string()), manifest)


def read_as(manifest: Manifest, fields: Collection[pa.Field]) -> pa.Table:
    """Return columns of a manifest as the types of `fields`. Raises ToolkitError where one cannot be read so."""
    table = manifest.read([field.name for field in fields])
    columns = [_cast(column, field, manifest) for column, field in zip(table.columns, fields, strict=True)]
    return pa.table(columns, schema=pa.schema(fields))


def _cast(column: pa.Array, field: pa.Field, manifest: Manifest) -> pa.Array:
    try:
        return pc.cast(column, field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        what = f"the `{field.name}` column of {manifest.path} is {column.type}"
        raise ToolkitError(f"{what} and cannot be read as {field.type}; rename or drop it") from None


def _class_names(manifest: Manifest, column: str) -> list[str]:
    """Return the class names that Hugging Face's `datasets` keeps in the schema metadata."""
    text = (manifest.schema.metadata or {}).get(b"huggingface")
    if text is None:
        return []
    try:
        feature = json_object(text)["info"]["features"].get(column)
        names = feature.get("names", []) if isinstance(feature, dict) else []
        return [str(name) for name in names]
    except KeyError:
        return []
    except (ValueError, TypeError, AttributeError):
        shown = ascii(text[:SHOWN_BYTES].decode(errors="replace"))
        what = f"{manifest.path} has metadata 'huggingface' that names no features ({shown})"
        raise ToolkitError(f"{what}; write the file again, or without it") from None
