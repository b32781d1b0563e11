"""The catalog: what was recorded is found, chosen, traced, verified, and rebuilt."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage import catalog as commands
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.artifact import Options, is_up_to_date
from dinov2_toolkit.store.cache import cache_folder, cached, open_cache
from dinov2_toolkit.store.lock import held
from dinov2_toolkit.store.manifest import IMAGE_FIELDS, ManifestWriter, Provenance, Source, open_manifest

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


def test_an_artifact_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    make(tmp_path / "pool.parquet", parameters={"model": "pixels"})
    for name in (str(tmp_path / "pool.parquet"), "pool.parquet", "pool"):
        artifact = catalog.find(name)
        assert (artifact.kind, artifact.rows, artifact.role, artifact.model) == ("embeddings", 1, "pool", "model-1")
        assert json.loads(artifact.parameters) == {"model": "pixels"}
    assert catalog.metrics_of(artifact) == [("entropy", 0.5)]
    with pytest.raises(ToolkitError, match="has no 'other'"):
        catalog.find("other")


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
    catalog.catalog_path().unlink()
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


def test_a_file_that_is_no_catalog_is_one_clear_line() -> None:
    catalog.catalog_path().parent.mkdir(parents=True)
    catalog.catalog_path().write_text("hello")
    with pytest.raises(ToolkitError, match="is not a catalog"):
        catalog.artifacts()


def test_processes_at_once_all_get_their_row_in(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from dinov2_toolkit.store import catalog
from dinov2_toolkit.store.manifest import Provenance
for number in range(5):
    path = Path(sys.argv[1]) / f"{sys.argv[2]}-{number}"
    path.write_text("x")
    catalog.record(path, Provenance("run", "train pretrain", {}, content_id=path.name), 0.0)
"""
    workers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), str(worker)]) for worker in range(4)]
    assert [worker.wait() for worker in workers] == [0, 0, 0, 0]
    assert len(catalog.artifacts("kind = 'run'")) == 20
