"""Several manifests as one, every image once, each part drawn by training as often as it is told to.

What was retrieved and what was sampled evenly, together, make better features than either (section 3.1 of Siméoni et
al. 2025, DINOv3); a clean pool and what is new of another make the grown pool.

N images of all parts, R different ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..store import tables
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ..store.manifest import (
    IMAGE_FIELDS,
    OPTIONAL_IMAGE_FIELDS,
    ROW_FIELD,
    ManifestWriter,
    Provenance,
    embedding_field,
    open_manifest,
)
from ..store.memory import memory_budget
from ..store.vectors import Float64, Int64
from .inputs import EmbeddedImages, Input, check_same_model, open_input, read_embedded, read_unembedded
from .selection import Selection
from .weighted_parts import distinct_names, split_number

SHARE_UNITS = 1 << 60  # what all draws are cut into: whole numbers add up to the same in any order
KEY_FIELD = pa.field("key", pa.int64())  # what an image without any name is known by
ROW_BITS = 40  # of such a key: the rest says whose row it is


@dataclass(frozen=True)
class Part:
    """A manifest that goes into the union."""

    path: Path
    weight: float | None = None  # how often training draws of it, against the other parts


@dataclass(frozen=True)
class UnionSettings:
    """What `dinov2 curate union` can be told, beside the options that all commands share."""

    where: str | None = None  # condition on the rows of every part
    embeddings: bool = False  # the vectors come along
    memory: str | None = None  # None: a third of the machine


def parse_parts(texts: Sequence[str]) -> tuple[Part, ...]:
    """Return the parts of A.parquet or A.parquet=WEIGHT.

    Raises ToolkitError when a weight is no number above 0, or only some parts have one.
    """
    parts = []
    for text in texts:
        path, number = split_number(text)
        try:
            weight = None if number is None else float(number)
        except ValueError:
            weight = 0.0
        if weight is not None and not 0 < weight < np.inf:
            raise ToolkitError(f"{text}: {number!r} is no weight; give a number above 0, such as {path}=0.5")
        parts.append(Part(path, weight))
    bare = [str(part.path) for part in parts if part.weight is None]
    if bare and len(bare) < len(parts):
        raise ToolkitError(f"{', '.join(bare)} without a weight beside parts with one; give each =WEIGHT, or none")
    return tuple(parts)


def union_manifests(parts: Sequence[Part], output: str, settings: UnionSettings, options: Options) -> Result | None:
    """Write the images of several manifests, each once; return None after a dry run."""
    path = check_manifest_name(output)
    names = distinct_names([part.path for part in parts])
    inputs = [open_input("part", part.path, path, where=settings.where) for part in parts]
    for part in inputs:
        if part.manifest.path.resolve() == path.resolve():
            raise ToolkitError(f"output {output} is one of the parts; choose another -o")
        if settings.embeddings:
            check_same_model(inputs[0], part)
    weights = [part.weight for part in parts if part.weight is not None]
    provenance = _provenance(inputs, names, weights, settings, options)
    is_made = is_up_to_date(path, provenance, options)
    if options.dry_run:
        if not is_made:
            num_rows = ", ".join(f"{part.num_rows(options.limit):,} of {part.manifest.path}" for part in inputs)
            console.say(f"would read {num_rows} and write every image once to {path}, as {provenance.kind}")
        return None
    if not is_made:
        with recorded(path) as finished:
            read = read_embedded if settings.embeddings else read_unembedded
            images = [read(part, options.limit) for part in inputs]
            finished.append(_union(images, names, weights, path, settings, provenance))
    made = open_manifest(path)
    return Result(output, {} if made.provenance is None else made.provenance.figures)


def _provenance(
    inputs: list[Input], names: list[str], weights: list[float], settings: UnionSettings, options: Options
) -> Provenance:
    """Return the provenance: a selection where all parts refer to one embedding manifest, else images or embeddings."""
    bases = [part.base() for part in inputs]
    base = bases[0] if len({base and base.content_id for base in bases}) == 1 else None
    models = {model.content_id: model for part in inputs if (model := part.model()) is not None}
    shared = tuple(models.values()) if len(models) == 1 else ()
    roles = {part.manifest.provenance.role for part in inputs if part.manifest.provenance is not None}
    parameters: dict[str, object] = {
        "parts": names,
        "weights": weights,
        "where": settings.where,
        "embeddings": settings.embeddings,
        "limit": options.limit,
    }
    return Provenance(
        kind="embeddings" if settings.embeddings else "images" if base is None else "selection",
        command="curate union",
        parameters=parameters,
        seed=options.seed,
        inputs=(*(source for part in inputs for source in part.sources()), *shared),
        base=None if settings.embeddings else base,
        role=roles.pop() if len(roles) == 1 else "pool",
    )


def _union(
    images: list[EmbeddedImages],
    names: list[str],
    weights: list[float],
    path: Path,
    settings: UnionSettings,
    provenance: Provenance,
) -> Provenance:
    units = _draws(images, weights)
    first, drawn = _each_once(images, units, memory_budget(settings.memory))
    starts = np.cumsum([0, *(len(part) for part in images)])
    bounds = np.searchsorted(first, starts)
    chosen = [first[low:high] - start for low, high, start in zip(bounds, bounds[1:], starts, strict=False)]
    source, weight = OPTIONAL_IMAGE_FIELDS
    of_part = np.repeat(np.arange(len(images)), np.diff(bounds))
    rows = Selection(
        tuple(zip(images, chosen, strict=True)),
        np.arange(len(first)),
        {source: pa.DictionaryArray.from_arrays(pa.array(of_part), pa.array(names))},
    )
    if weights:
        rows = rows.append_column(weight, pa.array(drawn / drawn.sum() * len(drawn)))
    total = sum(weights)
    shares = [each / total for each in weights] if weights else [len(part) / max(len(first), 1) for part in chosen]
    composition = [
        {"source": name, "rows": len(part), "images": len(mine), "share": share}
        for name, part, mine, share in zip(names, images, chosen, shares, strict=True)
    ]
    figures: dict[str, object] = {
        "images": len(first),
        "wanted": int(starts[-1]),
        "collisions": int(starts[-1]) - len(first),
        "composition": composition,
    }
    console.say(f"{starts[-1]:,} rows of {len(images)} parts: {len(first):,} images, as {provenance.kind}")
    header = ["part", "rows", "images not in earlier parts", "share of draws" if weights else "share of images"]
    console.table("what every part brings", header, [list(part.values()) for part in composition])
    return _write(path, rows, images, chosen, provenance, figures)


def _draws(images: list[EmbeddedImages], weights: list[float]) -> Int64:
    """Return the share of draws that every row gets by its part, (N,), in SHARE_UNITS; 0 where parts have no weights.

    Within a part rows are drawn by their own weights.
    """
    units = np.zeros(sum(len(part) for part in images), np.int64)
    start = 0
    for part, weight in zip(images, weights, strict=False):
        place = part.source.manifest.path
        if not len(part):
            raise ToolkitError(f"{place} has no rows to draw from; leave it out")
        own = np.ones(len(part))
        if "weight" in part.schema().names:
            own = pc.fill_null(part.image_column("weight"), 1.0).to_numpy().astype(np.float64)
        if not (np.isfinite(own).all() and own.min() >= 0 and own.sum() > 0):
            raise ToolkitError(f"the weight column of {place} has negative values, or nothing above 0; mend it first")
        share = weight / sum(weights)
        units[start : start + len(part)] = np.round(own / own.sum() * share * SHARE_UNITS)
        start += len(part)
    return units


def _each_once(images: list[EmbeddedImages], units: Int64, memory: int) -> tuple[Int64, Float64]:
    """Return the first row of every image among those of all parts, (R,) rising, and what all its rows get, (R,)."""
    schema = pa.schema([*IMAGE_FIELDS[:2], KEY_FIELD, pa.field("place", pa.int64()), pa.field("units", pa.int64())])
    first, drawn = [np.empty(0, np.int64)], [np.empty(0)]
    with tables.connect(memory) as connection:
        connection.register("rows", tables.stream(schema, _named(images, units, schema)))
        once = connection.sql("""
            select min(place), sum(units)::double from rows group by image_id, uri, key order by 1
        """)
        for batch in once.to_arrow_reader(tables.BATCH_ROWS):
            first.append(batch.column(0).to_numpy())
            drawn.append(batch.column(1).to_numpy())
    return np.concatenate(first), np.concatenate(drawn)


def _named(images: list[EmbeddedImages], units: Int64, schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield what names every row: image_id and uri, or where both are null its row in the embeddings."""
    bases = [part.source.base() for part in images]
    ids = [None if base is None else base.content_id for base in bases]
    start = 0
    for part, base in zip(images, ids, strict=True):
        for table in part.names():
            stop = start + table.num_rows
            own = pa.array(-1 - np.arange(start, stop))  # of no base: like no other
            rows = own if base is None else pc.add(table.column("row"), ids.index(base) << ROW_BITS)
            unnamed = pc.and_(pc.is_null(table.column("image_id")), pc.is_null(table.column("uri")))
            keys = pc.if_else(unnamed, pc.coalesce(rows, own), None)
            columns = [table.column("image_id"), table.column("uri"), keys, np.arange(start, stop), units[start:stop]]
            yield pa.table(columns, schema=schema)
            start = stop


def _write(
    path: Path,
    rows: Selection,
    images: list[EmbeddedImages],
    chosen: list[Int64],
    provenance: Provenance,
    figures: dict[str, object],
) -> Provenance:
    schema = rows.schema
    if provenance.kind != "selection":
        schema = schema.remove(schema.get_field_index(ROW_FIELD.name))
    field = None
    if provenance.kind == "embeddings":
        is_half = all(part.vectors.array.dtype == np.float16 for part in images)
        field = embedding_field(images[0].vectors.dim, pa.float16() if is_half else pa.float32())
        schema = schema.append(field)
    with ManifestWriter(path, list(schema), provenance) as writer:
        for table in rows.batches():
            if field is not None:
                stop = writer.num_rows + table.num_rows
                table = table.append_column(field, _vectors(images, chosen, writer.num_rows, stop, field))
            writer.write(table)
        writer.set_figures(**figures)
    return writer.provenance


def _vectors(images: list[EmbeddedImages], chosen: list[Int64], start: int, stop: int, field: pa.Field) -> pa.Array:
    """Return the vectors of rows start..stop of the chosen images of all parts."""
    block = np.empty((stop - start, images[0].vectors.dim), field.type.value_type.to_pandas_dtype())
    first = 0  # row of the part's first image
    for part, mine in zip(images, chosen, strict=True):
        low, high = np.clip([start - first, stop - first], 0, len(mine))
        block[first + low - start : first + high - start] = part.vectors.take(mine[low:high]).raw(0, high - low)
        first += len(mine)
    return pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=field.type)
