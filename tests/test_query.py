"""SQL over manifests makes manifests like any other."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.manifest import (
    IMAGE_FIELDS,
    ROW_FIELD,
    ManifestWriter,
    Provenance,
    Source,
    embedding_field,
    open_manifest,
)
from dinov2_toolkit.store.vectors import open_vectors


def images(num_rows: int) -> dict[str, list[object]]:
    return {
        "image_id": [f"id{row}" for row in range(num_rows)],
        "uri": [f"/{row}.png" for row in range(num_rows)],
        "width": [100 + row for row in range(num_rows)],
        "height": [100] * num_rows,
        "label": ["a"] * num_rows,
    }


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    field = embedding_field(2, pa.float16())
    fields = [*IMAGE_FIELDS, field]
    rows = {**images(6), "embedding": [[row, 1] for row in range(6)]}
    model = Source("model", "m", "model-1")
    provenance = Provenance("embeddings", "curate embed", {}, inputs=(model,), role="eval")
    with ManifestWriter(tmp_path / "pool.parquet", fields, provenance) as writer:
        writer.write(pa.table(rows, schema=pa.schema(fields)))
    return tmp_path / "pool.parquet"


def selection(path: Path, base: Path, rows: list[int]) -> Path:
    fields = [*IMAGE_FIELDS, ROW_FIELD]
    chosen = {name: [column[row] for row in rows] for name, column in images(6).items()}
    provenance = Provenance("selection", "curate dedup", {}, base=open_manifest(base).source("base"))
    with ManifestWriter(path, fields, provenance) as writer:
        writer.write(pa.table({**chosen, "row": rows}, schema=pa.schema(fields)))
    return path


def test_a_filtered_embedding_manifest_keeps_its_vectors_and_its_model(tmp_path: Path, pool: Path) -> None:
    result = sql(f"select * from '{pool}' where width > 103", str(tmp_path / "big.parquet"), False, False)
    assert result is not None and result.output == str(tmp_path / "big.parquet")
    big = open_manifest(tmp_path / "big.parquet")
    assert big.schema.field("embedding").type == open_manifest(pool).schema.field("embedding").type
    assert open_vectors(big).raw(0, 2).tolist() == [[4, 1], [5, 1]]
    assert big.provenance is not None and big.provenance.role == "eval"
    assert catalog.find("big").model == "model-1"


def test_a_union_of_selections_keeps_their_base(tmp_path: Path, pool: Path) -> None:
    first = selection(tmp_path / "first.parquet", pool, [0, 3])
    second = selection(tmp_path / "second.parquet", pool, [3, 5])
    query = f"select * from '{first}' union select * from '{second}' order by row"
    sql(query, str(tmp_path / "union.parquet"), False, False)
    assert open_vectors(open_manifest(tmp_path / "union.parquet")).raw(0, 3)[:, 0].tolist() == [0, 3, 5]


def test_the_same_query_again_is_up_to_date_and_another_is_refused(tmp_path: Path, pool: Path) -> None:
    output = str(tmp_path / "big.parquet")
    sql(f"select uri from '{pool}'", output, False, False)
    stamp = Path(output).read_bytes()
    sql(f"select uri from '{pool}'", output, False, False)
    assert Path(output).read_bytes() == stamp
    with pytest.raises(ToolkitError, match="--force"):
        sql(f"select uri from '{pool}' limit 1", output, False, False)


def test_rows_without_images_or_manifests_are_refused(tmp_path: Path, pool: Path) -> None:
    with pytest.raises(ToolkitError, match="no `uri` column"):
        sql(f"select width from '{pool}'", str(tmp_path / "x.parquet"), False, False)
    with pytest.raises(ToolkitError, match="names no 'file.parquet'"):
        sql("select 1 as uri", str(tmp_path / "x.parquet"), False, False)
    with pytest.raises(ToolkitError, match="the query failed"):
        sql("select nonsense from", None, False, False)
    pq.write_table(pa.table({"uri": ["a"], "row": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(ToolkitError, match="needs one embedding manifest"):
        sql(f"select * from '{tmp_path}/foreign.parquet'", str(tmp_path / "x.parquet"), False, False)
    assert not (tmp_path / "x.parquet").exists()


def test_rows_go_to_stdout_as_lines_or_json(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sql(f"select uri, width from '{pool}' order by width limit 2", None, False, False)
    assert capsys.readouterr().out == "uri\twidth\n/0.png\t100\n/1.png\t101\n"
    sql("select 1 as one, null as none", None, False, True)
    assert json.loads(capsys.readouterr().out) == {"rows": [{"one": 1, "none": None}]}
