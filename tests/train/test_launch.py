import os
import time
from pathlib import Path

import pytest

from dinov2_toolkit.errors import Stopped, ToolkitError
from dinov2_toolkit.tests.train.pair import ended, said, started_pair
from dinov2_toolkit.train.launch import check_launch, ending_together, errors_left, read_status, status_kept


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


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_the_other_wherever_it_is_and_is_said_once(tmp_path: Path, failing: int) -> None:
    def work(rank: int) -> None:
        with ending_together(), status_kept(tmp_path), errors_left():
            if rank == failing:
                raise ToolkitError(f"bad disk of {rank}")
            time.sleep(60)

    assert ended(started_pair(work, tmp_path), 20) == [1, 1]
    assert said(tmp_path) == [f"error: bad disk of {failing}"]
    assert read_status(tmp_path) == {"exit_code": 1, "message": f"bad disk of {failing}"}


def test_an_error_of_all_and_an_unexpected_one_and_a_stop_are_said_once_too(tmp_path: Path) -> None:
    def work(problem: Exception) -> None:
        with ending_together(), status_kept(tmp_path), errors_left():
            raise problem

    assert ended(started_pair(lambda rank: work(ToolkitError("bad images")), tmp_path), 20) == [1, 1]
    assert said(tmp_path) == ["error: bad images"]
    assert ended(started_pair(lambda rank: work(Stopped("at step 3")), tmp_path), 20) == [75, 75]
    assert said(tmp_path) == ["at step 3"] and read_status(tmp_path) == {"exit_code": 75, "message": "at step 3"}
    assert ended(started_pair(lambda rank: work(LookupError("no\nkey")), tmp_path), 20) == [1, 1]
    assert read_status(tmp_path) == {"exit_code": 1, "message": "LookupError: no key"}
    assert said(tmp_path).count("LookupError: no") == 1  # of one traceback


def test_an_error_before_the_first_process_is_there_is_known_to_it(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        time.sleep(2 * (1 - rank))
        with ending_together():
            if rank == 1:
                raise ToolkitError("no such file")
            time.sleep(60)

    assert ended(started_pair(work, tmp_path), 20) == [1, 1]
    assert said(tmp_path) == ["error: no such file"]


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
