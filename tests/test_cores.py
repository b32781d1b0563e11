"""How many cores a command computes on, how its threads wait, and that none of either is left over."""

import gc
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import dinov2_toolkit
from dinov2_toolkit import cores
from dinov2_toolkit.cli import app
from dinov2_toolkit.cores import cgroup_quota, threads_of_each, usable_cores
from dinov2_toolkit.store import memory

DATA = Path(dinov2_toolkit.__path__[0]) / "examples" / "data"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_WAIT_POLICY", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", *cores.WAITING):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(cores.THREADS, "1")
    monkeypatch.setattr(cores, "_asked", None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def machine(monkeypatch: pytest.MonkeyPatch, every: int, bound: int, quota: float = math.inf) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: every)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(bound)))
    monkeypatch.setattr(cores, "cgroup_quota", lambda: quota)


def test_cores_are_those_that_the_process_is_bound_to_and_has_time_of(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, every=16, bound=12)
    assert usable_cores() == 12
    machine(monkeypatch, every=16, bound=12, quota=2.5)
    assert usable_cores() == 2
    machine(monkeypatch, every=16, bound=12, quota=0.5)
    assert usable_cores() == 1


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, every=16, bound=12)
    monkeypatch.setattr(cores, "_given", None)
    assert threads_of_each(4) == "3" and threads_of_each(20) == "1"
    monkeypatch.setattr(cores, "_given", "5")  # by the user
    assert threads_of_each(4) == "5"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # in one of them
    assert usable_cores() == 3


def test_processes_that_srun_has_bound_to_cores_do_not_share_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    machine(monkeypatch, every=16, bound=4)
    assert usable_cores() == 4
    machine(monkeypatch, every=16, bound=16)
    assert usable_cores() == 4


@pytest.mark.parametrize(("text", "expected"), [("4(x2)", 4), ("2,1", 8), ("x", 16), ("", 16), ("0", 16), ("-2", 16)])
def test_numbers_of_processes_may_have_words_after_them(
    text: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, every=16, bound=16)
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.setenv(name, text)
        assert usable_cores() == expected
        monkeypatch.delenv(name)


def test_the_option_bounds_cores_and_is_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, every=16, bound=16)
    cores.use_threads(3)
    assert usable_cores() == 3 and threads_of_each(4) == "3"
    assert torch.get_num_threads() == 3 and os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, "0::/a/b", 2.5),  # of the group above, too
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),  # in a container
        ({"cpu.max": "max 100000"}, "0::/", math.inf),
        ({"cpu/x/cpu.cfs_quota_us": "400000"}, "4:cpu,cpuacct:/x", 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1"}, "4:cpu,cpuacct:/x", math.inf),
        ({}, "3:cpuset:/x", math.inf),
    ],
)
def test_the_quota_is_the_least_of_all_groups(
    files: dict[str, str], membership: str, expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "own").write_text(membership + "\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    assert cgroup_quota() == expected


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    cores.prepare()
    assert os.environ["GOMP_SPINCOUNT"] == "7" and os.environ["KMP_BLOCKTIME"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_how_threads_wait_is_left_to_a_policy_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cores.prepare()
    assert not os.environ.keys() & cores.WAITING.keys()


def test_the_libraries_of_a_command_see_how_threads_wait_and_how_many_they_are(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    embed = ["curate", "embed", str(DATA / "fashion_queries.parquet"), "--model", "pixels", "--dry-run"]
    command = [sys.executable, "-m", "dinov2_toolkit", *embed, "--threads", "3"]
    said = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stderr
    assert "GOMP_SPINCOUNT = '1000'" in said and "OMP_NUM_THREADS = '3'" in said


def test_rows_are_the_same_with_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def rows(threads: int) -> list[list[dict[str, object]]]:
        pool, kept, clusters = (f"{name}-{threads}.parquet" for name in ("pool", "kept", "clusters"))
        asked = ["--threads", str(threads), "-q"]
        source = str(DATA / "fashion_queries.parquet")
        app(["curate", "embed", source, "-o", pool, "--model", "pixels", *asked], standalone_mode=False)
        app(["curate", "dedup", pool, "-o", kept, "--threshold", "0.9", *asked], standalone_mode=False)
        app(["curate", "cluster", kept, "-o", clusters, "--num-clusters", "20,4", *asked], standalone_mode=False)
        return [pq.read_table(name).to_pylist() for name in (pool, kept, clusters)]

    assert rows(1) == rows(2)


def test_no_descriptors_threads_or_processes_are_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--set", "steps=4", "--set", "batch_size=8", "--set", "depth=1", "--set", "checkpoint_every=2"]
    small += ["--set", "eval_every=2", "--eval-train", "eval.parquet", "--eval-test", "eval.parquet", "-q"]
    table = pq.read_table(DATA / "fashion_queries.parquet")
    pq.write_table(table, "images.parquet")
    pq.write_table(table.take(list(range(0, len(table), 10))), "eval.parquet")

    def held_after_a_round() -> dict[str, int]:
        app(["curate", "embed", "images.parquet", "--model", "pixels", "--force", "-q"], standalone_mode=False)
        train = ["train", "pretrain", "images.parquet", "-o", "run", "--recipe", "tiny", "--force", *small]
        app(train, standalone_mode=False)
        gc.collect()
        tasks = list(Path("/proc/self/task").iterdir())
        children = [child for task in tasks for child in (task / "children").read_text().split()]
        return {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(tasks), "processes": len(children)}

    held_after_a_round()  # pools of threads, and the process that decodes images, stay until the end
    assert held_after_a_round() == held_after_a_round()
