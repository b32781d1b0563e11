"""Parquet files that are whole as files, and wrong as manifests: types, values, ids, rows, lineage."""

import json
from collections.abc import Callable
from io import BytesIO
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dinov2_toolkit.store.manifest import PROVENANCE_KEY, RESULT_KEY
from dinov2_toolkit.tests.fuzz.mutate import TEXTS, mutated_json

Change = Callable[[pa.Table, Random], pa.Table]

URIS = (
    "",
    ".",
    "/",
    "a/x",
    "/dev/zero",
    "file://%00",
    "file:///etc/passwd%ff",
    "parquet://pool.parquet?row=0",
    "tar://x",
    "parquet://",
    "parquet://?row=1",
    "parquet:///dev/zero?row=0",
    "parquet://hf.parquet?row=99",
    "s3://b/k",
    "~",
    "http://localhost:1/a.png",
    "a\nb.png",
    "a/*.png",
    "[0].png",
    "'",
    '"',
    "x" * 5_000,
    "\x1b[2J.png",
    "é\u202e.png",
)
ROWS = (-1, 0, 1, 15, 16, 17, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
REALS = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-300, 0.0, -0.0, 65504.0, 1.5, -1.0)
TYPES = (
    pa.string(),
    pa.large_string(),
    pa.int8(),
    pa.int64(),
    pa.uint64(),
    pa.float16(),
    pa.float32(),
    pa.float64(),
    pa.bool_(),
    pa.binary(),
    pa.large_binary(),
    pa.null(),
    pa.timestamp("us"),
    pa.date32(),
    pa.decimal128(20, 2),
    pa.list_(pa.float32()),
    pa.list_(pa.string()),
    pa.struct({"bytes": pa.binary()}),
    pa.dictionary(pa.int8(), pa.string()),
    pa.list_(pa.float64(), 3),
    pa.list_(pa.list_(pa.float16())),
    pa.map_(pa.string(), pa.int32()),
)


def mutated_table(data: bytes, random: Random) -> bytes:
    """Return a Parquet file with one to three changes to its columns, rows or metadata."""
    with pq.ParquetFile(BytesIO(data)) as file:
        table, metadata = file.read(use_threads=False), dict(file.metadata.metadata or {})
    metadata.pop(b"ARROW:schema", None)
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.25:
            metadata = _changed_metadata(metadata, random)
        else:
            table = random.choice(CHANGES)(table, random)
    sink = BytesIO()
    more = {key: value for key, value in metadata.items() if key == RESULT_KEY.encode()}
    schema = table.schema.with_metadata({key: value for key, value in metadata.items() if key not in more})
    how: dict[str, Any] = {
        "row_group_size": random.choice((1, 5, None)),
        "compression": random.choice(("none", "zstd")),
    }
    group = how.pop("row_group_size")
    try:
        with pq.ParquetWriter(sink, schema, use_dictionary=random.random() < 0.5, **how) as writer:
            writer.write_table(pa.table(table.columns, schema=schema), group)
            writer.add_key_value_metadata(more)
    except pa.ArrowInvalid:  # nulls where the type allows none: no writer writes it
        return mutated_table(data, random)
    return sink.getvalue()


def _changed_metadata(metadata: dict[bytes, bytes], random: Random) -> dict[bytes, bytes]:
    if not metadata:
        return {random.choice((PROVENANCE_KEY, RESULT_KEY, "huggingface")).encode(): b'{"info": {"features": 1}}'}
    key = random.choice(list(metadata))
    if random.random() < 0.2:
        return {other: value for other, value in metadata.items() if other != key}
    try:
        text = mutated_json(metadata[key].decode(), random)
    except (ValueError, RecursionError):  # it has been changed before
        text = random.choice(TEXTS)
    return {**metadata, key: text.encode("utf-8", "replace")}


def _place(table: pa.Table, random: Random) -> int:
    """Return a column: half of them one that steps read as more than text."""
    special = (
        "embedding",
        "row",
        "uri",
        "path",
        "image",
        "image_id",
        "weight",
        "width",
        "neighbors",
        "query_id",
        "mask",
    )
    known = [place for place, name in enumerate(table.column_names) if name in special]
    return random.choice(known if known and random.random() < 0.5 else range(table.num_columns))


def _set(table: pa.Table, place: int, values: pa.Array) -> pa.Table:
    return table.set_column(place, table.column_names[place], values)


def _other_type(table: pa.Table, random: Random) -> pa.Table:
    place, kind = _place(table, random), random.choice(TYPES)
    try:
        return _set(table, place, table.column(place).combine_chunks().cast(kind))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return _set(table, place, pa.nulls(table.num_rows, kind))


def _other_values(table: pa.Table, random: Random) -> pa.Table:
    """Put extremes of its own type in place of some values of a column."""
    place = _place(table, random)
    name, kind = table.column_names[place], table.schema.field(place).type
    values = table.column(place).to_pylist()
    for row in random.sample(range(len(values)), random.choice((1, len(values)))) if values else []:
        if random.random() < 0.3:
            values[row] = None
        elif pa.types.is_string(kind):
            values[row] = random.choice(URIS if name in ("uri", "path", "mask") else (*TEXTS, *URIS))
        elif pa.types.is_integer(kind):
            values[row] = random.choice(ROWS)
        elif pa.types.is_floating(kind):
            values[row] = random.choice(REALS)
        elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            values[row] = _other_list(values[row], random)
        else:
            values[row] = values[random.randrange(len(values))]
    loose = pa.list_(pa.float64()) if "list" in str(kind) and name == "embedding" else kind
    for attempt in (kind, loose, pa.int64(), pa.float64(), None):
        try:
            return _set(table, place, pa.array(values, attempt))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError, TypeError):
            continue
    return table


def _other_list(values: Any, random: Random) -> Any:
    values = list(values or [0.0])
    match random.randrange(5):
        case 0:
            return values[: random.randrange(len(values) + 1)]
        case 1:
            return values * 3
        case 2:
            return [0.0] * len(values)
        case _:
            values[random.randrange(len(values))] = random.choice((*REALS, None))
            return values


def _doubles(table: pa.Table, random: Random) -> pa.Table:
    """Make all values of a column the same, as ids must not be."""
    place = _place(table, random)
    return _set(table, place, table.column(place).take(pa.array(np.zeros(table.num_rows, np.int64))))


def _shuffled(table: pa.Table, random: Random) -> pa.Table:
    place = _place(table, random)
    order = random.sample(range(table.num_rows), table.num_rows)
    return _set(table, place, table.column(place).take(pa.array(order, pa.int64())))


def _without(table: pa.Table, random: Random) -> pa.Table:
    return table.remove_column(_place(table, random)) if table.num_columns > 1 else table


def _renamed(table: pa.Table, random: Random) -> pa.Table:
    """Give a column the name of another or a strange one."""
    names = table.column_names
    strange = (
        "embedding",
        "row",
        "uri",
        "path",
        "label",
        "image",
        "",
        "a.b",
        "é\n\x1b[0m",
        "'",
        '"',
        "cluster_0",
        "UriX",
    )
    names[_place(table, random)] = random.choice((*names, *strange))
    return table.rename_columns(names)


def _other_rows(table: pa.Table, random: Random) -> pa.Table:
    count = random.choice((0, 0, 1, 2, table.num_rows, 300))
    rows = [random.randrange(table.num_rows) for _ in range(count)] if table.num_rows else []
    return table.take(pa.array(rows, pa.int64()))


def _more_columns(table: pa.Table, random: Random) -> pa.Table:
    name = random.choice(("row", "weight", "source", "label", "mask", "embedding", "cluster_0", "rank", "similarity"))
    kind = random.choice(TYPES)
    return table.append_column(name, pa.nulls(table.num_rows, kind))


CHANGES: tuple[Change, ...]
CHANGES = (
    _other_type,
    _other_type,
    _other_values,
    _other_values,
    _other_values,
    _doubles,
    _shuffled,
    _without,
    _renamed,
    _other_rows,
    _more_columns,
)


def other_lineage(data: bytes, random: Random, foreign: str) -> bytes:
    """Return our own Parquet file with an input or base that is itself, missing, or somebody else's."""
    with pq.ParquetFile(BytesIO(data)) as file:
        table, metadata = file.read(use_threads=False), dict(file.metadata.metadata or {})
    if PROVENANCE_KEY.encode() not in metadata:
        return data
    provenance = json.loads(metadata[PROVENANCE_KEY.encode()])
    result = json.loads(metadata[RESULT_KEY.encode()])
    content_id = random.choice((result["content_id"], "0" * 32, "../../foreign/planted", "", "/" * 40))
    path = random.choice(
        (foreign, "../foreign/thesis.txt", "/dev/zero", "pool.parquet", "unique.parquet", "", "\0", "x" * 5_000)
    )
    source = {"role": random.choice(("base", "model", "manifest", "pool", "")), "path": path, "content_id": content_id}
    provenance[random.choice(("base", "inputs"))] = source
    if isinstance(provenance["inputs"], dict):
        provenance["inputs"] = [source] * random.choice((1, 3))
    if random.random() < 0.3:
        result["content_id"] = content_id
    sink = BytesIO()
    schema = table.schema.with_metadata({PROVENANCE_KEY: json.dumps(provenance)})
    with pq.ParquetWriter(sink, schema) as writer:
        writer.write_table(table.replace_schema_metadata(schema.metadata))
        writer.add_key_value_metadata({RESULT_KEY: json.dumps(result)})
    return sink.getvalue()
