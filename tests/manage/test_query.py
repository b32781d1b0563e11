"""SQL over manifests makes manifests like any other."""

import json
import os
import socket
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage.query import _connect, sql
from dinov2_toolkit.store import catalog, tables
from dinov2_toolkit.store.manifest import (
    IMAGE_FIELDS,
    ROW_FIELD,
    ManifestWriter,
    Provenance,
    Source,
    embedding_field,
    open_manifest,
)
from dinov2_toolkit.store.tables import rows_where
from dinov2_toolkit.store.vectors import open_vectors
from dinov2_toolkit.tests.embedded import write_embeddings


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


@pytest.mark.parametrize("vector", ["'x'", "[1, 2]", "[['x']]", "null", "{'a': 1.0}"])
def test_an_embedding_that_is_no_list_of_floats_is_refused(tmp_path: Path, pool: Path, vector: str) -> None:
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / "plain.parquet")
    for source in (pool, tmp_path / "plain.parquet"):
        with pytest.raises(
            ToolkitError, match=r"`embedding` of the answer is .*, not lists of floats; name it otherwise"
        ):
            sql(f"select uri, {vector} as embedding from '{source}'", str(tmp_path / "out.parquet"), False, False)
        assert not (tmp_path / "out.parquet").exists()


def test_vectors_may_be_made_by_the_query_itself(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / "plain.parquet")
    query = f"select uri, [1.0::float, 2.0] as embedding from '{tmp_path / 'plain.parquet'}'"
    sql(query, str(tmp_path / "out.parquet"), False, False)
    assert open_vectors(open_manifest(tmp_path / "out.parquet")).raw(0, 1).tolist() == [[1.0, 2.0]]


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


def test_an_answer_larger_than_a_piece_is_written_whole(
    tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = f"select * from '{pool}' a, range(40) order by uri, range"
    for rows in (7, 64, 1_000):
        monkeypatch.setattr(tables, "BATCH_ROWS", rows)
        sql(query, str(tmp_path / "many.parquet"), True, False)
        many = open_manifest(tmp_path / "many.parquet")
        assert many.num_rows == 240 and many.schema.names[-2:] == ["embedding", "range"]
        assert many.read(["range"]).column(0).to_pylist() == list(range(40)) * 6
        assert open_vectors(many).raw(0, 240)[:, 0].tolist() == sorted(list(range(6)) * 40)


def test_what_fails_after_the_first_rows_leaves_no_half_manifest(tmp_path: Path) -> None:
    late = tmp_path / "late.parquet"
    pq.write_table(pa.table({"uri": ["a"] * 300_000, "label": ["1"] * 299_999 + ["x"]}), late, row_group_size=20_000)
    with pytest.raises(ToolkitError, match="the query failed .*'x'") as problem:
        sql(f"select uri, label::int as number from '{late}'", str(tmp_path / "out.parquet"), False, False)
    assert "\n" not in str(problem.value)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == []


def test_a_join_adds_columns_and_two_of_one_name_are_refused(tmp_path: Path, pool: Path) -> None:
    scores = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"uri": [f"/{row}.png" for row in range(0, 6, 2)], "score": [0.5, 0.25, 1.0]}), scores)
    joined = f"select a.*, score from '{pool}' a join '{scores}' using (uri) where score > 0.3 order by uri"
    sql(joined, str(tmp_path / "good.parquet"), False, False)
    good = open_manifest(tmp_path / "good.parquet")
    assert good.read(["score"]).column(0).to_pylist() == [0.5, 1.0] and open_vectors(good).raw(0, 2)[:, 0].tolist() == [
        0,
        4,
    ]
    assert good.provenance is not None and len(good.provenance.inputs) == 3  # both manifests, and the model
    with pytest.raises(ToolkitError, match="the answer has uri twice"):
        sql(f"select * from '{pool}' a join '{scores}' b on a.uri = b.uri", str(tmp_path / "x.parquet"), False, False)


def test_an_answer_without_rows_is_a_manifest_without_rows(tmp_path: Path, pool: Path) -> None:
    sql(f"select * from '{pool}' where width > 1000", str(tmp_path / "none.parquet"), False, False)
    assert open_manifest(tmp_path / "none.parquet").num_rows == 0


def test_an_answer_that_no_manifest_can_hold_names_the_column(tmp_path: Path, pool: Path) -> None:
    query = f"select * exclude (image_id), [image_id] as image_id from '{pool}'"
    with pytest.raises(
        ToolkitError, match=r"column `image_id` of the answer is list<.*>, and of a manifest string; cast"
    ):
        sql(query, str(tmp_path / "x.parquet"), False, False)


def test_the_catalog_can_be_asked_and_is_not_held_meanwhile(tmp_path: Path, pool: Path) -> None:
    sql(f"select uri from '{pool}'", str(tmp_path / "some.parquet"), False, False)
    query = f"select a.* from '{pool}' a where a.width >= (select count(*) + 104 from artifacts)"
    sql(query, str(tmp_path / "few.parquet"), False, False)
    assert open_manifest(tmp_path / "few.parquet").num_rows == 1
    with _connect() as connection:
        assert catalog.find("few").rows == 1  # by another connection
        assert connection.sql("select count(*) from newest").fetchall() == [(2,)]


@pytest.mark.parametrize(
    "query",
    [
        "copy (select 1) to '{folder}/out.csv'",
        "copy (select 1) to '{pool}'",
        "explain analyze copy (select 1) to '{folder}/out.csv'",
        "attach '{folder}/other.duckdb'",
        "delete from artifacts",
        "drop table artifacts",
        "install httpfs",
        "load httpfs",
        "set threads = 1",
        "pragma threads = 2",
        "pragma enable_profiling",
        "call checkpoint()",
        "/* */ explain analyze copy (select 1) to '{folder}/out.csv'",
        "export database '{folder}/out'",
        "select 1; copy (select 1) to '{folder}/out.csv'",
        "",
    ],
)
@pytest.mark.parametrize("output", [None, "new.parquet"])
def test_a_query_only_reads(tmp_path: Path, pool: Path, query: str, output: str | None) -> None:
    catalog.record(pool, open_manifest(pool).provenance or Provenance("", "", {}), None)
    before, names = pool.read_bytes(), sorted(tmp_path.rglob("*"))
    query = f"{query.format(folder=tmp_path, pool=pool)} -- '{pool}'"
    with pytest.raises(ToolkitError, match="is not one statement that reads"):
        sql(query, None if output is None else str(tmp_path / output), False, False)
    assert pool.read_bytes() == before and sorted(tmp_path.rglob("*")) == names
    assert len(catalog.artifacts()) == 1


@pytest.mark.parametrize(
    "query",
    [
        "explain select 1",
        "EXPLAIN ANALYZE select 1",
        "pragma version",
        "pragma table_info('artifacts')",
        "pivot artifacts on kind using count(*)",
        "from artifacts pivot (count(*) for kind in ('run'))",
        "describe artifacts",
        "show tables",
        "summarize artifacts",
        "with x as (select 1) from x",
        "values (1)",
    ],
)
def test_every_statement_that_reads_is_answered(
    tmp_path: Path, pool: Path, query: str, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog.record(pool, open_manifest(pool).provenance or Provenance("", "", {}), None)
    sql(query, None, False, False)
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_nobody_is_told_to_load_an_extension(pool: Path) -> None:
    with pytest.raises(ToolkitError, match=r"requires the extension httpfs to be loaded\); correct it"):
        sql("select * from 'http://127.0.0.1:1/x.parquet'", None, False, False)


@pytest.mark.parametrize("name", ["'s3://b/x.parquet'", "'https://host.invalid/x.parquet'", "read_xlsx('x')"])
def test_a_query_needs_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: asked.append(arguments))
    with pytest.raises(ToolkitError, match="the query failed .*extension"):
        sql(f"select * from {name}", None, False, False)
    with tables.connect() as connection:
        for setting in ("autoinstall_known_extensions", "autoload_known_extensions"):
            assert connection.execute(f"select current_setting('{setting}')").fetchall() == [(False,)]
        tables.select(connection, "select 1")
        with pytest.raises(duckdb.Error, match="locked"):
            connection.execute("set autoload_known_extensions = true")
    assert asked == []


@pytest.mark.parametrize(
    "query",
    [
        "with x as (copy (select 1) to '{}/out.csv') from x",
        "with x as /* ( */ materialized ( -- é\n COPY (select 1) TO '{}/out.csv') from x",
        "select 1 where 1 in (with x as (copy (select 1) to '{}/out.csv') from x)",
        "with x as (insert into artifacts by name select 1 as id returning id) from x",
        "explain analyze with x as (copy (select 1) to '{}/out.csv') from x",
        "pivot (with x as (copy (select 1) to '{}/out.csv') from x) on Count using count(*)",
    ],
)
def test_no_part_of_a_query_or_condition_writes(tmp_path: Path, pool: Path, query: str) -> None:
    query = query.format(tmp_path)
    with pytest.raises(ToolkitError, match=r"has a part that writes \((copy|insert)\); only reading"):
        sql(query, None, False, False)
    with pytest.raises(ToolkitError, match=r"has a part that writes \((copy|insert)\); only reading"):
        list(rows_where(open_manifest(pool), f"1 in ({query})"))
    assert not (tmp_path / "out.csv").exists()


def test_words_for_writing_may_be_names(capsys: pytest.CaptureFixture[str]) -> None:
    sql("select sum(copy), \"update\", '(copy x' from (select 1 as copy, 2 as update) group by all", None, False, False)
    assert capsys.readouterr().out.splitlines()[1] == "1\t2\t(copy x"


def test_a_pipe_in_a_query_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.parquet")
    pool = write_embeddings(tmp_path / "a.parquet", np.eye(2, dtype=np.float32))
    for name in ("'{}/pipe.parquet'", '"{}/pipe.parquet"', "read_parquet('{}/pip*')", "read_text(['{}/pipe.parquet'])"):
        with pytest.raises(ToolkitError, match="pipe.parquet is no regular file"):
            sql(f"select * from {name.format(tmp_path)}", None, False, False)
        with pytest.raises(ToolkitError, match="pipe.parquet is no regular file"):
            list(rows_where(open_manifest(pool), f"uri in (from {name.format(tmp_path)})"))


def test_values_of_others_are_escaped_but_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    query = "select 'a' || chr(10) || 'error: forged' || chr(27) || chr(9) as name"
    sql(query, None, False, as_json=False)
    assert capsys.readouterr().out == "name\na\\nerror: forged\\x1b\\t\n"
    sql(query, None, False, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"rows": [{"name": "a\nerror: forged\x1b\t"}]}
