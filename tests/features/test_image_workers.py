"""Images in processes: what crashes, hangs or takes too much costs itself and nothing else."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_toolkit.features import image_server as module
from dinov2_toolkit.features.image_server import Room, room, server
from dinov2_toolkit.features.image_workers import image_workers
from dinov2_toolkit.store.images import UnreadableImage
from dinov2_toolkit.store.limits import Limits
from dinov2_toolkit.store.memory import memory_budget
from dinov2_toolkit.tests import bad_decoders

CRASHED = "its decoder crashed, or took more memory than there is"


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., list[str]]:
    def write(*texts: str) -> list[str]:
        paths = [tmp_path / f"{number}" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text)
        return [str(path) for path in paths]

    return write


def shown(found: list[bytes | np.ndarray | UnreadableImage]) -> list[object]:
    return [one.reason if isinstance(one, UnreadableImage) else one for one in found]


def test_a_crash_costs_one_image_and_the_others_are_read(written: Callable[..., list[str]]) -> None:
    uris = written("a", "crash", "b", "exit", "crash", "c")
    with image_workers(bad_decoders.behave, 1) as read:
        assert shown(read(uris)) == [b"a", CRASHED, b"b", CRASHED, CRASHED, b"c"]
        assert shown(read(uris[:1])) == [b"a"]


def test_a_decoder_that_hangs_is_ended_in_time(written: Callable[..., list[str]]) -> None:
    start = time.monotonic()
    with image_workers(bad_decoders.behave, 1, Limits(image_timeout=1.5)) as read:
        late = "not decoded within --image-timeout 1.5 seconds"
        assert shown(read(written("a", "hang", "b", "sleep 30"))) == [b"a", late, b"b", late]
    assert time.monotonic() - start < 25


def test_time_is_counted_for_each_image(written: Callable[..., list[str]]) -> None:
    with image_workers(bad_decoders.behave, 1, Limits(image_timeout=2)) as read:
        assert shown(read(written(*["sleep 0.6"] * 4))) == [b"sleep 0.6"] * 4


def test_the_time_in_which_an_image_waits_for_memory_is_not_counted(written: Callable[..., list[str]]) -> None:
    uris = written("claim 100")
    held = room.take(memory_budget(None))
    with image_workers(bad_decoders.behave, 1, Limits(image_timeout=0.5)) as read, ThreadPoolExecutor(1) as threads:
        found = threads.submit(read, uris)
        time.sleep(2)
        assert not found.done()
        room.give(held)
        assert found.result() == [b"claim 100"]


def test_whatever_is_raised_is_a_reason(written: Callable[..., list[str]]) -> None:
    uris = written("raise", "recursion", "memory 100", "memory 2000", "a")
    with image_workers(bad_decoders.behave, 1, Limits(max_pixels=1, max_image_bytes=1 << 20)) as read:
        found = shown(read([*uris, "/nowhere"]))
    assert found[0] == "cannot be decoded: 'an odd error'"
    assert str(found[1]).startswith("cannot be decoded: maximum recursion depth exceeded")
    assert isinstance(found[2], np.ndarray)
    assert found[3:] == ["not enough memory to decode it", b"a", "no such file"]


def test_pixels_come_whole_through_shared_memory_and_beside_it(
    written: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [1000, 999, 10, 4000, 2]
    uris = written(*(f"array {size}" for size in sizes))
    monkeypatch.setattr(module, "SHARED_BYTES", 12_288)
    with image_workers(bad_decoders.behave, 1) as read:
        found_first, beside, found_last = read(uris[:3]), read(uris[3:]), read(uris[:3])
        for found, size in zip([*found_first, *beside, *found_last], [*sizes, *sizes[:3]], strict=True):
            assert isinstance(found, np.ndarray)
            np.testing.assert_array_equal(found, np.arange(size))
            found[:] = 0  # our own


def test_pixels_may_be_taken_where_they_lie(written: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARED_BYTES", 12_288)
    uris = written("array 1000", "crash", "array 10", "array 4000")
    taken: dict[int, np.ndarray] = {}
    with image_workers(bad_decoders.behave, 1) as read:
        for some, wanted in ((uris[:3], {0: 1000, 2: 10}), (uris[3:], {0: 4000})):  # the last beside the shared memory
            found = read(some, lambda number, array: taken.update({number: np.array(array)}))
            assert {number: len(array) for number, array in taken.items()} == wanted
            for array in taken.values():
                np.testing.assert_array_equal(array, np.arange(len(array)))
            assert all(isinstance(one, UnreadableImage) == (number not in wanted) for number, one in enumerate(found))
            taken.clear()


def test_an_image_a_worker_died_of_once_is_tried_again(tmp_path: Path) -> None:
    """As when the machine ran out of memory for another program's sake."""
    (tmp_path / "slow").write_text("sleep 1")
    with image_workers(bad_decoders.behave, 1) as read, ThreadPoolExecutor(1) as threads:
        read([])
        found = threads.submit(read, [str(tmp_path / "slow")])
        time.sleep(0.5)
        (child,) = children_of_server()
        os.kill(child, signal.SIGKILL)
        assert found.result() == [b"sleep 1"]


def children_of_server() -> list[int]:
    assert server._process is not None
    listed = Path(f"/proc/{server._process.pid}/task/{server._process.pid}/children").read_text().split()
    states = {int(child): Path(f"/proc/{child}/stat").read_text().split()[2] for child in listed}
    return [child for child, state in states.items() if state != "Z"]


def test_a_server_that_was_ended_is_started_again(written: Callable[..., list[str]]) -> None:
    uris = written("a")
    server.start()
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGKILL)
    with image_workers(bad_decoders.behave, 2) as read:
        assert read(uris) == [b"a"]


def test_the_end_does_not_wait_for_what_hangs(written: Callable[..., list[str]]) -> None:
    (uri,) = written("hang")
    with ThreadPoolExecutor(2) as threads:
        start = time.monotonic()
        with image_workers(bad_decoders.behave, 1) as read:
            waiting = [threads.submit(read, [uri]) for _ in range(2)]
            time.sleep(0.3)
        assert all(isinstance(each.exception(), CancelledError) for each in waiting)
    assert time.monotonic() - start < 25


def test_many_threads_share_few_processes(written: Callable[..., list[str]]) -> None:
    uris = written(*(f"array {number}" for number in range(40)))
    with ThreadPoolExecutor(8) as threads, image_workers(bad_decoders.behave, 3) as read:
        for number, (found,) in enumerate(threads.map(lambda uri: read([uri]), uris)):
            assert isinstance(found, np.ndarray)
            np.testing.assert_array_equal(found, np.arange(number))


def test_rows_of_parquet_and_relative_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"image": pa.array([b"x", b"y", b"crash"], pa.binary())}), tmp_path / "a.parquet")
    (tmp_path / "name").write_text("z")
    monkeypatch.chdir(tmp_path)
    rows = [f"parquet://{tmp_path}/a.parquet?row={row}" for row in range(4)]
    with image_workers(bad_decoders.behave, 1) as read:
        assert shown(read([*rows, "name"])) == [
            b"x",
            b"y",
            CRASHED,
            "cannot be read: there is no row 3; the file has 3",
            b"z",
        ]


def test_images_that_are_decoded_together_fit_into_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "memory_budget", lambda size: 100)
    room = Room()
    assert room.take(60) == 60
    taken: list[int] = []
    other = threading.Thread(target=lambda: taken.append(room.take(1000)))  # more than there is: alone
    other.start()
    time.sleep(0.1)
    assert taken == []
    room.give(60)
    other.join(5)
    assert taken == [100]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_is_left_when_the_command_dies(tmp_path: Path, end: signal.Signals) -> None:
    (tmp_path / "hang").write_text("hang")
    program = f"""
import sys; sys.path[:] = {sys.path!r}
from dinov2_toolkit.tests import bad_decoders
from dinov2_toolkit.features.image_server import server
from dinov2_toolkit.features.image_workers import image_workers
server.start(); print(server._process.pid, flush=True)
with image_workers(bad_decoders.behave, 1) as read:
    read([{str(tmp_path / "hang")!r}])
"""
    command = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    process = int(command.stdout.readline())
    deadline = time.monotonic() + 20
    children = Path(f"/proc/{process}/task/{process}/children")
    while not (listed := children.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    command.send_signal(end)
    command.wait()
    while any(is_alive(each) for each in [process, *map(int, listed)]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
