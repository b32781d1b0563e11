"""A run that is killed at random moments and resumed each time equals one that was never killed."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import dinov2_toolkit
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train import small_run
from dinov2_toolkit.tests.train.pair import ended, started_pair
from dinov2_toolkit.tests.train.small_run import CLOCK, noise_images, repeatable_metrics, settings
from dinov2_toolkit.train.monitor.metrics import read_metrics
from dinov2_toolkit.train.pretrain import pretrain

SETTINGS = ("batch_size=[[0, 4], [80, 8]]", "checkpoint_every=3", "keep_checkpoints=2")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return noise_images(tmp_path)


def run(manifest: Path, folder: Path, num_workers: int, steps: int) -> None:
    torch.set_num_threads(1)
    config = settings(*SETTINGS, f"num_workers={num_workers}", f"steps={steps}")
    pretrain(manifest, str(folder), config, Options(), resume=True)


def forked(manifest: Path, folder: Path, num_workers: int, steps: int) -> BaseProcess:
    """Start a run in a process of its own, which has everything imported already."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(manifest, folder, num_workers, steps))
    process.start()
    return process


def steps_done(folder: Path) -> int:
    lines = read_metrics(folder)
    return int(lines[-1]["step"]) if lines else 0


def assert_killed_equals_whole(manifest: Path, num_workers: int, num_kills: int, steps: int) -> None:
    whole, killed = manifest.parent / "whole", manifest.parent / f"killed-{num_workers}"
    if not whole.exists():
        run(manifest, whole, 0, steps)
    chance = random.Random(num_workers)
    num_killed = 0
    for _ in range(num_kills):
        process = forked(manifest, killed, num_workers, steps)
        last_step = steps_done(killed) + chance.randint(0, steps // (num_kills + 1) - 2)
        while steps_done(killed) < last_step and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        num_killed += process.exitcode == -signal.SIGKILL
    assert num_killed == num_kills
    process = forked(manifest, killed, num_workers, steps)
    process.join()
    assert process.exitcode == 0
    assert_equal(killed, whole, steps)
    assert len(list((killed / "checkpoints").iterdir())) == 2


def assert_equal(killed: Path, whole: Path, steps: int) -> None:
    """Compare all that two finished runs leave, but what depends on the clock."""
    assert repeatable_metrics(killed) == repeatable_metrics(whole)
    last = f"checkpoints/step-{steps:07d}"
    for file in ("teacher.safetensors", f"{last}/student.safetensors", f"{last}/buffers.safetensors"):
        expected, got = load_file(whole / file), load_file(killed / file)
        assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert table(killed) == table(whole)
    assert sorted(names(killed)) == sorted(names(whole))


def table(run_folder: Path) -> list[dict[str, object]]:
    """Return the rows of `metrics.parquet` without what depends on the clock."""
    rows = pq.read_table(run_folder / "metrics.parquet").drop_columns(CLOCK).to_pylist()
    assert len(rows) == len(read_metrics(run_folder))
    return list(rows)


def names(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for path in folder.rglob("*")]


def test_killed_three_times_and_resumed_equals_uninterrupted_bit_for_bit(manifest: Path) -> None:
    assert_killed_equals_whole(manifest, num_workers=1, num_kills=3, steps=18)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_equals_uninterrupted_bit_for_bit_with_any_workers(manifest: Path) -> None:
    for num_workers in (0, 1, 3):
        assert_killed_equals_whole(manifest, num_workers, num_kills=20, steps=160)


def forked_pair(manifest: Path, folder: Path, steps: int) -> list[BaseProcess]:
    """Start a run of two processes as torchrun does."""
    return started_pair(lambda rank: run(manifest, folder, 0, steps), manifest.parent)


def assert_killed_pair_equals_whole(manifest: Path, num_kills: int, steps: int) -> None:
    whole, killed = manifest.parent / "whole", manifest.parent / "killed"
    assert ended(forked_pair(manifest, whole, steps), 240) == [0, 0]
    chance = random.Random(2)
    for number in range(num_kills):
        pair = forked_pair(manifest, killed, steps)
        last_step = min(steps_done(killed) + chance.randint(0, steps // num_kills), steps - 2)
        while steps_done(killed) < last_step and all(process.is_alive() for process in pair):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        victims = [pair[:1], pair[1:], pair][number % 3]
        for process in victims:
            process.kill()
        # The other one notices, unless it waits for a first meeting, as torchrun ends it then.
        codes = ended(pair, 10)
        assert all(pair[rank] in victims or code in (75, -signal.SIGKILL) for rank, code in enumerate(codes)), codes
    assert ended(forked_pair(manifest, killed, steps), 240) == [0, 0]
    assert_equal(killed, whole, steps)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_equal_the_undisturbed_two_bit_for_bit(manifest: Path) -> None:
    assert_killed_pair_equals_whole(manifest, num_kills=21, steps=120)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["student.safetensors", "checksums.json", "state.json"])
def test_two_processes_go_back_to_the_same_checkpoint(manifest: Path, file: str) -> None:
    whole, run_folder = manifest.parent / "whole", manifest.parent / "run"
    assert ended(forked_pair(manifest, whole, 9), 240) == [0, 0]
    shutil.copytree(whole, run_folder)
    for name in ("model.json", "teacher.safetensors"):
        (run_folder / name).unlink()
    damaged = run_folder / "checkpoints/step-0000009" / file
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert ended(forked_pair(manifest, run_folder, 9), 240) == [0, 0]
    assert_equal(run_folder, whole, 9)


@pytest.mark.slow
def test_our_launcher_or_one_of_its_processes_is_killed(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes whose launcher is killed end by themselves; the next command goes on from what they saved."""
    monkeypatch.chdir(manifest.parent)
    monkeypatch.setenv("PYTHONPATH", str(Path(dinov2_toolkit.__file__).parent / ".types"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changes = [f"--set={change}" for change in (*small_run.SETTINGS, *SETTINGS, "steps=40")]
    command = [sys.executable, "-m", "dinov2_toolkit", "train", "pretrain", str(manifest), "--resume", *changes]
    command += ["--num-processes", "2", "-o"]
    assert subprocess.run([*command, "whole"], check=False).returncode == 0
    for number, victim in enumerate(("launcher", "first", "second")):
        launcher = subprocess.Popen([*command, "killed"], stderr=subprocess.PIPE, text=True)
        while steps_done(Path("killed")) < 10 * (number + 1):
            assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
            time.sleep(0.01)
        ranks = children(launcher.pid)
        assert len(ranks) == 2
        os.kill({"launcher": launcher.pid, "first": min(ranks), "second": max(ranks)}[victim], signal.SIGKILL)
        _, said = launcher.communicate(timeout=60)
        if victim != "launcher":
            assert launcher.returncode == 75 and "was ended by SIGKILL; step-0" in said.splitlines()[-1], said
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline, "they live on"
            time.sleep(0.1)
    assert subprocess.run([*command, "killed"], check=False).returncode == 0
    assert_equal(Path("killed"), Path("whole"), 40)


def children(process: int) -> list[int]:
    """Return the ids of the processes that a process has started and that live."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
