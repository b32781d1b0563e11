"""How a process was started, and what a signal does."""

import os
import signal

import pytest

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.launched import adopt_slurm, caught_signals, first_host, is_launched


def test_the_first_host_of_a_slurm_node_list() -> None:
    assert first_host("gpu-7") == "gpu-7"
    assert first_host("gpu-7,gpu-9") == "gpu-7"
    assert first_host("gpu-[07-09,12],cpu-1") == "gpu-07"
    assert first_host("rack[2,4]n.site") == "rack2n.site"
    with pytest.raises(ToolkitError, match="no list of nodes"):
        first_host("")


def test_srun_with_several_tasks_is_a_launcher_and_a_single_task_is_not() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "n[1-2]",
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
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(20_000 + 123_456 % 20_000),
    }
    torchrun = step | {"WORLD_SIZE": "2", "RANK": "1"}
    adopt_slurm(torchrun)
    assert torchrun == step | {"WORLD_SIZE": "2", "RANK": "1"}


def test_a_first_signal_is_noted_and_a_second_one_acts() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        before = signal.getsignal(number)
        with caught_signals("step") as received:
            os.kill(os.getpid(), number)
            assert received == [number]
            assert signal.getsignal(number) == before
        assert signal.getsignal(number) == before


def test_slurm_variables_become_those_of_torch() -> None:
    environment = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_JOB_ID": "123456",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu-[07-09,12],cpu-1",
    }
    adopt_slurm(environment)
    wanted = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu-07", "MASTER_PORT": "23456"}
    assert {name: environment[name] for name in wanted} == wanted
    assert [first_host(nodes) for nodes in ("a", "a,b", "n[3-5]x", "n[03]")] == ["a", "a", "n3x", "n03"]


def test_a_signal_is_noted_once_and_handlers_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with caught_signals("batch") as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) == before
    assert "SIGTERM: saving after this batch" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
