"""A manifest's name is a name: nothing in it is a pattern, and nothing in its folder's a column."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dinov2_toolkit
from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.cluster.sheet import _headings as headings
from dinov2_toolkit.curate.inputs import open_input
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.store import tables
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import open_manifest
from dinov2_toolkit.store.tables import connect, literal_name, rows_where, scan, stream
from dinov2_toolkit.tests.embedded import write_embeddings

ODD_NAMES = (
    "q[1].parquet",
    "star-*.parquet",
    "w?.parquet",
    "{a,b}.parquet",
    "**.parquet",
    "[!x].parquet",
    "it's.parquet",
    "~.parquet",
    "back\\slash.parquet",
    "width=9/pool.parquet",
)
TRAPS = ("q1.parquet", "star-a.parquet", "star-b.parquet", "wx.parquet", "a.parquet")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Write manifests of odd names, each with one row of its own width, and those that a pattern would take."""
    monkeypatch.chdir(tmp_path)
    paths = [Path(name) for name in (*ODD_NAMES, *TRAPS)]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"uri": ["/a.png", "/b.png"], "width": [number, 100 + number]}), path)
    return paths[: len(ODD_NAMES)]


def test_where_reads_the_file_of_this_very_name(odd: list[Path]) -> None:
    for number, path in enumerate(odd):
        manifest = open_manifest(path)
        assert [batch.column(0).to_pylist() for batch in rows_where(manifest, f"width = {number}")] == [[0]]
        kept = open_input("pool", path, Path("out.parquet"), where=f"width = {100 + number}").kept
        assert kept is not None and kept.tolist() == [1]


def test_the_settings_of_a_condition_are_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / "a.parquet")
    locked = []
    real = tables.connect

    @contextmanager
    def connect() -> Iterator[duckdb.DuckDBPyConnection]:
        with real() as connection:
            yield connection
            with suppress(duckdb.Error):
                connection.execute("set threads = 1")
                locked.append(False)
            locked.append(True)

    monkeypatch.setattr(tables, "connect", connect)
    assert len(list(tables.rows_where(open_manifest(tmp_path / "a.parquet"), "true"))) == 1
    assert locked == [True]
    for name in ("'s3://b/x.parquet'", "'https://host.invalid/x.parquet'", "read_xlsx('x')"):
        with pytest.raises(ToolkitError, match="extension"):
            list(tables.rows_where(open_manifest(tmp_path / "a.parquet"), f"uri in (from {name})"))


@pytest.mark.parametrize("condition", ["1 = 1); copy (select 1) to '{}/x.csv'; select (1 = 1", "1 = 1); select (true"])
def test_a_condition_is_no_further_statement(tmp_path: Path, condition: str) -> None:
    pq.write_table(pa.table({"uri": ["/a.png"]}), tmp_path / "a.parquet")
    with pytest.raises(ToolkitError, match=r"--where .* makes \d statements; give one condition"):
        list(rows_where(open_manifest(tmp_path / "a.parquet"), condition.format(tmp_path)))
    assert not (tmp_path / "x.csv").exists()


def test_a_query_that_names_a_file_reads_that_file(odd: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for number, path in enumerate(odd):
        escaped = str(path).replace("'", "''")
        for name in (f"'{escaped}'", f'"{path}"'):
            condition = f"width in (select width from {name})"
            found = list(rows_where(open_manifest(path), condition))
            assert found[0].num_rows == 2
            sql(f"select width from {name} order by width", None, False, False)
            assert capsys.readouterr().out.split() == ["width", str(number), str(100 + number)]


def test_a_name_that_sql_cannot_be_told_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "back\\[1].parquet"
    pq.write_table(pa.table({"uri": ["/a.png"], "width": [1]}), path)
    with pytest.raises(ToolkitError, match=r"both a backslash and one of .* rename it"):
        list(rows_where(open_manifest(path), "true"))


def test_a_sheet_of_clusters_reads_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "level=7").mkdir()
    captions = []
    for name, num in (("level=7/c[1].parquet", 3), ("level=7/c1.parquet", 4)):
        vectors = np.random.default_rng(num).normal(size=(30, 4)).astype(np.float32)
        pool = write_embeddings(tmp_path / f"pool{num}.parquet", vectors)
        cluster_images(pool, str(tmp_path / name), ClusterSettings(str(num), sheet=tmp_path / f"{num}.png"), Options())
        captions.append(headings(tmp_path / name.replace(".parquet", ".clusters.parquet")))
    assert [len(each) for each in captions] == [3, 4]
    query = f"select distinct cluster_0 from {scan(tmp_path / 'level=7/c[1].parquet')} order by 1"
    with connect() as connection:
        assert connection.sql(query).fetchall() == [(0,), (1,), (2,)]


def test_only_one_function_names_parquet_files_to_duckdb_or_datasets() -> None:
    root = Path(dinov2_toolkit.__path__[0])
    reads = re.compile(r"read_parquet\(|pq\.read_table\(|ParquetDataset|dataset\.dataset|parquet_scan|from_parquet\(")
    rooms = ("curate", "train", "evaluate", "features", "models", "store", "manage", "report")
    found = [
        f"{file.relative_to(root)}: {line.strip()}"
        for room in rooms
        for file in sorted((root / room).rglob("*.py"))
        for line in file.read_text().splitlines()
        if reads.search(line)
    ]
    assert [line.partition(":")[0] for line in found] == ["store/tables.py"], found
    assert literal_name(Path("/a/q[1]*?.parquet")) == "/a/q[[]1][*][?].parquet"


def test_what_a_stream_raises_comes_out_of_the_database_as_it_was() -> None:
    schema = pa.schema([pa.field("x", pa.int64())])

    def tables() -> Iterator[pa.Table]:
        yield pa.table({"x": [1]}, schema=schema)
        raise ToolkitError("the second piece cannot be read; mend it")

    with pytest.raises(ToolkitError, match="^the second piece cannot be read; mend it$"), connect() as connection:
        connection.register("rows", stream(schema, tables()))
        connection.sql("select sum(x) from rows").fetchall()
    with pytest.raises(duckdb.Error, match="gone"), connect() as connection:
        connection.sql("select * from gone")
