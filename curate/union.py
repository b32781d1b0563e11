"""Several manifests as one, every image once; weights say how often training draws from each.

Retrieved and evenly sampled images together make better features than either (section 3.1 of Siméoni et al. 2025,
DINOv3). A clean pool and the new images of another make the grown pool.

N images of all parts, R different ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..store import tables
from ..store.artifact import Options, Result, check_manifest_name, make
from ..store.manifest import OPTIONAL_IMAGE_FIELDS, ROW_FIELD, ManifestWriter, Provenance, embedding_field
from ..store.memory import memory_budget
from ..store.vectors import Float64, Int64
from .inputs import (
    EmbeddedImages,
    Input,
    check_same_model,
    distinct_names,
    open_input,
    read_embedded,
    read_unembedded,
    split_number,
)
from .selection import Selection

SHARE_UNITS = 1 << 60  # of all draws together; integers add up to the same in any order
NAMES_SCHEMA = pa.schema(
    {"image_id": pa.string(), "uri": pa.string(), "row": pa.int64()}
    | {"base": pa.string(), "place": pa.int64(), "units": pa.int64()}
)


@dataclass(frozen=True)
class Part:
    """A manifest that goes into the union."""

    path: Path
    weight: float | None = None  # share of the draws in training, relative to the other parts


@dataclass(frozen=True)
class UnionSettings:
    """The options of `dinov2 curate union`, beside those that all commands share."""

    where: str | None = None  # condition on the rows of every part
    embeddings: bool = False  # copy the vectors too
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

    def describe() -> None:
        num_rows = ", ".join(f"{part.num_rows(options.limit):,} of {part.manifest.path}" for part in inputs)
        console.say(f"would read {num_rows} and write every image once to {path}, as {provenance.kind}")

    def work() -> Provenance:
        read = read_embedded if settings.embeddings else read_unembedded
        images = [read(part, options.limit) for part in inputs]
        return _union(images, names, weights, path, memory_budget(settings.memory), provenance)

    return make(output, provenance, options, describe=describe, work=work)


def _provenance(
    inputs: list[Input], names: list[str], weights: list[float], settings: UnionSettings, options: Options
) -> Provenance:
    """Return the provenance: a selection where all parts refer to one embedding manifest, else images or embeddings."""
    bases = [part.base() for part in inputs]
    base = bases[0] if len({base and base.content_id for base in bases}) == 1 else None
    models = {model.content_id: model for part in inputs if (model := part.model()) is not None}
    shared = tuple(models.values()) if len(models) == 1 else ()
    roles = {part.manifest.provenance.role for part in inputs if part.manifest.provenance is not None}
    chosen = asdict(settings)
    del chosen["memory"]  # does not change the rows
    return Provenance(
        kind="embeddings" if settings.embeddings else "images" if base is None else "selection",
        command="curate union",
        parameters={"parts": names, "weights": weights, **chosen, "limit": options.limit},
        seed=options.seed,
        inputs=(*(source for part in inputs for source in part.sources()), *shared),
        base=None if settings.embeddings else base,
        role=roles.pop() if len(roles) == 1 else "pool",
    )


def _union(
    parts: list[EmbeddedImages], names: list[str], weights: list[float], path: Path, memory: int, provenance: Provenance
) -> Provenance:
    first, drawn = _each_once(parts, _draws(parts, weights), memory)
    starts = np.cumsum([0, *(len(part) for part in parts)])
    bounds = np.searchsorted(first, starts)  # of the parts among the rows that are kept
    chosen = [first[low:high] - start for low, high, start in zip(bounds, bounds[1:], starts, strict=False)]
    of_part = np.repeat(np.arange(len(parts)), np.diff(bounds))
    source, weight = OPTIONAL_IMAGE_FIELDS
    added = {source: pa.DictionaryArray.from_arrays(pa.array(of_part), pa.array(names))}
    if weights:
        added[weight] = pa.array(drawn / drawn.sum() * len(drawn))
    rows = Selection(tuple(zip(parts, chosen, strict=True)), np.arange(len(first)), added)

    total = sum(weights)
    shares = [each / total for each in weights] if weights else [len(part) / max(len(first), 1) for part in chosen]
    composition = [
        {"source": name, "rows": len(part), "images": len(mine), "share": share}
        for name, part, mine, share in zip(names, parts, chosen, shares, strict=True)
    ]
    console.say(f"{starts[-1]:,} rows of {len(parts)} parts: {len(first):,} images, as {provenance.kind}")
    header = ["part", "rows", "images not in earlier parts", "share of draws" if weights else "share of images"]
    console.table("images of every part", header, [list(part.values()) for part in composition])

    fields = [field for field in rows.schema if field != ROW_FIELD or provenance.kind == "selection"]
    if provenance.kind == "embeddings":
        is_half = all(part.vectors.array.dtype == np.float16 for part in parts)
        fields.append(embedding_field(parts[0].vectors.dim, pa.float16() if is_half else pa.float32()))
    with ManifestWriter(path, fields, provenance) as writer:
        for table in rows.batches():
            if provenance.kind == "embeddings":
                vectors = _vectors(parts, first[writer.num_rows : writer.num_rows + len(table)], starts, fields[-1])
                table = table.append_column(fields[-1], vectors)
            writer.write(table)
        writer.set_figures(
            images=len(first), wanted=int(starts[-1]), collisions=int(starts[-1]) - len(first), composition=composition
        )
    return writer.provenance


def _draws(images: list[EmbeddedImages], weights: list[float]) -> Int64:
    """Return the share of the draws of every row, (N,), in SHARE_UNITS; 0 where parts have no weights.

    Within a part, rows share by their own weights.
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
    """Return the first row of every image among those of all parts, (R,) ascending, and the units of its rows, (R,).

    An image without a name is identified by its row in the embeddings that its part refers to.
    """
    with tables.connect(memory) as connection:
        connection.register("rows", tables.stream(NAMES_SCHEMA, _names(images, units)))
        once = connection.sql("""
            select min(place) as first, sum(units)::double as drawn from rows
            group by image_id, uri, case when coalesce(image_id, uri) is null then (base, coalesce(row, -1 - place)) end
            order by first
        """).fetchnumpy()
    return once["first"], once["drawn"]


def _names(images: list[EmbeddedImages], units: Int64) -> Iterator[pa.Table]:
    """Yield what identifies every row of all parts, its place among them and its share of the draws."""
    start = 0
    for number, part in enumerate(images):
        base = part.source.base()
        base_id = f"part {number}" if base is None else base.content_id  # without a base, a row is like no other
        for table in part.names():
            stop = start + len(table)
            own = [pa.repeat(base_id, len(table)), np.arange(start, stop), units[start:stop]]
            yield pa.table([*(table.column(name) for name in ("image_id", "uri", "row")), *own], schema=NAMES_SCHEMA)
            start = stop


def _vectors(images: list[EmbeddedImages], rows: Int64, starts: Int64, field: pa.Field) -> pa.Array:
    """Return the vectors of some `rows` among those of all parts, (R, D)."""
    vectors = np.empty((len(rows), images[0].vectors.dim), field.type.value_type.to_pandas_dtype())
    for part, start in zip(images, starts, strict=False):
        mine = np.flatnonzero((rows >= start) & (rows < start + len(part)))
        vectors[mine] = part.vectors.take(rows[mine] - start).raw(0, len(mine))
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=field.type)
