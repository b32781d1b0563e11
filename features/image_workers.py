"""Functions of images in processes that may crash or hang: that costs the image, and not the run.

A thread asks a process for a few images at a time. If the process dies or takes too long, it is replaced, and the image
it was at is unreadable, with its reason.
"""

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from mmap import mmap
from multiprocessing.connection import Connection
from queue import LifoQueue
from typing import Generic, TypeVar

import numpy as np

from ..errors import ToolkitError
from ..store.images import UnreadableImage, read_bytes
from ..store.limits import DEFAULT_LIMITS, Limits
from ..store.memory import memory_budget
from .image_process import CLAIM, INDEX, NO_ITEM, RESULT

SHARED_BYTES = 16 << 20  # chosen: of a worker, for pixels; larger results come through its socket
TICK_S = 0.25  # chosen: how often a worker that is silent is looked at
START_S = 60.0  # chosen: for which a worker may take to start, on a busy machine
MAX_STARTS = 5  # of a worker that ends before it begins with an image

R = TypeVar("R")
Read = Callable[[Sequence[str]], list[R | UnreadableImage]]


@contextmanager
def image_workers(
    function: Callable[[bytes], R], num_workers: int, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Read[R]]:
    """Yield a function of uris that any thread may call: it returns, of each image, what `function` makes of its bytes.

    What cannot be read, or crashes or hangs the process that reads it, becomes an UnreadableImage. When the block ends,
    calls that still run raise CancelledError.

    Args:
        function: of an image's encoded bytes; can be pickled, and its module imports no torch.
        num_workers: processes; more threads wait for one another.
        limits: what one image may cost.
    """
    task = pickle.dumps((function, limits), 5)
    workers: list[Worker[R]] = [Worker(task, limits) for _ in range(num_workers)]
    idle: LifoQueue[Worker[R]] = LifoQueue()
    for worker in workers:
        idle.put(worker)

    def read(uris: Sequence[str]) -> list[R | UnreadableImage]:
        worker = idle.get()
        try:
            return worker.read(uris)
        finally:
            idle.put(worker)

    try:
        yield read
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.close()


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
        self._claimed = 0

    def read(self, uris: Sequence[str]) -> list[R | UnreadableImage]:
        """Return what became of every image."""
        results: dict[int, R | UnreadableImage] = {}
        left: list[tuple[int, str | bytes]] = []  # position and what is sent
        for position, uri in enumerate(uris):
            try:
                left.append((position, _sent(uri, self._limits)))
            except UnreadableImage as problem:
                results[position] = problem
        suspect: int | None = None  # what a process died of is tried once more: it may have been ended for memory
        num_starts = 0
        with self._lock:
            while left:
                try:
                    found = self._ask([item for _, item in left])
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
        return [results[position] for position in range(len(uris))]

    def _ask(self, items: list[str | bytes]) -> list[R | UnreadableImage]:
        """Have the process read some images; raise _LostError when it dies, or is at one of them for too long."""
        if self._is_closed:
            raise CancelledError
        if self._process is None:
            self._start()
        if self._is_closed:  # meanwhile
            raise CancelledError
        INDEX.pack_into(self._memory, 0, NO_ITEM)
        try:
            self._connection.send_bytes(pickle.dumps(items, 5))
            while (message := self._next_message())[:1] == CLAIM:
                room.give(self._claimed)
                self._claimed = room.take(INDEX.unpack(message[1:])[0])
                self._connection.send_bytes(b"")
        except (EOFError, OSError):
            raise self._lost(None) from None
        finally:
            room.give(self._claimed)
            self._claimed = 0
        assert message[:1] == RESULT
        head, places = pickle.loads(memoryview(message)[1:])
        buffers = [np.frombuffer(self._memory, np.uint8, size, start).copy() for start, size in places]
        found: list[R | UnreadableImage] = pickle.loads(head, buffers=buffers)
        return found

    def _next_message(self) -> bytes:
        index, waited_s, last = NO_ITEM, 0.0, time.monotonic()
        while not self._connection.poll(TICK_S):
            now = time.monotonic()
            waited_s += min(now - last, 2 * TICK_S)  # time in which this process itself was stopped does not count
            last = now
            if (present := INDEX.unpack_from(self._memory)[0]) != index:
                index, waited_s = present, 0.0
            elif waited_s > (START_S if index == NO_ITEM else self._limits.image_timeout):
                raise self._lost(f"not decoded within --image-timeout {self._limits.image_timeout:g} seconds")
        return self._connection.recv_bytes()

    def _lost(self, reason: str | None) -> _LostError:
        index = INDEX.unpack_from(self._memory)[0]
        self._end()
        return _LostError(index, reason)

    def _start(self) -> None:
        """Start a process with a socket and shared memory of its own."""
        ours, theirs = socket.socketpair()
        with theirs, _shared_file() as memory_fd:
            self._memory = mmap(memory_fd, SHARED_BYTES)
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


def _sent(uri: str, limits: Limits) -> str | bytes:
    """Return what a worker is sent of an image: its name, or its bytes where many images share the work to read them.

    Raises UnreadableImage when these cannot be read.
    """
    scheme, separator, _ = uri.partition("://")
    if separator and scheme == "parquet":
        return read_bytes(uri, limits)
    return uri if separator and "/" not in scheme else os.path.abspath(uri)


@contextmanager
def _shared_file() -> Iterator[int]:
    """Yield a file without a name to be shared as memory."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("images", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    try:
        os.ftruncate(file, SHARED_BYTES)
        yield file
    finally:
        os.close(file)


class Room:
    """The memory that images take which are decoded at the same time."""

    def __init__(self) -> None:
        self._is_freed = threading.Condition()
        self._size = self._free = memory_budget(None)

    def take(self, num_bytes: int) -> int:
        """Wait until so many bytes are free, or all for what takes more, and return how many were taken."""
        num_bytes = min(num_bytes, self._size)
        with self._is_freed:
            self._is_freed.wait_for(lambda: self._free >= num_bytes)
            self._free -= num_bytes
        return num_bytes

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        with self._is_freed:
            self._free += num_bytes
            self._is_freed.notify_all()


class Server:
    """The process that forks the workers, started when the first is needed; ends with this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it ahead, to be ready when the first worker is needed."""
        with self._lock:
            self._start()

    def fork(self, *descriptors: int) -> int:
        """Return the process id of a new worker that has these files."""
        with self._lock:
            for _ in range(2):  # it may have been ended
                control = self._start()
                try:
                    socket.send_fds(control, [b"f"], list(descriptors))
                    answer = control.recv(INDEX.size)
                except OSError:
                    answer = b""
                if answer:
                    process: int = INDEX.unpack(answer)[0]
                    break
                self._stop()
            else:
                raise ToolkitError("the process that decodes images does not start; see the message above")
        if process < 0:
            raise ToolkitError(f"no process can be started to decode images ({os.strerror(-process)}); end others")
        return process

    def _start(self) -> socket.socket:
        if self._control is None:
            self._control, theirs = socket.socketpair()
            module = f"{__package__}.image_process"
            code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import serve; serve({theirs.fileno()})"
            # Threads of NumPy's would have to be forked.
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # which carries the result of the command
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    start_new_session=True,  # Ctrl-C is for this process alone
                )
        return self._control

    def _stop(self) -> None:
        if self._control is not None and self._process is not None:
            self._control.close()
            with suppress(subprocess.TimeoutExpired):  # a worker may hang in a read that nothing ends
                self._process.wait(timeout=5)
        self._control = None

    def stop(self) -> None:
        """End it and all workers."""
        with self._lock:
            self._stop()

    def forget(self) -> None:
        """Leave it to the process that this one was forked from."""
        if self._control is not None:
            self._control.close()
        self.__init__()  # type: ignore[misc]  # the lock may be held by a thread that does not exist here


room, server = Room(), Server()
atexit.register(server.stop)
os.register_at_fork(after_in_child=server.forget)
