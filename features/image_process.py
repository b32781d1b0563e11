"""The processes that decode images: a server, which imports what decoding needs and forks one for each worker.

`image_workers` starts the server, by an interpreter of its own: a fork of the command would hold copies of the locks of
its threads. Server and workers end when the command does.
"""

import ctypes
import gc
import os
import pickle
import resource
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from PIL import Image

from ..store import images, limits
from .extract import reading  # noqa: F401  # every worker would import it otherwise

INDEX = struct.Struct("<q")  # at the start of the shared memory: which of its items a worker is at
NO_ITEM = -1
ALIGNMENT = 64  # bytes, of what lies in the shared memory
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_BYTES = 32 << 20  # the most that glibc takes for both
CLAIM = b"claim "  # how a message begins that asks for memory; the others are results


def serve(control_fd: int) -> NoReturn:
    """Fork a worker for every message with a socket and a file of shared memory; answer its process id, or -errno."""
    images.formats()
    _keep_freed_memory()
    gc.freeze()  # what was imported stays, and pages that no worker writes are shared
    control = socket.socket(fileno=control_fd)
    children: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            break
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)[0]) > 0:
                children.discard(ended)
        try:
            child = os.fork()
        except OSError as problem:
            child = -(problem.errno or 1)
        if child == 0:
            control.close()
            _work(*descriptors)
        if child > 0:
            children.add(child)
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(INDEX.pack(child))
    for child in children:  # one may hang in a decoder
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    os._exit(0)


def _work(socket_fd: int, memory_fd: int) -> NoReturn:
    """Do what the messages on a socket ask for, until its other end is closed."""
    code = 1
    try:
        connection, memory = Connection(socket_fd), mmap(memory_fd, 0)
        with suppress(EOFError, BrokenPipeError, ConnectionResetError):
            _answer(connection, memory)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer(connection: Connection, memory: mmap) -> None:
    function, most = pickle.loads(connection.recv_bytes())  # noqa: S301  # of the process that started this one
    _restrict(most)

    def ask(num_bytes: int) -> None:
        connection.send_bytes(CLAIM + INDEX.pack(num_bytes))
        connection.recv_bytes()

    limits.ask_for_memory = ask
    while True:
        results = []
        for index, item in enumerate(pickle.loads(connection.recv_bytes())):  # noqa: S301  # likewise
            INDEX.pack_into(memory, 0, index)
            results.append(_attempt(function, item, most))
        connection.send_bytes(_packed(results, memory))


def _attempt(function: Callable[[bytes], Any], item: str | bytes, most: limits.Limits) -> Any:
    """Return what a function makes of an image, given by its uri or its bytes, or the UnreadableImage it raises."""
    try:
        with images.guarded():
            return function(item if isinstance(item, bytes) else images.read_bytes(item, most))
    except images.UnreadableImage as problem:
        return problem


def _packed(results: list[Any], memory: mmap) -> bytes:
    """Return a message of results; their arrays lie in the shared memory, at places (start, size), if they fit."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(results, 5, buffer_callback=buffers.append)
    places, end = [], ALIGNMENT
    for view in (buffer.raw() for buffer in buffers):
        if end + view.nbytes > len(memory):
            return pickle.dumps((pickle.dumps(results, 5), []), 5)
        memory[end : end + view.nbytes] = view
        places.append((end, view.nbytes))
        end += -(-view.nbytes // ALIGNMENT) * ALIGNMENT
    return pickle.dumps((head, places), 5)


def _keep_freed_memory() -> None:
    """Let glibc keep what an image took for the next one; the kernel would clear every page again."""
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, KEPT_BYTES)


def _restrict(most: limits.Limits) -> None:
    """Bound the memory of this process, and make it the first to be ended where the machine runs out of it."""
    Image.MAX_IMAGE_PIXELS = -(-most.max_pixels // 2)  # Pillow refuses twice as much
    with suppress(OSError, ValueError):  # some systems know no such limit
        resource.setrlimit(resource.RLIMIT_DATA, (most.process_bytes, most.process_bytes))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    null = os.open(os.devnull, os.O_WRONLY)  # what C libraries say of broken files
    os.dup2(null, 2)
