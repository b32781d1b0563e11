"""Embedding manifests of synthetic vectors, for tests of the steps that read embeddings."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.manifest import IMAGE_FIELDS, ManifestWriter, Provenance, Source, embedding_field
from dinov2_toolkit.store.vectors import Float64, Stored


def write_embeddings(
    path: Path,
    vectors: Stored,
    *,
    image_ids: Sequence[str | None] | None = None,
    uris: Sequence[str | None] | None = None,
    sizes: Sequence[tuple[int | None, int | None]] | None = None,
    labels: Sequence[str | None] | None = None,
    model: str = "a model",
    role: str = "pool",
    more: dict[str, pa.Array] | None = None,
) -> Path:
    """Write an embedding manifest and enter it in the catalog, as `embed` does."""
    num_rows, dim = vectors.shape
    dtype = pa.from_numpy_dtype(vectors.dtype)
    more = more or {}
    fields = [*IMAGE_FIELDS, *(pa.field(name, column.type) for name, column in more.items())]
    fields.append(embedding_field(dim, dtype))
    sizes = sizes or [(10, 10)] * num_rows
    columns = [
        pa.array(image_ids or [f"{row:032x}" for row in range(num_rows)], pa.string()),
        pa.array(uris or [f"/{path.stem}/{row}.png" for row in range(num_rows)], pa.string()),
        pa.array([width for width, _ in sizes], pa.int32()),
        pa.array([height for _, height in sizes], pa.int32()),
        pa.array(labels or [None] * num_rows, pa.string()),
        *more.values(),
        pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), type=fields[-1].type),
    ]
    made_by = Source("model", model, f"{model} of {dim}")
    provenance = Provenance("embeddings", "curate embed", {}, inputs=(made_by,), role=role)
    with ManifestWriter(path, fields, provenance) as writer:
        writer.write(pa.table(columns, schema=pa.schema(fields)))
    catalog.record(path, writer.provenance, None)
    return path


def unit(vectors: Stored) -> Float64:
    """Return the rows at length 1 in float64, zero rows as they are."""
    exact = vectors.astype(np.float64)
    lengths = np.sqrt((exact**2).sum(axis=1, keepdims=True))
    return exact / np.where(lengths > 0, lengths, 1.0)


def similarity(left: Float64, right: Float64) -> float:
    """Return the cosine of unit vectors, rounded to hide differences in summation order."""
    return round(float((left * right).sum()), 12)
