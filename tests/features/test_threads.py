"""Threads, each of which computes on one core."""

import os
import threading

import faiss
import pytest
import torch

from dinov2_toolkit.features.threads import in_parallel, num_cores, run, workers


def test_cores_are_those_asked_for_or_all_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, count in (("3", 3), ("5,2", 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert num_cores() == count
    for nonsense in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert num_cores() == len(os.sched_getaffinity(0))


def test_there_is_a_thread_a_core_though_torch_computes_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    meeting = threading.Barrier(3, timeout=30)  # passes only where three threads wait at the same time

    def meet(part: int) -> int:
        meeting.wait()
        return 10 * part

    with workers() as threads:
        assert (threads.count, torch.get_num_threads()) == (3, 1)
        assert list(run(threads, meet, range(9))) == [10 * part for part in range(9)]
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before


def test_steps_in_parallel_are_all_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    done = [0] * 100

    def step(start: int) -> None:
        done[start] += 1

    in_parallel(step, range(0, 100, 10))
    assert done == [int(start % 10 == 0) for start in range(100)]
