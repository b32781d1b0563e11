"""What dedup, cluster and retrieve share: images read together with their vectors, and selections of them written.

N images, D numbers a vector.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .. import console
from ..errors import ToolkitError
from ..features.neighbors import Identity
from ..store import catalog
from ..store.artifact import Options
from ..store.image_columns import read_images
from ..store.manifest import ROW_FIELD, Manifest, ManifestWriter, Provenance, Source, open_manifest
from ..store.vectors import Int64, Vectors, locate_vectors, open_vectors, scratch_size

FLOPS_A_CORE = 5e10  # measured: float32 products on an AVX2 core
PLAIN_MODELS = ("pixels", "copy")  # their vectors say how alike two pictures look, not what they show


@dataclass(frozen=True)
class Input:
    """A manifest that a step was given, and what is known of it before a vector is read."""

    role: str  # manifest, queries, pool, against
    manifest: Manifest
    features: Manifest | None  # where --features says the vectors are

    def model(self) -> Source | None:
        """Return the model that made the vectors which the step compares, where it is known."""
        return _model(self.features or self.manifest)

    def features_path(self) -> Path | None:
        """Return what `store.vectors` takes as `features`."""
        return None if self.features is None else self.features.path

    def sources(self) -> tuple[Source, ...]:
        """Return what to record as inputs."""
        features = () if self.features is None else (self.features.source("features"),)
        return (self.manifest.source(self.role), *features)

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
    images: pa.Table  # N rows: the image columns
    rows: pa.Array  # (N,) int64, rows of the base that a selection refers to
    vectors: Vectors  # (N, D)
    order: Int64  # (N,) rank by (image_id, uri, row), which breaks every tie

    def __len__(self) -> int:
        return len(self.vectors)

    def uris(self) -> pa.ChunkedArray:
        """Return the uris, (N,)."""
        return self.images.column("uri")


def open_input(role: str, path: Path | None, output: Path, features: Path | None = None) -> Input:
    """Open a manifest; where none is given, the newest one that the catalog has for the role, named on stderr.

    The step's own output, should it stand there from an earlier run, is never chosen.
    """
    if path is None:
        wanted = "queries" if role == "queries" else "pool"
        known = (Path(artifact.path) for artifact in catalog.newest_features(wanted))
        path = next((found for found in known if found != output.absolute()), None) or catalog.choose(wanted)
        say_choice(role, path)
    return Input(role, open_manifest(path), None if features is None else open_manifest(features))


def say_choice(role: str, path: Path) -> None:
    """Name on stderr what the catalog chose."""
    console.say(f"{role}: {os.path.relpath(path)}, the newest in the catalog")


def _model(manifest: Manifest) -> Source | None:
    return None if manifest.provenance is None else manifest.provenance.model()


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
    model = _model(pool.manifest) or pool.model()  # the base's own: what the next step will compare with
    return Provenance(
        kind="selection",
        command=command,
        parameters={**parameters, "limit": options.limit},
        seed=options.seed,
        inputs=(*inputs, *([] if model is None else [model])),
        base=base,
        role="pool" if pool.manifest.provenance is None else pool.manifest.provenance.role,
    )


def read_embedded(source: Input, limit: int | None = None) -> EmbeddedImages:
    """Read the images of a manifest, and make their vectors ready.

    Raises ToolkitError when there are no vectors, as `store.vectors.open_vectors` says.
    """
    manifest, features = source.manifest, source.features
    vectors = open_vectors(manifest, features=source.features_path(), limit=limit)
    images = read_images(manifest, limit)
    if "embedding" in manifest.names():
        rows = pa.array(np.arange(len(vectors)))
    elif features is not None and source.base() != features.source("base"):
        rows = manifest.read(["row"], limit).column("row").cast(pa.int64()).combine_chunks()
    else:
        rows = pa.array(vectors.rows)
    keys = [(name, "ascending") for name in ("image_id", "uri", "row")]
    ranked = pc.sort_indices(images.append_column("row", rows), sort_keys=keys).to_numpy()
    order = np.empty(len(ranked), np.int64)
    order[ranked] = np.arange(len(ranked))
    return EmbeddedImages(source, images, rows, vectors, order)


def check_same_model(one: Input, other: Input) -> None:
    """Raise ToolkitError when the vectors of two inputs cannot be compared: two known models, or two lengths."""
    models = one.model(), other.model()
    paths = f"{one.manifest.path} and {other.manifest.path}"
    if models[0] is not None and models[1] is not None and models[0].content_id != models[1].content_id:
        raise ToolkitError(
            f"{paths} were embedded by two models ({models[0].path} and {models[1].path});"
            " embed one of them again with the other's --model"
        )
    dims = [scratch_size(_embeddings(part))[0] for part in (one, other)]
    if dims[0] != dims[1]:
        raise ToolkitError(f"the vectors of {paths} have {dims[0]} and {dims[1]} numbers; embed both by one model")


def _embeddings(source: Input) -> Manifest:
    if source.features is not None:
        return source.features
    return locate_vectors(source.manifest)[0]


def warn_of_plain_features(source: Input) -> None:
    """Warn when vectors say how alike pictures look, but not what they show."""
    model = source.model()
    if model is not None and model.path in PLAIN_MODELS:
        console.warn(
            f"the vectors of {source.manifest.path} come from `{model.path}`, which compares looks, not content;"
            " embed with a trained --model for better groups"
        )


def identity_of(queries: EmbeddedImages, pool: EmbeddedImages) -> Identity:
    """Return which queries and pool rows are the same image: equal (image_id, uri), or where both are null, equal rows.

    Rows are compared only where both count in the same base.
    """
    is_same_base = queries.vectors.base.content_id == pool.vectors.base.content_id
    keys = [_keys(part, is_same_base) for part in (queries, pool)]
    codes = pa.chunked_array(keys).combine_chunks().dictionary_encode().indices
    unknown = np.arange(len(codes)) + len(codes)  # numbers that nothing else has
    numbers = np.where(codes.is_null().to_numpy(False), unknown, codes.fill_null(0).to_numpy().astype(np.int64))
    return Identity(numbers[: len(queries)], numbers[len(queries) :])


def _keys(part: EmbeddedImages, by_row: bool) -> pa.Array:
    image_id, uri = (part.images.column(name).combine_chunks() for name in ("image_id", "uri"))
    named = pc.binary_join_element_wise(image_id, uri, "\n", null_handling="replace", null_replacement="")
    rows = pc.binary_join_element_wise("row", pc.cast(pa.array(part.vectors.rows), pa.string()), " ")
    unnamed = rows if by_row else pa.nulls(len(part), pa.string())
    return pc.if_else(pc.or_(pc.is_valid(image_id), pc.is_valid(uri)), named, unnamed)


def selected(pool: EmbeddedImages, positions: Int64) -> pa.Table:
    """Return the image columns and `row` of the images at `positions`, in that order."""
    taken = pa.array(positions)
    return pool.images.take(taken).append_column(ROW_FIELD, pool.rows.take(taken))


def write_table(path: Path, table: pa.Table, provenance: Provenance, figures: dict[str, object]) -> Provenance:
    """Write a manifest and return its provenance, now with content id and figures."""
    with ManifestWriter(path, list(table.schema), provenance) as writer:
        writer.write(table)
        writer.set_figures(**figures)
    return writer.provenance


def describe(path: Path, inputs: list[Input], num_products: int, what: str, options: Options) -> None:
    """Say what a dry run would read, compute and write, after checking that the vectors are there.

    `num_products` counts the vector pairs that would be multiplied.
    """
    located = [
        locate_vectors(part.manifest, features=part.features_path(), limit=options.limit if part is inputs[0] else None)
        for part in inputs
    ]
    dim = scratch_size(located[0][0])[0]
    scratch = sum({base.content_id: scratch_size(base)[1] for base, _ in located}.values())
    seconds = 2 * num_products * dim / (FLOPS_A_CORE * (os.cpu_count() or 1))
    read = " and ".join(f"{len(rows):,} vectors of {base.path}" for base, rows in located)
    console.say(
        f"would read {read} ({dim} numbers each; {scratch / 1e6:,.1f} MB to decode into the cache),"
        f" {what}, and write {path}; about {seconds:,.0f} s on the CPU"
    )
