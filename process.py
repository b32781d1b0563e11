"""The process of a command: its three streams, and the signals that end it."""

import codecs
import ctypes
import faulthandler
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from .errors import ToolkitError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHER = "DINOV2_LAUNCHED"  # the id of the process that started this one as one of several
LAUNCHER_NUMBERS = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"),
)
DEBUG = "--debug"
END_AFTER_S = 30.0  # chosen: what has not ended so long after its launcher is killed
EXIT_INTERRUPTED = 130
SA_RESETHAND = 1 << 31

received: list[int] = []  # signals that came to end the command

Handler = Callable[[int, FrameType | None], object]


def prepare() -> None:
    """Open streams that are closed, let them take any name, and make the first signal a KeyboardInterrupt."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # else the first file to be opened would take this number, and the messages of C libraries
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # or it would be closed in other processes
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    if is_debugging():
        faulthandler.enable(2)
    codecs.register_error("names", _as_it_is_named)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="names")
    sys.unraisablehook = _unraisable
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a broken connection comes with a backtrace of C++
    take_first_signal(_interrupt)
    if (launcher := os.environ.get(LAUNCHER, "")).isdigit():
        threading.Thread(target=_end_with, args=[int(launcher)], daemon=True).start()


def is_debugging() -> bool:
    """Tell whether errors are to show where they come from: --debug anywhere, or $DINOV2_DEBUG."""
    return DEBUG in sys.argv or os.environ.get("DINOV2_DEBUG", "0") not in ("", "0")


def check_environment() -> None:
    """Raise ToolkitError where a launcher's variables are no numbers, or there is a rank without a launcher."""
    for name in LAUNCHER_NUMBERS:
        if not (value := os.environ.get(name, "0")).isdigit():
            raise ToolkitError(f"{name} is {value!r}, and a launcher sets it to a whole number; unset it")
    if "WORLD_SIZE" not in os.environ and os.environ.get("RANK", "0") != "0":
        raise ToolkitError(f"RANK is {os.environ['RANK']} but WORLD_SIZE is not set; unset it, or start with torchrun")


def is_main_process() -> bool:
    """Tell whether this process is the first of those that were started together."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


def take_first_signal(handler: Handler) -> None:
    """Give a function the first of each of SIGNALS; the next one ends the process at once, whatever it is doing."""
    for number in SIGNALS:
        set_handler(number, handler)


def set_handler(number: int, handler: Handler | int | None) -> None:
    """Set what handles a signal; after a function has had one, the kernel ends the process at the next.

    Python runs functions between two steps of its own, and so never while a library hangs.
    """
    signal.signal(number, handler)
    if sys.platform == "linux" and callable(handler) and handler is not signal.default_int_handler:
        libc, action = ctypes.CDLL(None), _Action()
        libc.sigaction(number, None, ctypes.byref(action))
        action.flags = ctypes.c_int(action.flags | SA_RESETHAND).value
        libc.sigaction(number, ctypes.byref(action), None)


class _Action(ctypes.Structure):  # struct sigaction of Linux
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (128 // ctypes.sizeof(ctypes.c_ulong))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def interrupted() -> str:
    """Return what is said when a signal has ended the command."""
    others = [signal.Signals(number).name for number in received if number != signal.SIGINT]
    return f"interrupted{' by ' if others else ''}{', '.join(others)}; nothing more was saved"


def end_interrupted() -> NoReturn:
    """Say in one line that a signal ended the command, and end the process at once."""
    os.write(2, f"error: {interrupted()}\n".encode())
    os._exit(EXIT_INTERRUPTED)


def end_at_signals() -> None:
    """Let a signal end the process at once, as when the command is done and Python winds up."""

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        end_interrupted()

    take_first_signal(end)


def _interrupt(number: int, frame: FrameType | None) -> None:
    received.append(number)
    raise KeyboardInterrupt


def _unraisable(problem: Any) -> None:  # sys.UnraisableHookArgs, which exists for type checkers alone
    """End the process where a signal came in a moment in which Python swallows exceptions."""
    if received:
        end_interrupted()
    sys.__unraisablehook__(problem)


def _as_it_is_named(problem: UnicodeError) -> tuple[str | bytes, int]:
    """Encode a byte of a name as it is, and a character that the stream's encoding does not have as an escape."""
    assert isinstance(problem, UnicodeEncodeError)
    character = problem.object[problem.start]
    is_byte = "\udc80" <= character <= "\udcff"
    encoded = character.encode("ascii", "surrogateescape" if is_byte else "backslashreplace")
    return encoded, problem.start + 1


def _end_with(launcher: int) -> None:
    """End this process when its launcher has ended: first as by a signal, so that it saves what it has."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_AFTER_S)
    os.kill(os.getpid(), signal.SIGKILL)
