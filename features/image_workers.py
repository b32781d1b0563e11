"""Functions of images in processes that may crash or hang: that costs the image, and not the run.

A thread asks a process for a few images at a time. If the process dies or takes too long, it is replaced, and the image
it was at is unreadable, with its reason.
"""

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from mmap import mmap
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Generic, Protocol, TypeVar

import numpy as np

from ..errors import ToolkitError
from ..store.images import UnreadableImage, read_bytes
from ..store.limits import DEFAULT_LIMITS, Limits
from .image_process import CLAIM, INDEX, NO_ITEM
from .image_server import room, server, shared_file

TICK_S = 0.25  # chosen: how often it is looked which image a process is at
START_S = 60.0  # chosen: for which a worker may take to start, on a busy machine
MAX_STARTS = 5  # of a worker that ends before it begins with an image

R = TypeVar("R")
Take = Callable[[int, R], None]


class Read(Protocol[R]):
    """Returns what became of each image.

    With `take`, the arrays of what it returns lie in memory that later calls overwrite. Before that, `take` gets the
    position and the result of each image that can be read.
    """

    def __call__(self, uris: Sequence[str], take: Take[R] | None = None) -> list[R | UnreadableImage]: ...


@contextmanager
def image_workers(
    function: Callable[[bytes], R], num_workers: int, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Read[R]]:
    """Yield a function of uris that any thread may call: it returns, of each image, what `function` makes of its bytes.

    What cannot be read, or crashes or hangs the process that reads it, becomes an UnreadableImage. When the block ends,
    calls that still run raise CancelledError.

    Args:
        function: of an image's encoded bytes; can be pickled, and its module imports no torch.
        num_workers: processes. With more threads than that, the next images are at hand when a process is done.
        limits: what one image may cost.
    """
    task = pickle.dumps((function, limits), 5)
    workers: list[Worker[R]] = [Worker(task, limits) for _ in range(num_workers)]
    idle: LifoQueue[Worker[R]] = LifoQueue()
    for worker in workers:
        idle.put(worker)

    def read(uris: Sequence[str], take: Take[R] | None = None) -> list[R | UnreadableImage]:
        items = [_sent(uri, limits) for uri in uris]  # before a process is taken, which meanwhile reads others
        worker = idle.get()
        try:
            return worker.read(items, take)
        finally:
            idle.put(worker)

    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=[workers, is_over], name="image-timeout", daemon=True)
    watch.start()
    try:
        yield read
    finally:
        is_over.set()
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()
        watch.join()


def read_in_order(function: Callable[[bytes], R], uris: Iterable[str | None]) -> Iterator[R | UnreadableImage]:
    """Yield what `function` makes of each image, in order, read by a process a core as in `image_workers`."""
    from .threads import map_in_order, workers  # here, for it imports torch

    with workers() as threads, image_workers(function, threads.count) as read:

        def made(uri: str | None) -> R | UnreadableImage:
            return UnreadableImage("no uri") if uri is None else read([uri])[0]

        yield from map_in_order(made, uris, threads)


class _LostError(Exception):
    """A process died or was ended: the index of its item, and why it was ended, None where it died by itself."""

    def __init__(self, index: int, reason: str | None) -> None:
        self.index, self.reason = index, reason
        super().__init__(reason)


class Worker(Generic[R]):
    """A process that reads images, started when it is needed and replaced when it is lost."""

    def __init__(self, task: bytes, limits: Limits) -> None:
        self._task, self._limits = task, limits
        self._lock = threading.Lock()  # held while it reads
        self._is_closed = False
        self._process: int | None = None
        self._memory = mmap(-1, INDEX.size)
        self._clock = threading.Lock()  # held to change what follows
        self._is_timed = False
        self._index, self._waited_s = NO_ITEM, 0.0  # which item it is at, and for how long
        self._reason: str | None = None  # why it was ended

    def read(
        self, items: Sequence[str | bytes | UnreadableImage], take: Take[R] | None = None
    ) -> list[R | UnreadableImage]:
        """Return what became of every image, given by its name or its bytes; of what is unreadable already, itself."""
        results: dict[int, R | UnreadableImage] = {}
        left: list[tuple[int, str | bytes]] = []  # position and item
        for position, item in enumerate(items):
            if isinstance(item, UnreadableImage):
                results[position] = item
            else:
                left.append((position, item))
        suspect: int | None = None  # what a process died of is tried once more: it may have been ended for memory
        num_starts = 0
        with self._lock:
            while left:
                try:
                    found = self._ask([item for _, item in left], in_place=take is not None)
                    results.update(zip((position for position, _ in left), found, strict=True))
                    break
                except _LostError as lost:
                    if lost.index == NO_ITEM:
                        num_starts += 1
                        if num_starts == MAX_STARTS:
                            raise ToolkitError(
                                "the processes that decode images end as soon as they start; make memory free"
                            ) from None
                        continue
                    position, item = left.pop(lost.index)
                    if lost.reason is None and suspect != position:
                        suspect = position
                        left.insert(0, (position, item))
                        continue
                    reason = "its decoder crashed, or took more memory than there is"
                    results[position] = UnreadableImage(lost.reason or reason)
            if take is not None:
                for position, result in results.items():
                    if not isinstance(result, UnreadableImage):
                        take(position, result)
        return [results[position] for position in range(len(items))]

    def _ask(self, items: list[str | bytes], *, in_place: bool) -> list[R | UnreadableImage]:
        """Have the process read some images; raise _LostError when it dies, or is at one of them for too long.

        In place, arrays stay in the memory that it writes to.
        """
        if self._is_closed:
            raise CancelledError
        if self._process is None:
            self._start()
        if self._is_closed:  # meanwhile
            raise CancelledError
        INDEX.pack_into(self._memory, 0, NO_ITEM)
        self._time(True)
        claimed = 0
        try:
            self._connection.send_bytes(pickle.dumps(items, 5))
            while (message := self._connection.recv_bytes()).startswith(CLAIM):
                self._time(False)  # others have the memory that it waits for
                room.give(claimed)
                claimed = room.take(INDEX.unpack_from(message, len(CLAIM))[0])
                self._time(True)
                self._connection.send_bytes(b"")
        except (EOFError, OSError):
            self._end()
            index = INDEX.unpack_from(self._memory)[0]
            raise _LostError(index, self._reason if index == self._index else None) from None
        finally:
            self._time(False)
            room.give(claimed)
        head, places = pickle.loads(message)  # noqa: S301  # of a process of ours, with our rights
        arrays = [np.frombuffer(self._memory, np.uint8, size, start) for start, size in places]
        arrays = arrays if in_place else [array.copy() for array in arrays]
        found: list[R | UnreadableImage] = pickle.loads(head, buffers=arrays)  # noqa: S301  # likewise
        return found

    def _time(self, is_timed: bool) -> None:
        """Begin or end to count the time that the process takes."""
        with self._clock:
            self._is_timed, self._index, self._waited_s = is_timed, NO_ITEM, 0.0
            if is_timed:
                self._reason = None

    def check_time(self, passed_s: float) -> None:
        """Count time that has passed, and end the process if it has been at one image for too long."""
        with self._clock:
            if not self._is_timed:
                return
            self._waited_s += passed_s
            if (index := INDEX.unpack_from(self._memory)[0]) != self._index:
                self._index, self._waited_s = index, 0.0
            elif self._waited_s > (START_S if index == NO_ITEM else self._limits.image_timeout):
                self._reason = f"not decoded within --image-timeout {self._limits.image_timeout:g} seconds"
                self._kill()

    def _start(self) -> None:
        """Start a process with a socket and shared memory of its own."""
        ours, theirs = socket.socketpair()
        with theirs, shared_file() as memory_fd:
            self._memory = mmap(memory_fd, 0)
            self._connection = Connection(ours.detach())
            self._process = server.fork(theirs.fileno(), memory_fd)
        with suppress(OSError):  # it has died; the next message says so
            self._connection.send_bytes(self._task)

    def _end(self) -> None:
        self._kill()
        self._connection.close()
        self._process = None  # its memory is freed with the last array that lies in it

    def _kill(self) -> None:
        if (process := self._process) is not None:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        """End the process, whatever it is doing; who waits for it gets a CancelledError."""
        self._is_closed = True
        self._kill()

    def close(self) -> None:
        """Wait until nobody reads any more, and close what is open."""
        with self._lock:
            if self._process is not None:
                self._end()


def _watch(workers: list[Worker[R]], is_over: threading.Event) -> None:
    """Count the time that processes take, until the event is set."""
    last = time.monotonic()
    while not is_over.wait(TICK_S):
        now = time.monotonic()
        for worker in workers:
            worker.check_time(min(now - last, 2 * TICK_S))  # time in which this process was stopped does not count
        last = now


def _sent(uri: str, limits: Limits) -> str | bytes | UnreadableImage:
    """Return what a worker is sent: an image's name, or its bytes where many images share the work to read them."""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme == "parquet":
        try:
            return read_bytes(uri, limits)
        except UnreadableImage as problem:
            return problem
    return uri if separator and "/" not in scheme else os.path.abspath(uri)
