"""A report of a million rows opens: rows stream, images are sampled, the page stays small."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dinov2_toolkit.curate.cluster.table import TABLE_FIELDS
from dinov2_toolkit.store.manifest import (
    GROUP_FIELDS,
    IMAGE_FIELDS,
    PIXEL_DIFFERENCE_FIELD,
    REMOVED_FIELDS,
    ROW_FIELD,
    SELECTION_FIELDS,
    ManifestWriter,
    Provenance,
    Source,
    cluster_field,
    embedding_field,
    open_manifest,
)
from dinov2_toolkit.store.vectors import Int64
from dinov2_toolkit.tests.browser import OpenPage, scrolls_sideways

NUM, SLICE = 1_000_000, 100_000
REPORT = """
import json, sys, time
from dinov2_toolkit.benchmarks.measured import peak_mb
start = time.perf_counter()
from dinov2_toolkit.report.report import report
from dinov2_toolkit.store.artifact import Options
report(sys.argv[1:], "page.html", Options())
print(json.dumps({"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}))
"""


def image_columns(rows: Int64) -> dict[str, object]:
    return {
        "image_id": [f"{row:032x}" for row in rows.tolist()],
        "uri": [f"/a/folder/with/a/long/name/{row:09}.jpg" for row in rows.tolist()],
        "width": np.full(len(rows), 640),
        "height": np.full(len(rows), 480),
        "label": [f"label {row % 1000}" for row in rows.tolist()],
    }


def write(
    path: Path,
    columns: list[pa.Field],
    made: Provenance,
    tables: Iterable[Mapping[str, object]],
    **figures: object,
) -> Source:
    """Write a manifest, a table at a time, and return it as an input."""
    with ManifestWriter(path, columns, made) as writer:
        for table in tables:
            writer.write(pa.table(dict(table), schema=pa.schema(columns)))
        writer.set_figures(**figures)
    return Source("manifest", str(path), writer.provenance.content_id)


def write_curated(folder: Path) -> list[str]:
    """Write a pool of a million images, 600,000 of them unique, and clusters and retrieved images of these."""
    slices = [np.arange(start, start + SLICE) for start in range(0, NUM, SLICE)]
    kept, gone = ([rows[(rows % 10 < 6) == is_kept] for rows in slices] for is_kept in (True, False))
    of_selection = {field.name: field for field in SELECTION_FIELDS}
    rng = np.random.default_rng(0)

    columns = [*IMAGE_FIELDS, embedding_field(2, pa.float16())]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * SLICE, np.float16)), type=columns[-1].type)
    tables: Iterable[Mapping[str, object]] = ({**image_columns(rows), "embedding": vectors} for rows in slices)
    pool = write(folder / "pool.parquet", columns, Provenance("embeddings", "curate embed", {}), tables)

    # The images removed are in 100,000 groups: of every ten the first stays, the last four go for it.
    made = Provenance("selection", "curate dedup", {"keep": "largest"}, inputs=(pool,), base=pool)
    tables = (
        {
            "uri": image_columns(rows)["uri"],
            "reason": ["near-duplicate"] * len(rows),
            "duplicate_of": image_columns(rows - rows % 10)["uri"],
            "similarity": rng.uniform(0.8, 1.0, len(rows)),
            "group_id": rows - rows % 10,
            "min_similarity_to_kept": np.full(len(rows), 0.8),
            "pixel_difference": rng.uniform(0.0, 0.02, len(rows)),
        }
        for rows in gone
    )
    columns = [*REMOVED_FIELDS, *GROUP_FIELDS, PIXEL_DIFFERENCE_FIELD]
    write(folder / "unique.removed.parquet", columns, replace(made, kind="removed"), tables)
    columns = [*IMAGE_FIELDS, ROW_FIELD, of_selection["duplicates"]]
    tables = ({**image_columns(rows), "row": rows, "duplicates": np.where(rows % 10, 0, 4)} for rows in kept)
    figures = {"groups": 100_000, "largest_group": 5, "threshold": 0.3, "max_difference": 0.018}
    unique = write(folder / "unique.parquet", columns, made, tables, **figures)

    made = Provenance("selection", "curate cluster", {"sample": None}, inputs=(unique,), base=pool)
    numbers = [np.arange(5_000), np.arange(50)]
    columns = [*TABLE_FIELDS, embedding_field(1, pa.float32())]
    tables = (
        {
            **{field.name: pa.nulls(len(clusters), field.type) for field in TABLE_FIELDS},
            "level": np.full(len(clusters), level),
            "cluster": clusters,
            **dict.fromkeys(("images", "sampled"), np.full(len(clusters), 600_000 // len(clusters))),
            "suspected": np.zeros(len(clusters), bool),
            "embedding": clusters.astype(np.float32)[:, None].tolist(),
        }
        for level, clusters in enumerate(numbers)
    )
    write(folder / "even.clusters.parquet", columns, replace(made, kind="clusters", base=None), tables)
    columns = [*IMAGE_FIELDS, ROW_FIELD, cluster_field(0), cluster_field(1), of_selection["distance"]]
    tables = (
        {
            **image_columns(rows),
            "row": rows,
            "cluster_0": rows % 5_000,
            "cluster_1": rows % 50,
            "distance": rng.random(len(rows)),
        }
        for rows in kept
    )
    write(folder / "even.parquet", columns, made, tables)

    inputs = replace(unique, role="pool"), replace(pool, role="queries")
    made = Provenance("selection", "curate retrieve", {"k": 60}, inputs=inputs, base=pool)
    columns = [*IMAGE_FIELDS, ROW_FIELD, *(of_selection[name] for name in ("query_id", "rank", "similarity"))]
    tables = (
        {
            **image_columns(rows),
            "row": rows,
            "query_id": [f"{row // 100:032x}" for row in rows.tolist()],
            "rank": rows % 100 + 1,
            "similarity": rng.random(len(rows)),
        }
        for rows in kept
    )
    figures = {"queries": NUM, "pool": 600_000, "retrieved": 600_000, "images": 600_000}
    write(folder / "near.parquet", columns, made, tables, **figures)
    return [str(folder / "even.parquet"), str(folder / "near.parquet")]


@pytest.mark.slow
@pytest.mark.browser
def test_a_report_of_a_million_rows_opens(tmp_path: Path, open_page: OpenPage) -> None:
    names = write_curated(tmp_path)
    assert open_manifest(Path(names[0])).num_rows == 600_000
    done = subprocess.run(
        [sys.executable, "-c", REPORT, *names], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    page_bytes = (tmp_path / "page.html").stat().st_size
    print(f"{measured['seconds']:.1f} s, {measured['peak_mb']:.0f} MB, page of {page_bytes / 1e6:.1f} MB")
    assert measured["seconds"] < 120 and measured["peak_mb"] < 2_000 and page_bytes < 2_000_000
    page = open_page(tmp_path / "page.html")
    assert not scrolls_sideways(page) and "1,000,000" in page.locator(".flow").inner_text()
