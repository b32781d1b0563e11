"""Arrays of the cache: without holes when they are written, and made again where they are damaged."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dinov2_toolkit.curate.cluster.kmeans import cluster_vectors
from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.features.search.cells import open_cells
from dinov2_toolkit.store import cache, progress
from dinov2_toolkit.store.arrays import kept_array, new_array, seal
from dinov2_toolkit.store.cache import cache_folder, cached
from dinov2_toolkit.store.manifest import Provenance, open_manifest
from dinov2_toolkit.store.progress import Progress
from dinov2_toolkit.store.vectors import Vectors, open_vectors
from dinov2_toolkit.tests.embedded import write_embeddings

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "header": lambda data: data[:90],
    "garbage": lambda data: b"\x93NUMPY\x01\x00\x02\x00(\n" + bytes(len(data)),
    "zeros": lambda data: bytes(len(data)),
    "other": lambda data: data.replace(b"'shape': (", b"'shape':(9", 1),
    "archive": lambda data: b"PK\x03\x04" + data,
}
SEALED: dict[str, Callable[[bytes], bytes]] = {**DAMAGES, "bit": lambda data: data[:-1] + bytes([data[-1] ^ 1])}
EACH_DAMAGE = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


def drawn(num: int, dim: int = 8) -> Vectors:
    array = np.random.default_rng(num).normal(size=(num, dim)).astype(np.float32)
    path = write_embeddings(cache_folder().parent.parent / f"{num}.parquet", array)
    return open_vectors(open_manifest(path))


def test_a_new_array_has_no_hole_in_which_a_full_disk_could_end_the_process(tmp_path: Path) -> None:
    array = new_array(tmp_path / "a.npy", np.float32, (1000, 700))
    stat = (tmp_path / "a.npy").stat()
    assert stat.st_size == 1000 * 700 * 4 + 128
    assert stat.st_blocks * 512 >= stat.st_size
    array[:] = 1
    assert float(np.load(tmp_path / "a.npy").sum()) == 700_000


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ToolkitError, match=r"no space left in .*\.dinov2/cache for 0 MB; make room, or set DINOV2_C"):
        drawn(100)
    assert [path for path in cache_folder().iterdir() if path.name != cache.MARKER] == []


@pytest.mark.parametrize("damage", SEALED.values(), ids=SEALED)
def test_damaged_vectors_are_decoded_again(
    damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    first = np.array(drawn(300).array)
    (file,) = [path for path in cached() if path.suffix == ".npy"]
    file.write_bytes(damage(file.read_bytes()))
    np.testing.assert_array_equal(
        open_vectors(open_manifest(cache_folder().parent.parent / "300.parquet")).array, first
    )
    assert f"{file} is damaged; it is made again" in capsys.readouterr().err


@pytest.mark.parametrize("damage", SEALED.values(), ids=SEALED)
@pytest.mark.parametrize("name", ["stored", "ids", "centroids", "nearest", "gaps", "offsets"])
def test_damaged_cells_are_made_again(name: str, damage: Callable[[bytes], bytes]) -> None:
    pool = drawn(600)
    first = {name: np.array(array) for name, array in vars(open_cells(pool, 0)).items()}
    (file,) = [path for path in cached() if path.name.endswith(f"-{name}.npy")]
    file.write_bytes(damage(file.read_bytes()))
    for key, array in vars(open_cells(pool, 0)).items():
        np.testing.assert_array_equal(array, first[key])


@EACH_DAMAGE
def test_damaged_progress_is_forgotten(damage: Callable[[bytes], bytes], capsys: pytest.CaptureFixture[str]) -> None:
    kept = Progress(Provenance("graph", "join", {}))
    kept.save("fit", chosen=np.arange(50), step=3)
    found = kept.load("fit")
    assert found is not None and found["chosen"].tolist() == list(range(50)) and int(found["step"]) == 3
    file = kept.folder / "fit.npz"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = kept.load("fit")
    assert again is None or again["chosen"].tolist() == list(range(50))  # whole behind other bytes
    middle = whole.index(np.arange(50).tobytes()[8:80])
    file.write_bytes(whole[:middle] + b"x" + whole[middle + 1 :])  # as long as it was
    assert kept.load("fit") is None and not file.exists()
    assert "fit.npz is damaged; it is made again" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["assignments.npy", "distances.npy", "assigned.npz", "centroids.npz"])
@pytest.mark.parametrize("how", ["gone", "cut", "zeros within"])
def test_a_stopped_clustering_whose_scratch_is_damaged_ends_as_the_undisturbed_one(
    name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2_toolkit.curate.cluster.kmeans.BLOCK_ROWS", 64)
    monkeypatch.setattr(progress, "SAVE_EVERY_S", 0.0)
    vectors = drawn(500)
    whole = cluster_vectors(vectors, 5, num_resamplings=1, seed=0)
    kept, save = Progress(Provenance("selection", "curate cluster", {})), Progress.save

    def stopping(self: Progress, key: str, **arrays: np.ndarray) -> None:
        save(self, key, **arrays)
        if key == "assigned" and int(arrays["rows"]) >= 256:
            raise Stopped

    monkeypatch.setattr(Progress, "save", stopping)
    with pytest.raises(Stopped):
        cluster_vectors(vectors, 5, num_resamplings=1, seed=0, progress=kept)
    monkeypatch.setattr(Progress, "save", save)
    data = (kept.folder / name).read_bytes()
    (kept.folder / name).unlink()
    if how != "gone":
        half = len(data) // 2
        (kept.folder / name).write_bytes(data[:half] if how == "cut" else data[:half] + bytes(80) + data[half + 80 :])
    resumed = cluster_vectors(vectors, 5, num_resamplings=1, seed=0, progress=kept)
    np.testing.assert_array_equal(resumed.assignments, whole.assignments)
    np.testing.assert_array_equal(resumed.distances, whole.distances)


def test_an_array_of_another_kind_is_no_array_of_ours(tmp_path: Path) -> None:
    for dtype, shape in ((np.float64, (3, 2)), (np.float32, (3,)), (np.float32, (2, 2)), (np.float32, (3, 2, 1))):
        np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
        seal(tmp_path / "a.npy")
        assert kept_array(tmp_path / "a.npy", dtype, shape) is None
        assert not (tmp_path / "a.npy").exists()
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    seal(tmp_path / "a.npy")
    assert kept_array(tmp_path / "a.npy", np.float32, (None, 2)) is not None


def test_what_is_no_file_is_damaged_and_never_waited_for(tmp_path: Path) -> None:
    kept = Progress(Provenance("x", "x", {}))
    kept.save("fit", a=np.arange(3))
    for make in (os.mkfifo, os.mkdir):
        for mode in ("r", "r+"):
            make(tmp_path / "a.npy")
            assert kept_array(tmp_path / "a.npy", np.float32, (3,), mode) is None
            assert not (tmp_path / "a.npy").exists()
        (kept.folder / "fit.npz").unlink(missing_ok=True)
        make(kept.folder / "fit.npz")
        assert kept.load("fit") is None
