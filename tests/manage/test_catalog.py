"""The catalog: what was recorded is found, chosen, traced, verified, and rebuilt."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage import catalog as commands
from dinov2_toolkit.store import catalog, database
from dinov2_toolkit.store.artifact import Options, is_up_to_date
from dinov2_toolkit.store.cache import cache_folder, cached, open_cache
from dinov2_toolkit.store.database import MIGRATIONS
from dinov2_toolkit.store.lock import held
from dinov2_toolkit.store.manifest import IMAGE_FIELDS, ManifestWriter, Provenance, Source, open_manifest
from dinov2_toolkit.store.places import catalog_path

EMPTY = pa.schema(IMAGE_FIELDS).empty_table()


def make(
    path: Path,
    command: str = "curate embed",
    kind: str = "embeddings",
    role: str = "pool",
    inputs: tuple[Source, ...] = (Source("model", "m", "model-1"),),
    num_rows: int = 1,
    parameters: dict[str, object] | None = None,
) -> Source:
    provenance = Provenance(kind, command, parameters or {}, inputs=inputs, role=role)
    rows = pa.table({field.name: pa.nulls(num_rows, field.type) for field in IMAGE_FIELDS})
    with ManifestWriter(path, list(IMAGE_FIELDS), provenance) as writer:
        writer.write(rows)
        writer.set_figures(entropy=0.5, note="not a number")
    catalog.record(path, writer.provenance, 1.5)
    return open_manifest(path).source("manifest")


def test_the_list_of_paths_is_written_when_they_change_alone(tmp_path: Path) -> None:
    make(tmp_path / "a.parquet")
    before = catalog.known_paths().stat()
    catalog.check()
    make(tmp_path / "a.parquet", num_rows=2)
    assert catalog.known_paths().stat() == before
    make(tmp_path / "b.parquet")
    lines = catalog.known_paths().read_text().splitlines()
    assert [json.loads(line) for line in lines] == [str(tmp_path / name) for name in ("a.parquet", "b.parquet")]


def test_an_artifact_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    make(tmp_path / "pool.parquet", parameters={"model": "pixels"})
    for name in (str(tmp_path / "pool.parquet"), "pool.parquet", "pool"):
        artifact = catalog.find(name)
        assert (artifact.kind, artifact.rows, artifact.role, artifact.model) == ("embeddings", 1, "pool", "model-1")
        assert json.loads(artifact.parameters) == {"model": "pixels"}
    assert catalog.metrics_of(artifact) == [("entropy", 0.5)]
    with pytest.raises(ToolkitError, match="has no .poool. .did you mean .pool...; see"):
        catalog.find("poool")


def test_recording_the_same_contents_again_keeps_one_row(tmp_path: Path) -> None:
    for _ in range(3):
        make(tmp_path / "pool.parquet")
    with catalog.connect(read_only=True) as connection:
        assert connection.execute("select count(*) from artifacts").fetchone() == (1,)


def test_bare_retrieve_gets_the_newest_pair_by_one_model(tmp_path: Path) -> None:
    make(tmp_path / "queries.parquet", role="queries")
    pool = make(tmp_path / "pool.parquet")
    make(tmp_path / "unique.parquet", "curate dedup", "selection", inputs=(pool, Source("model", "m", "model-1")))
    make(tmp_path / "clusters.parquet", "curate cluster", "selection")
    make(tmp_path / "curated.parquet", "curate retrieve", "selection")
    assert catalog.choose_pair() == (tmp_path / "queries.parquet", tmp_path / "unique.parquet")
    (tmp_path / "unique.parquet").unlink()
    assert catalog.choose_pair() == (tmp_path / "queries.parquet", tmp_path / "pool.parquet")


def test_a_pair_by_two_models_or_half_a_pair_lists_the_candidates(tmp_path: Path) -> None:
    make(tmp_path / "pool.parquet")
    with pytest.raises(ToolkitError, match="no manifest with role 'queries' .*pool.parquet"):
        catalog.choose_pair()
    make(tmp_path / "queries.parquet", role="queries", inputs=(Source("model", "n", "model-2"),), num_rows=2)
    with pytest.raises(ToolkitError, match="two models .*queries.parquet .*pool.parquet"):
        catalog.choose_pair()


def test_lineage_goes_back_through_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make(tmp_path / "pool.parquet", inputs=(Source("images", "/photos", "listing"),))
    unique = make(tmp_path / "unique.parquet", "curate dedup", "selection", inputs=(pool,), num_rows=2)
    make(tmp_path / "clusters.parquet", "curate cluster", "selection", inputs=(unique,), num_rows=3)
    commands.lineage("clusters", as_json=False)
    assert [line.split("/")[-1] for line in capsys.readouterr().out.splitlines()] == [
        "clusters.parquet  [curate cluster]",
        "unique.parquet  [curate dedup]",
        "pool.parquet  [curate embed]",
        "photos",
    ]


def test_verify_reads_everything_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "pool.parquet")
    commands.verify([], as_json=False)
    assert capsys.readouterr().out.startswith("ok")
    content = bytearray((tmp_path / "pool.parquet").read_bytes())
    content[6] ^= 1
    (tmp_path / "pool.parquet").write_bytes(content)
    with pytest.raises(ToolkitError, match="1 of 1 artifacts"):
        commands.verify(["pool"], as_json=False)
    assert capsys.readouterr().out.startswith("changed")


def test_a_lost_catalog_is_rebuilt_from_the_manifests(tmp_path: Path) -> None:
    pool = make(tmp_path / "pool.parquet")
    make(tmp_path / "sub" / "unique.parquet", "curate dedup", "selection", inputs=(pool,), num_rows=2)
    before = {(a.path, a.kind, a.digest, a.parameters, a.role, a.model, a.rows) for a in catalog.artifacts()}
    catalog_path().unlink()
    commands.rebuild([tmp_path])
    assert {(a.path, a.kind, a.digest, a.parameters, a.role, a.model, a.rows) for a in catalog.artifacts()} == before
    assert catalog.inputs_of(catalog.find("unique")) == [pool]


def test_gc_forgets_what_is_gone(tmp_path: Path) -> None:
    make(tmp_path / "pool.parquet")
    (tmp_path / "pool.parquet").unlink()
    commands.gc()
    assert catalog.artifacts() == []


def test_gc_empties_the_cache_but_for_work_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    at_work, left_over = (cache_folder() / name for name in (f"embed-{1:016}", f"embed-{2:016}"))
    open_cache()
    left_over.mkdir(parents=True)
    (left_over / "part-0.arrow").write_bytes(b"12345")
    (cache_folder() / f"{0:032}-ids.npy").write_bytes(b"123")
    at_work.mkdir()
    with held(at_work / "lock", "embedding to pool.parquet"):
        (at_work / "part-0.arrow").write_bytes(b"1")
        commands.gc()
    assert capsys.readouterr().out == "8\n"
    assert cached() == [at_work]
    commands.gc()
    assert cached() == []


def test_a_second_run_is_up_to_date_and_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pool.parquet"
    make(path, parameters={"threshold": 0.9})
    model = (Source("model", "elsewhere", "model-1"),)
    same = Provenance("embeddings", "curate embed", {"threshold": 0.9}, inputs=model)
    stamp = path.stat().st_mtime_ns
    assert is_up_to_date(path, same, Options())
    assert path.stat().st_mtime_ns > stamp
    other = Provenance("embeddings", "curate embed", {"threshold": 0.8}, inputs=model)
    with pytest.raises(ToolkitError, match="threshold 0.9, now 0.8.*--force"):
        is_up_to_date(path, other, Options())
    assert not is_up_to_date(path, other, Options(force=True))
    assert not is_up_to_date(tmp_path / "new.parquet", other, Options())
    (tmp_path / "x.parquet").write_text("mine")
    with pytest.raises(ToolkitError, match="no manifest of ours"):
        is_up_to_date(tmp_path / "x.parquet", other, Options())


def test_another_file_at_the_place_of_the_catalog_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("mine")
    monkeypatch.setenv("DINOV2_CATALOG", str(thesis))
    with pytest.raises(ToolkitError, match="thesis.txt is no catalog; set DINOV2_CATALOG"):
        catalog.artifacts()
    assert thesis.read_text() == "mine"


def test_another_database_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "other.duckdb"))
    with duckdb.connect(str(tmp_path / "other.duckdb")) as other:
        other.execute("create table patients as select 1 as id")
    with pytest.raises(ToolkitError, match="is a database, but no catalog .it has patients.; set DINOV2_CATALOG"):
        make(tmp_path / "pool.parquet")
    with duckdb.connect(str(tmp_path / "other.duckdb")) as other:
        assert [name for (name,) in other.execute("show tables").fetchall()] == ["patients"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "text": lambda content: b"hello",
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "header": lambda content: content[:4096] + bytes(4096) + content[8192:],
    "block": lambda content: content[:12400] + bytes(100) + content[12500:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_catalog_is_set_aside_and_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    pool = make(tmp_path / "pool.parquet")
    make(tmp_path / "sub" / "unique.parquet", "curate dedup", "selection", inputs=(pool,), num_rows=2)
    before = {(a.path, a.kind, a.digest, a.parameters, a.role, a.model, a.rows) for a in catalog.artifacts()}
    path = catalog_path()
    broken = DAMAGES[damage](path.read_bytes())
    path.write_bytes(broken)
    assert {(a.path, a.kind, a.digest, a.parameters, a.role, a.model, a.rows) for a in catalog.artifacts()} == before
    assert catalog.inputs_of(catalog.find("unique")) == [pool]
    said = capsys.readouterr().err
    assert "was broken" in said and "2 of 2 artifacts" in said
    (aside,) = path.parent.glob("catalog.duckdb.broken-*")
    assert aside.read_bytes() == broken and str(aside) in said


def test_whatever_block_is_damaged_a_new_row_is_entered(tmp_path: Path) -> None:
    pool = make(tmp_path / "pool.parquet")
    whole = catalog_path().read_bytes()
    for start in range(12_288, len(whole), 262_144):  # blocks behind the headers; some are read for a new row alone
        catalog_path().write_bytes(whole[: start + 100] + bytes(100) + whole[start + 200 :])
        make(tmp_path / "unique.parquet", "curate dedup", "selection", inputs=(pool,), num_rows=2)
        assert {Path(artifact.path).name for artifact in catalog.artifacts()} == {"pool.parquet", "unique.parquet"}


def test_a_broken_list_of_paths_costs_only_its_broken_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "pool.parquet")
    path = catalog_path()
    path.write_bytes(path.read_bytes()[:4096])
    lines = [b"", b"{", b"5", b"[" * 5_000, b'"a\\u0000b"', b"\xff", b'"/gone"', catalog.known_paths().read_bytes()]
    catalog.known_paths().write_bytes(b"\n".join(lines))
    assert [Path(artifact.path).name for artifact in catalog.artifacts()] == ["pool.parquet"]
    said = capsys.readouterr().err
    assert "1 of 8 artifacts" in said and said.count("is not entered") == 5


def test_an_older_layout_is_brought_up_to_date(tmp_path: Path) -> None:
    make(tmp_path / "pool.parquet")
    with catalog.connect() as connection:  # as it was before layouts had numbers
        connection.execute("drop table migrations")
        connection.execute("create or replace view newest as select * from artifacts")
    assert [Path(artifact.path).name for artifact in catalog.artifacts()] == ["pool.parquet"]
    make(tmp_path / "pool.parquet")
    with catalog.connect(read_only=True) as connection:
        numbers = connection.execute("select number from migrations order by number").fetchall()
    assert [number for (number,) in numbers] == list(range(1, len(MIGRATIONS) + 1))


def test_a_newer_layout_is_refused_and_kept(tmp_path: Path) -> None:
    make(tmp_path / "pool.parquet")
    with catalog.connect() as connection:
        connection.execute("insert into migrations values (99, now()::timestamp)")
    before = catalog_path().read_bytes()
    with pytest.raises(ToolkitError, match=f"has layout 99, and this toolkit knows up to {len(MIGRATIONS)}; set"):
        catalog.artifacts()
    assert catalog_path().read_bytes() == before


def test_a_missing_column_is_a_broken_catalog_and_one_more_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "pool.parquet")
    with catalog.connect() as connection:
        connection.execute("alter table artifacts add column colour varchar")
    assert len(catalog.artifacts()) == 1 and "broken" not in capsys.readouterr().err
    with catalog.connect() as connection:
        connection.execute("alter table metrics drop column value")
    assert len(catalog.artifacts()) == 1 and "broken" in capsys.readouterr().err


def test_what_is_wrong_with_a_catalog_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks = tmp_path / "lock" / "locked.duckdb"  # whose errors all have the word in them
    locks.mkdir(parents=True)
    monkeypatch.setenv("DINOV2_CATALOG", str(locks))
    with pytest.raises(ToolkitError, match="is no regular file"):
        catalog.artifacts()
    (tmp_path / "lock" / "x.duckdb").write_bytes(b"corrupt")
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "lock" / "x.duckdb"))
    monkeypatch.setattr(database, "LOCK_PATIENCE_S", 0.0)
    assert catalog.artifacts() == []
    os.mkfifo(tmp_path / "pipe.duckdb")
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "pipe.duckdb"))
    with pytest.raises(ToolkitError, match="pipe.duckdb is no regular file"):
        catalog.artifacts()
    os.mkfifo(tmp_path / "other.duckdb.wal")
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "other.duckdb"))
    with pytest.raises(ToolkitError, match="other.duckdb.wal is no regular file"):
        make(tmp_path / "pool.parquet")
    with closing(sqlite3.connect(tmp_path / "lite.db")) as other:
        other.execute("create table a (b)")
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "lite.db"))
    with pytest.raises(ToolkitError, match="lite.db is no catalog; set DINOV2_CATALOG to another, or move it away"):
        catalog.artifacts()
    (tmp_path / "file").touch()
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / "file" / "catalog.duckdb"))
    with pytest.raises(ToolkitError, match="cannot be opened .*set DINOV2_CATALOG to another"):
        make(tmp_path / "pool.parquet")


def test_a_name_in_the_cloud_is_a_file_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DINOV2_CATALOG", "md:x.duckdb")
    make(tmp_path / "pool.parquet")
    assert (tmp_path / "md:x.duckdb").is_file()


def test_an_unknown_kind_names_the_kinds(tmp_path: Path) -> None:
    make(tmp_path / "pool.parquet")
    commands.list_artifacts("run", as_json=False)
    with pytest.raises(
        ToolkitError, match=r"--kind embedding: there is no such kind \(did you mean 'embeddings'\?\); give"
    ):
        commands.list_artifacts("embedding", as_json=False)


def test_of_artifacts_with_the_same_content_lineage_names_the_one_that_was_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = make(tmp_path / "used.parquet")
    twin = make(tmp_path / "twin.parquet")
    assert used.content_id == twin.content_id
    make(tmp_path / "unique.parquet", "curate dedup", "selection", inputs=(used,), num_rows=2)
    commands.lineage("unique", as_json=False)
    assert capsys.readouterr().out.splitlines()[1].endswith("used.parquet  [curate embed]")


def test_lineage_opens_everything_once_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = make(tmp_path / "pool.parquet", inputs=(Source("images", "/photos", "listing"),))
    left = make(tmp_path / "left.parquet", "curate dedup", "selection", inputs=(pool,), num_rows=2)
    right = make(tmp_path / "right.parquet", "curate dedup", "selection", inputs=(pool,), num_rows=3)
    both = make(tmp_path / "both.parquet", "curate union", "selection", inputs=(left, right), num_rows=4)
    commands.lineage("both", as_json=False)
    lines = [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "both.parquet  [curate union]",
        "left.parquet  [curate dedup]",
        "pool.parquet  [curate embed]",
        "photos",
        "right.parquet  [curate dedup]",
        "pool.parquet  [curate embed]  (as above)",
    ]
    with catalog.connect() as connection:  # whoever forges ids can make a circle
        pool_id = connection.execute("select id from artifacts where digest = ?", [pool.content_id]).fetchall()[0][0]
        connection.execute("insert into inputs values (?, ?, ?, ?)", [pool_id, "x", both.path, both.content_id])
    commands.lineage("both", as_json=True)
    assert capsys.readouterr().out.count('"again": true') == 2


def test_rebuild_and_verify_name_what_is_broken_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b", "c"):
        make(tmp_path / f"{name}.parquet", num_rows=len(name) + ord(name))
    (tmp_path / "b.parquet").write_bytes(b"PAR")
    (tmp_path / "x.parquet").write_bytes(b"no")
    (tmp_path / "y.provenance.json").write_bytes(b"\xff")
    (tmp_path / "y").touch()
    with pytest.raises(ToolkitError, match="1 of 3 artifacts are not as they were made, first .*b.parquet"):
        commands.verify([], as_json=False)
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["ok", "broken", "ok"]
    assert "b.parquet cannot be read" in printed.err
    catalog_path().unlink()
    commands.rebuild([tmp_path])
    assert {Path(artifact.path).name for artifact in catalog.artifacts()} == {"a.parquet", "c.parquet"}
    said = capsys.readouterr().err
    assert "b.parquet is left out" in said and "x.parquet is left out" in said


def test_names_of_others_cannot_forge_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "a\nerror: forged\x1b[31m\u202e.parquet"
    source = make(tmp_path / evil)
    make(tmp_path / "b.parquet", "curate dedup", "selection", inputs=(source,), num_rows=2)
    commands.list_artifacts(None, as_json=False)
    commands.show(evil, as_json=False)
    commands.lineage("b", as_json=False)
    commands.verify([], as_json=False)
    printed = capsys.readouterr().out
    assert "a\\nerror: forged\\x1b[31m\\u202e.parquet" in printed
    assert not any(line.startswith("error") for line in printed.splitlines()) and "\x1b" not in printed
    commands.list_artifacts(None, as_json=True)  # for programs: the true name
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert str(tmp_path / evil) in [row["path"] for row in rows]


def test_processes_at_once_all_get_their_row_in(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from dinov2_toolkit.store import catalog, database
from dinov2_toolkit.store.manifest import Provenance
for number in range(5):
    path = Path(sys.argv[1]) / f"{sys.argv[2]}-{number}"
    path.write_text("x")
    catalog.record(path, Provenance("run", "train pretrain", {}, content_id=path.name), 0.0)
"""
    workers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(worker)]) for worker in range(4)]
    assert [worker.wait() for worker in workers] == [0, 0, 0, 0]
    assert len(catalog.artifacts("kind = 'run'")) == 20
