import errno
import os
import subprocess
import time
from pathlib import Path

import pytest

from dinov2_toolkit.store.files import HOST, replacing, write_text


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_known_by_the_file_that_was_written(tmp_path: Path) -> None:
    for number, name in ((errno.ENOSPC, str(tmp_path / "a")), (errno.EIO, None)):
        with pytest.raises(OSError) as raised, replacing(tmp_path / "a"):
            raise OSError(number, os.strerror(number))
        assert raised.value.filename == name


def test_an_exception_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def leave(folder: Path, host: str, process: int, age_s: float = 0.0) -> Path:
    """Leave a temporary file as a killed process does."""
    left = folder / f".dinov2-{host}-{process}-0.tmp"
    left.write_text("half")
    os.utime(left, (time.time() - age_s,) * 2)
    return left


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    mine = [tmp_path / name for name in (".dinov2-mine.tmp", ".a.txt.tmp", "a.1.tmp", ".dinov2-x-1-y.tmp")]
    for path in mine:
        path.write_text("mine")
    living = leave(tmp_path, HOST, os.getppid()), leave(tmp_path, "elsewhere", 1)
    leave(tmp_path, HOST, dead_process())
    leave(tmp_path, "elsewhere", 2, age_s=8 * 24 * 3600)
    folder = tmp_path / f".dinov2-{HOST}-{dead_process()}-1.tmp"
    folder.mkdir()
    (folder / "half").write_text("half")
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(tmp_path.iterdir()) == sorted([*mine, *living, tmp_path / "a.txt"])


def test_a_name_as_long_as_can_be_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 255)
    write_text(path, "whole")
    assert path.read_text() == "whole"
