import os
from pathlib import Path

import pytest

from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.train.launch import check_launch, read_status, status_kept


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


def test_other_processes_end_as_the_main_one_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolkitError), status_kept(tmp_path):
        raise ToolkitError("bad")
    monkeypatch.setenv("RANK", "1")
    problems: list[tuple[Stopped | ToolkitError, int]] = [(Stopped("at step 3"), 75), (ToolkitError("bad"), 1)]
    for problem, code in problems:
        with pytest.raises(SystemExit) as ended, status_kept(tmp_path):
            raise problem
        assert ended.value.code == code
    with pytest.raises(ToolkitError, match="of its own"), status_kept(tmp_path):
        raise ToolkitError("of its own")
    assert read_status(tmp_path) == {"exit_code": 1, "message": "bad"}


def test_launches_that_accelerate_would_silently_misunderstand_are_errors() -> None:
    torchrun = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    by_accelerate = torchrun | {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    for fine in ({}, torchrun, {"ACCELERATE_USE_CPU": "true"}, by_accelerate):
        check_launch(fine)
    with pytest.raises(ToolkitError, match="WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT, RANK is not set"):
        check_launch({"WORLD_SIZE": "2"})
    with pytest.raises(ToolkitError, match="`accelerate launch --cpu` starts a single process"):
        check_launch({"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"})
    with pytest.raises(ToolkitError, match="ACCELERATE_USE_DEEPSPEED is set"):
        check_launch(torchrun | {"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(ToolkitError, match="ACCELERATE_DYNAMO_BACKEND is set"):
        check_launch(torchrun | {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"})
