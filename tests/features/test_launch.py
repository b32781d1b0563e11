"""Several processes by one command: who speaks, how they end, and what a signal does."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.features import launch as module
from dinov2_toolkit.features.launch import (
    Group,
    adopt_slurm,
    caught_signals,
    first_host,
    is_launched,
    join_group,
    launch,
    needs_others,
    prints_result,
)
from dinov2_toolkit.process import SIGNALS


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def test_one_process_is_a_group_by_itself() -> None:
    group = join_group()
    assert not is_launched(os.environ) and (group.rank, group.count) == (0, 1)
    assert group.decide(lambda: True) and not group.decide(lambda: False)
    group.wait()


def test_an_error_of_the_first_process_is_raised_there() -> None:
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


def test_when_one_process_fails_the_others_are_stopped(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_AFTER_S", 0.2)
    program.write_text(HEAD + "time.sleep(60) if rank == 0 else sys.exit(3)\n")
    with pytest.raises(SystemExit) as end:
        launch(2)
    assert end.value.code == 3


def test_a_signal_reaches_all_processes_and_their_exit_code_is_returned(program: Path) -> None:
    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    program.write_text(HEAD + wait + "os.kill(os.getppid(), signal.SIGTERM) if rank == 1 else None\ntime.sleep(60)\n")
    program.write_text(program.read_text().replace("os.kill(os.getppid()", "time.sleep(1) or os.kill(os.getppid()"))
    with pytest.raises(SystemExit) as end:
        launch(2)
    assert end.value.code == 75


def test_a_signal_to_processes_with_nothing_to_save_is_an_interruption(program: Path) -> None:
    program.write_text(
        HEAD + "time.sleep(1)\nos.kill(os.getppid(), signal.SIGTERM) if rank == 1 else None\ntime.sleep(60)\n"
    )
    with pytest.raises(KeyboardInterrupt):
        launch(2)


def test_a_process_that_does_not_end_after_another_failed_is_killed(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_AFTER_S", 0.2)
    monkeypatch.setattr(module, "KILL_AFTER_S", 0.5)
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN) if rank == 0 else time.sleep(1) or sys.exit(3)\n"
    program.write_text(HEAD + ignore + "time.sleep(60)\n")
    with pytest.raises(SystemExit) as end:
        launch(2)
    assert end.value.code == 3


def test_the_first_host_of_a_slurm_node_list() -> None:
    assert first_host("gpu-7") == "gpu-7"
    assert first_host("gpu-7,gpu-9") == "gpu-7"
    assert first_host("gpu-[07-09,12],cpu-1") == "gpu-07"
    assert first_host("rack[2,4]n.site") == "rack2n.site"
    assert [first_host(nodes) for nodes in ("n[3-5]x", "n[03]")] == ["n3x", "n03"]
    with pytest.raises(ToolkitError, match="no list of nodes"):
        first_host("")


def test_srun_with_several_tasks_is_a_launcher_and_a_single_task_is_not() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }
    assert is_launched(step) and is_launched({"WORLD_SIZE": "1"})
    assert not is_launched({}) and not is_launched(step | {"SLURM_STEP_NUM_TASKS": "1"})
    environment = dict(step)
    adopt_slurm(environment)
    added = {name: value for name, value in environment.items() if name not in step}
    assert added == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(20_000 + 123_456 % 20_000),
    }
    torchrun = step | {"WORLD_SIZE": "2", "RANK": "1"}
    adopt_slurm(torchrun)
    assert torchrun == step | {"WORLD_SIZE": "2", "RANK": "1"}


@pytest.fixture
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_own_handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_noted_and_the_next_ends_the_process(
    capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with caught_signals("step") as received:
        pass
    assert received == [] and signal.getsignal(number) == before
    with caught_signals("step") as received:
        os.kill(os.getpid(), number)
        assert received == [number]
    assert signal.getsignal(number) == signal.SIG_DFL
    assert f"{number.name}: saving after this step" in capsys.readouterr().err


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_stops_the_others_and_what_is_kept_is_said(program: Path, killed: int) -> None:
    broken = "RuntimeError('gloo/transport/tcp/pair.cc:525] Connection closed by peer')"
    program.write_text(HEAD + f"os.kill(os.getpid(), 9) if rank == {killed} else time.sleep(1)\nraise {broken}\n")
    with pytest.raises(Stopped, match=f"process {killed} of 2 was ended by SIGKILL; step 7 is saved"):
        launch(2, lambda: "step 7 is saved")


def test_the_end_of_another_process_is_a_stop_and_other_errors_are_not() -> None:
    with (
        pytest.raises(Stopped, match="another process ended; step 7 is saved"),
        needs_others(lambda: "step 7 is saved"),
    ):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:4000")
    with pytest.raises(RuntimeError, match="shapes"), needs_others():
        raise RuntimeError("shapes cannot be multiplied")


def test_the_process_that_the_user_started_prints_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prints_result()
    monkeypatch.setenv("RANK", "0")
    assert prints_result()
    monkeypatch.setenv("DINOV2_LAUNCHED", str(os.getppid()))
    assert not prints_result()
