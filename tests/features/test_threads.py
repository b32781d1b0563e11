"""Threads, each of which computes on one core."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import faiss
import pytest
import torch

from dinov2_toolkit.features.threads import in_parallel, map_in_order, num_cores, workers


def test_cores_are_those_asked_for_or_all_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, count in (("3", 3), ("5,2", 5)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
        assert num_cores() == count
    for nonsense in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert num_cores() == len(os.sched_getaffinity(0))


def test_workers_are_one_thread_a_core_while_torch_computes_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    meeting = threading.Barrier(3, timeout=30)  # passes only where three threads wait at the same time

    def meet(part: int) -> int:
        meeting.wait()
        return 10 * part

    with workers() as threads:
        assert (threads.count, torch.get_num_threads()) == (3, 1)
        assert list(map_in_order(meet, range(9), threads)) == [10 * part for part in range(9)]
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before


def test_steps_in_parallel_are_all_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    done = [0] * 100

    def step(start: int) -> None:
        done[start] += 1

    in_parallel(step, range(0, 100, 10))
    assert done == [int(start % 10 == 0) for start in range(100)]


def test_items_are_taken_as_needed_and_a_closed_iterator_cancels_what_has_not_begun() -> None:
    taken: list[int] = []
    begun: list[int] = []
    goes_on = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    def wait(number: int) -> int:
        begun.append(number)
        assert number == 0 or goes_on.wait(timeout=30)
        return number

    with ThreadPoolExecutor(1) as executor:
        results = map_in_order(wait, items(), executor, ahead=5)
        assert next(results) == 0 and taken == list(range(6))
        results.close()
        goes_on.set()
    assert begun in ([0], [0, 1])
