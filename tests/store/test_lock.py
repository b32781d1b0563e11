"""One process at a time writes an output."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinov2_toolkit.curate.cluster.cluster import ClusterSettings, cluster_images
from dinov2_toolkit.curate.dedup.dedup import dedup_images
from dinov2_toolkit.curate.dedup.settings import DedupSettings
from dinov2_toolkit.curate.map.map import MapSettings, map_images
from dinov2_toolkit.curate.union import Part, UnionSettings, union_manifests
from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.manage.query import sql
from dinov2_toolkit.report.report import report
from dinov2_toolkit.store import lock
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.lock import held, is_held, writing
from dinov2_toolkit.store.manifest import removed_path
from dinov2_toolkit.tests.embedded import write_embeddings

HOLD = """
import sys, time
from pathlib import Path
from dinov2_toolkit.store.lock import writing
with writing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_embeddings(tmp_path / "pool.parquet", np.eye(6, dtype=np.float32))


STEPS: dict[str, Callable[[Path, str], object]] = {
    "dedup": lambda pool, output: dedup_images(pool, output, DedupSettings(threshold=0.9), Options()),
    "cluster": lambda pool, output: cluster_images(pool, output, ClusterSettings("2"), Options()),
    "union": lambda pool, output: union_manifests([Part(pool)], output, UnionSettings(), Options()),
    "sql": lambda pool, output: sql(f"select * from '{pool}'", output, False, False),
}


@pytest.mark.parametrize("step", STEPS)
def test_of_two_commands_on_one_output_one_says_so_and_writes_nothing(tmp_path: Path, pool: Path, step: str) -> None:
    output = tmp_path / "out.parquet"
    with writing(output), pytest.raises(ToolkitError, match="another process is writing .*out.parquet; wait"):
        STEPS[step](pool, str(output))
    assert not output.exists()
    STEPS[step](pool, str(output))
    assert output.exists()
    assert not list(tmp_path.glob(".*.lock"))


def test_a_list_of_removed_rows_has_one_writer_too(tmp_path: Path, pool: Path) -> None:
    with writing(removed_path(tmp_path / "out.parquet")), pytest.raises(ToolkitError, match="writing .*out.removed"):
        STEPS["dedup"](pool, str(tmp_path / "out.parquet"))


def test_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(ToolkitError, match="another process"), writing(output):
        pass
    other.kill()
    other.communicate()
    assert (tmp_path / ".out.parquet.lock").exists()
    with writing(output):
        pass
    assert not (tmp_path / ".out.parquet.lock").exists()


def test_files_of_others_by_the_names_of_locks_stay(tmp_path: Path) -> None:
    (tmp_path / ".x.lock").write_text("mine")
    with writing(tmp_path / "x"):
        pass
    with held(tmp_path / ".x.lock", "training"):
        pass
    assert (tmp_path / ".x.lock").read_text() == "mine"
    (tmp_path / ".link.lock").symlink_to(".x.lock")
    with pytest.raises(OSError, match="symbolic links"), held(tmp_path / ".link.lock", "training"):
        pass
    os.mkfifo(tmp_path / "pipe")
    assert not is_held(tmp_path / "pipe") and not is_held(tmp_path / "none")


PICTURES: dict[str, Callable[[Path, Path], object]] = {
    "sheet.png": lambda pool, at: dedup_images(
        pool, str(pool.with_name("u.parquet")), DedupSettings(threshold=0.9, sheet=at), Options()
    ),
    "clusters.png": lambda pool, at: cluster_images(
        pool, str(pool.with_name("c.parquet")), ClusterSettings("2", sheet=at), Options()
    ),
    "map.html": lambda pool, at: map_images(pool, str(pool.with_name("m.parquet")), MapSettings(html=at), Options()),
    "report.html": lambda pool, at: report([str(pool)], str(at), Options()),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_and_pages_have_one_writer(tmp_path: Path, pool: Path, name: str) -> None:
    at = tmp_path / name
    with writing(at), pytest.raises(ToolkitError, match=f"another process is writing .*{name}; wait"):
        PICTURES[name](pool, at)
    assert not at.exists()


def test_a_lock_that_its_holder_has_just_removed_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / ".x.lock", lock.try_lock

    def slow(file: int) -> bool:
        monkeypatch.setattr(lock, "try_lock", real)
        path.unlink()  # who held it has ended between our opening and our locking of it
        return real(file)

    monkeypatch.setattr(lock, "try_lock", slow)
    with writing(tmp_path / "x"):
        assert path.exists()
        with pytest.raises(ToolkitError), writing(tmp_path / "x"):
            pass
    assert not path.exists()
