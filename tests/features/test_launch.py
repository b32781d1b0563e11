"""Several processes by one command: who speaks, and how they end."""

import os
import sys
from pathlib import Path

import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.launch import Group, join_group, launch, local_count
from dinov2_toolkit.features.launched import is_launched


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_group_of_its_own() -> None:
    group = join_group()
    assert not is_launched(os.environ) and (group.rank, group.count, local_count()) == (0, 1, 1)
    assert group.decide(lambda: True) and not group.decide(lambda: False)
    group.wait()


def test_an_error_of_the_first_process_is_its_own() -> None:
    def fail() -> bool:
        raise ToolkitError("no")

    with pytest.raises(ToolkitError, match="no"):
        Group().decide(fail)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program in the place of the toolkit's: it notes its rank, and ends as `ends` says."""
    package = tmp_path / "dinov2_toolkit"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["dinov2", "argument"])
    monkeypatch.chdir(tmp_path)
    return package / "__main__.py"


HEAD = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\nopen(f'rank-{rank}', 'w').write(sys.argv[1])\n"


def test_every_process_runs_the_same_command_with_its_rank(program: Path, tmp_path: Path) -> None:
    program.write_text(HEAD + "assert os.environ['WORLD_SIZE'] == '3'\n")
    launch(3)
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == ["rank-0", "rank-1", "rank-2"]
    assert (tmp_path / "rank-2").read_text() == "argument"


def test_where_one_fails_the_others_are_stopped(program: Path) -> None:
    program.write_text(HEAD + "time.sleep(60) if rank == 0 else sys.exit(3)\n")
    with pytest.raises(SystemExit) as end:
        launch(2)
    assert end.value.code == 3


def test_a_signal_reaches_all_of_them_and_their_code_comes_back(program: Path) -> None:
    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    program.write_text(HEAD + wait + "os.kill(os.getppid(), signal.SIGTERM) if rank == 1 else None\ntime.sleep(60)\n")
    program.write_text(program.read_text().replace("os.kill(os.getppid()", "time.sleep(1) or os.kill(os.getppid()"))
    with pytest.raises(SystemExit) as end:
        launch(2)
    assert end.value.code == 75
