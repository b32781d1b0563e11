"""The processes that decode images, seen from the command: a server that forks them, and the memory they share."""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..errors import ToolkitError
from ..store.memory import memory_budget
from .image_process import INDEX

SHARED_BYTES = 16 << 20  # chosen: of a worker, for pixels; larger results come through its socket


@contextmanager
def shared_file() -> Iterator[int]:
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
                self._process = subprocess.Popen(  # noqa: S603  # this Python
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
