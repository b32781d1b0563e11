"""What dedup, cluster, retrieve and union read: the images of a manifest together with their vectors.

Only numbers are held for the whole pool. Names and labels stay on disk, and are read for the rows that are written.

N images, D numbers a vector, R rows of a selection.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from .. import console
from ..cores import usable_cores
from ..errors import ToolkitError
from ..store import catalog, tables
from ..store.artifact import Options
from ..store.image_columns import has_images, image_batches, image_schema
from ..store.manifest import IMAGE_FIELDS, ROW_FIELD, Manifest, Source, open_manifest
from ..store.vectors import Float32, Int64, Vectors, checked_rows, locate_vectors, open_vectors, scratch_size

FLOPS_A_CORE = 5e10  # measured: float32 products on an AVX2 core
PLAIN_MODELS = ("pixels", "copy")  # their vectors compare appearance, not content
PLACE_FIELD = pa.field("place", pa.int64())  # of a row in the output


@dataclass(frozen=True)
class Input:
    """A manifest that a step was given, before its vectors are read."""

    role: str  # manifest, queries, pool, against
    manifest: Manifest
    features: Manifest | None  # where --features says the vectors are
    where: str | None = None  # SQL condition that rows must meet
    kept: Int64 | None = None  # the rows that do, ascending; None: all

    def rows(self, limit: int | None = None) -> Int64:
        """Return the rows of the manifest that the step works on, ascending: those kept of the first `limit`."""
        stop = self.manifest.num_rows if limit is None else min(limit, self.manifest.num_rows)
        return np.arange(stop) if self.kept is None else self.kept[: np.searchsorted(self.kept, stop)]

    def num_rows(self, limit: int | None = None) -> int:
        """Return the number of rows that the step works on."""
        return len(self.rows(limit))

    def model(self) -> Source | None:
        """Return the model that made the vectors, where it is known."""
        return model_of(self.features or self.manifest)

    def sources(self) -> tuple[Source, ...]:
        """Return what to record as inputs."""
        features = () if self.features is None else (self.features.source("features"),)
        asked = [] if self.where is None else [part.source("where") for part in tables.named_manifests(self.where)]
        listed = [] if self.where is None else tables.named_lists(self.where)
        return (self.manifest.source(self.role), *features, *asked, *listed)

    def base(self) -> Source | None:
        """Return the embedding manifest that a selection of these images refers to.

        It is the images' own where they have one: --features lends its vectors for one step.
        """
        if "embedding" in self.manifest.names():
            return self.manifest.source("base")
        if self.manifest.provenance is not None and self.manifest.provenance.base is not None:
            return self.manifest.provenance.base
        return None if self.features is None else self.features.source("base")


@dataclass(frozen=True)
class EmbeddedImages:
    """Images with their vectors, in the order of the manifest's rows."""

    source: Input
    positions: Int64  # (N,) rows of the manifest, ascending
    rows: pa.Array  # (N,) int64, rows of the base that a selection refers to
    vectors: Vectors  # (N, D)

    def __len__(self) -> int:
        return len(self.vectors)

    def take(self, indices: Int64) -> "EmbeddedImages":
        """Return the images at `indices`, which must rise."""
        rows = self.rows.take(pa.array(indices))
        return EmbeddedImages(self.source, self.positions[indices], rows, self.vectors.take(indices))

    def schema(self) -> pa.Schema:
        """Return the image columns that there are."""
        return image_schema(self.source.manifest)

    def batches(self, columns: Sequence[str], indices: Int64 | None = None) -> Iterator[pa.Table]:
        """Yield image columns of the images at `indices` (R,), ascending, some thousand at a time."""
        rows = self.positions if indices is None else self.positions[indices]
        return image_batches(self.source.manifest, columns, rows=rows)

    def image_column(self, name: str, indices: Int64 | None = None) -> pa.ChunkedArray:
        """Return an image column of the images at `indices` (R,), in that order; None means all, (N,)."""
        empty = pa.schema([self.schema().field(name)]).empty_table()
        if indices is None:
            return pa.concat_tables([empty, *self.batches([name])]).column(0)
        ascending, place = np.unique(indices, return_inverse=True)
        return pa.concat_tables([empty, *self.batches([name], ascending)]).column(0).take(pa.array(place))

    def uris(self, indices: Int64 | None = None) -> pa.ChunkedArray:
        """Return the uris of the images at `indices` (R,), in that order; None means all, (N,)."""
        return self.image_column("uri", indices)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return any column of the manifest as it is stored, (N,)."""
        manifest = self.source.manifest
        empty = pa.schema([manifest.schema.field(name)]).remove_metadata().empty_table()
        return pa.concat_tables([empty, *image_batches(manifest, (), more=[name], rows=self.positions)]).column(0)

    @cached_property
    def order(self) -> Int64:
        """The rank of every image by (image_id, uri, row), (N,), which breaks every tie."""
        schema = pa.schema([*IMAGE_FIELDS[:2], ROW_FIELD, PLACE_FIELD])
        rank = np.empty(len(self), np.int64)
        with tables.connect() as connection:
            connection.register("names", tables.stream(schema, self.names()))
            ranked = connection.sql("select place from names order by image_id, uri, row, place")
            rank[ranked.fetchnumpy()["place"]] = np.arange(len(self))
        return rank

    def names(self) -> Iterator[pa.Table]:
        """Yield image_id, uri, row and place of every image."""
        start = 0
        for table in self.batches(["image_id", "uri"]):
            stop = start + table.num_rows
            table = table.append_column(ROW_FIELD, self.rows.slice(start, table.num_rows))
            yield table.append_column(PLACE_FIELD, pa.array(np.arange(start, stop)))
            start = stop


def open_input(
    role: str, path: Path | None, output: Path, features: Path | None = None, where: str | None = None
) -> Input:
    """Open a manifest; where none is given, the newest one that the catalog has for the role, named on stderr.

    The step's own output of an earlier run is never chosen. `where` is an SQL condition over the manifest's columns.
    Raises ToolkitError when the condition is no SQL for this manifest, or no row meets it.
    """
    if path is None:
        wanted = "queries" if role == "queries" else "pool"
        known = (Path(artifact.path) for artifact in catalog.newest_features(wanted))
        path = next((found for found in known if found != output.absolute()), None) or catalog.choose(wanted)
        say_choice(role, path)
    manifest = open_manifest(path)
    kept = None
    if where is not None:
        found = [batch.column(0).to_numpy() for batch in tables.rows_where(manifest, where)]
        kept = np.concatenate([np.empty(0, np.int64), *found])
        if not len(kept):
            raise ToolkitError(f"--where {where!r} keeps none of the {manifest.num_rows:,} rows of {path}; loosen it")
        console.say(f"--where keeps {len(kept):,} of {manifest.num_rows:,} rows of {path}")
    return Input(role, manifest, None if features is None else open_manifest(features), where, kept)


def say_choice(role: str, path: Path) -> None:
    """Say which manifest the catalog chose."""
    console.say(f"{role}: {os.path.relpath(path)}, the newest in the catalog")


def model_of(manifest: Manifest) -> Source | None:
    """Return the model that a manifest was made with, where it is known."""
    return None if manifest.provenance is None else manifest.provenance.model()


def read_embedded(source: Input, limit: int | None = None) -> EmbeddedImages:
    """Open the vectors of a manifest's images; names and labels stay on disk.

    Raises ToolkitError when there are no vectors, as `store.vectors.open_vectors` says.
    """
    vectors = open_vectors(source.manifest, features=source.features, limit=limit)
    is_base = source.features is None or source.base() == source.features.source("base")
    rows = vectors.rows if is_base else _rows_of_base(source, limit)
    images = EmbeddedImages(source, np.arange(len(vectors)), pa.array(rows), vectors)
    return images if source.kept is None else images.take(source.rows(limit))


def read_unembedded(source: Input, limit: int | None = None) -> EmbeddedImages:
    """Return the images of any manifest, with vectors of length 0.

    Raises ToolkitError when it names no images.
    """
    manifest = source.manifest
    if not has_images(manifest):
        what = f"names no images (columns: {', '.join(manifest.names())})"
        raise ToolkitError(f"{manifest.path} ({source.role}) {what}; it needs a `uri` or `path` column")
    positions = source.rows(limit)
    rows = pa.array(_rows_of_base(source, limit)).take(pa.array(positions))
    nothing: Float32 = np.empty((manifest.num_rows, 0), np.float32)
    return EmbeddedImages(source, positions, rows, Vectors(nothing, positions, manifest.source("base")))


def _rows_of_base(source: Input, limit: int | None) -> Int64 | pa.Array:
    """Return the rows of its base that a manifest refers to; its own rows where it has vectors, or no base."""
    if "embedding" in source.manifest.names() or source.base() is None:
        return np.arange(source.manifest.num_rows)[:limit]
    return checked_rows(source.manifest, limit)


def check_same_model(one: Input, other: Input) -> None:
    """Raise ToolkitError when the vectors of two inputs cannot be compared: two known models, or two lengths."""
    models = {model.content_id: model.path for part in (one, other) if (model := part.model()) is not None}
    paths = f"{one.manifest.path} and {other.manifest.path}"
    if len(models) == 2:
        names = " and ".join(models.values())
        raise ToolkitError(f"{paths} were embedded by two models ({names}); embed one again with the other's --model")
    dims = [scratch_size(part.features or locate_vectors(part.manifest)[0])[0] for part in (one, other)]
    if dims[0] != dims[1]:
        raise ToolkitError(f"the vectors of {paths} have {dims[0]} and {dims[1]} numbers; embed both by one model")


def warn_of_plain_features(source: Input) -> None:
    """Warn when vectors compare the looks of pictures, not their content."""
    model = source.model()
    if model is not None and model.path in PLAIN_MODELS:
        what = f"come from `{model.path}`, which compares appearance, not content"
        console.warn(f"the vectors of {source.manifest.path} {what}; embed with a trained --model for better groups")


def describe(path: Path, inputs: list[Input], num_products: int, what: str, options: Options) -> None:
    """Say what a dry run would read, compute and write, after checking that the vectors are there.

    `num_products` counts the vector pairs that would be multiplied.
    """
    limited = [(part, options.limit if part is inputs[0] else None) for part in inputs]
    bases = [locate_vectors(part.manifest, features=part.features, limit=limit)[0] for part, limit in limited]
    counts = [part.num_rows(limit) for part, limit in limited]
    read = " and ".join(f"{count:,} vectors of {base.path}" for base, count in zip(bases, counts, strict=True))
    dim = scratch_size(bases[0])[0]
    scratch = sum({base.content_id: scratch_size(base)[1] for base in bases}.values())
    seconds = 2 * num_products * dim / (FLOPS_A_CORE * usable_cores())
    console.say(
        f"would read {read} ({dim} numbers each; {scratch / 1e6:,.1f} MB to decode into the cache),"
        f" {what}, and write {path}; about {seconds:,.0f} s on the CPU"
    )


def split_number(text: str) -> tuple[Path, str | None]:
    """Return the path and the text after its last `=`, None without one; a `=` in an existing file's name is kept."""
    path, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return Path(text), None
    return Path(path), number


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return the file names without .parquet, with as many parent folders as make them unique.

    Raises ToolkitError when one file is named twice.
    """
    whole = [path.absolute() for path in paths]
    for position, path in enumerate(whole):
        if path in whole[:position]:
            raise ToolkitError(f"{paths[position]} is given twice; give every manifest once")
    depth = 1
    while True:
        names = ["/".join(path.parts[-depth:]).removesuffix(".parquet") for path in whole]
        if len(set(names)) == len(names):
            return names
        depth += 1
