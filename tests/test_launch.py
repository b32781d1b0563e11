import os
import signal
from pathlib import Path

import pytest

from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.train.launch import (
    adopt_slurm,
    caught_signals,
    check_launch,
    first_host,
    is_launched,
    read_status,
    status_kept,
)


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
        with caught_signals() as received:
            os.kill(os.getpid(), number)
            assert received == [number]
            assert signal.getsignal(number) == before
        assert signal.getsignal(number) == before


def test_the_status_file_carries_the_exit_code(tmp_path: Path) -> None:
    with status_kept(tmp_path):
        assert read_status(tmp_path) == {"pid": os.getpid()}
    assert read_status(tmp_path) == {"exit_code": 0}
    with pytest.raises(Stopped), status_kept(tmp_path):
        raise Stopped("at step 3")
    assert read_status(tmp_path) == {"exit_code": 75, "message": "at step 3"}
    with pytest.raises(ToolkitError), status_kept(tmp_path):
        raise ToolkitError("bad")
    assert read_status(tmp_path) == {"exit_code": 1, "message": "bad"}


def test_under_our_launcher_a_stopped_process_ends_with_code_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOV2_LAUNCHED", "1")
    with pytest.raises(SystemExit) as ended, status_kept(tmp_path):
        raise Stopped("at step 3")
    assert ended.value.code == 0
    assert read_status(tmp_path)["exit_code"] == 75


def test_launches_that_accelerate_would_silently_misunderstand_are_errors() -> None:
    torchrun = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for fine in ({}, torchrun, {"ACCELERATE_USE_CPU": "true"}, torchrun | {"ACCELERATE_USE_CPU": "true"}):
        check_launch(fine, has_gpu=False)
    with pytest.raises(ToolkitError, match="WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT, RANK is not set"):
        check_launch({"WORLD_SIZE": "2"}, has_gpu=True)
    with pytest.raises(ToolkitError, match="`accelerate launch --cpu` starts a single process"):
        check_launch({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"}, has_gpu=False)
    with pytest.raises(ToolkitError, match="FSDP needs GPUs"):
        check_launch(torchrun | {"ACCELERATE_USE_FSDP": "true"}, has_gpu=False)
    check_launch(torchrun | {"ACCELERATE_USE_FSDP": "true"}, has_gpu=True)
    with pytest.raises(ToolkitError, match="ACCELERATE_USE_DEEPSPEED is set"):
        check_launch(torchrun | {"ACCELERATE_USE_DEEPSPEED": "true"}, has_gpu=True)
