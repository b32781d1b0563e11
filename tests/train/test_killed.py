"""A run that is killed at random moments and resumed each time equals one that was never killed."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.tests.train.small_run import noise_images, repeatable_metrics, settings
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


def forked(manifest: Path, folder: Path, num_workers: int, steps: int) -> multiprocessing.process.BaseProcess:
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

    assert repeatable_metrics(killed) == repeatable_metrics(whole)
    last = f"checkpoints/step-{steps:07d}"
    for file in ("teacher.safetensors", f"{last}/student.safetensors", f"{last}/buffers.safetensors"):
        expected, got = load_file(whole / file), load_file(killed / file)
        assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    assert len(list((killed / "checkpoints").iterdir())) == 2


def test_killed_three_times_and_resumed_equals_uninterrupted_bit_for_bit(manifest: Path) -> None:
    assert_killed_equals_whole(manifest, num_workers=1, num_kills=3, steps=18)


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_equals_uninterrupted_bit_for_bit_with_any_workers(manifest: Path) -> None:
    for num_workers in (0, 1, 3):
        assert_killed_equals_whole(manifest, num_workers, num_kills=20, steps=160)
