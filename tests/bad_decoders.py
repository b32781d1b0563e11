"""Decoders that crash, hang or fail, for the processes that decode images; they import this file by its name."""

import os
import signal
import time

import numpy as np
from PIL import Image, ImageFile

MEGABYTE = 1 << 20


def behave(data: bytes) -> bytes | np.ndarray:
    """Do what the bytes say; return them otherwise."""
    what, _, number = data.partition(b" ")
    match what:
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            while True:
                pass
        case b"sleep":
            time.sleep(float(number))
        case b"exit":
            raise SystemExit(0)
        case b"recursion":
            return behave(data)
        case b"raise":
            raise KeyError("an odd error")
        case b"memory":
            return np.zeros(int(number) * MEGABYTE, np.uint8)[:10]
        case b"claim":
            from dinov2_toolkit.store import limits

            limits.claim_memory(int(number) * MEGABYTE)
        case b"array":
            return np.arange(int(number), dtype=np.uint32)
    return data


class OddFile(ImageFile.ImageFile):
    """A format of Pillow's whose decoder does what its file says: ODD, a space, and then as `behave`."""

    format = "ODD"

    def _open(self) -> None:
        assert self.fp is not None
        self._size, self._mode, self._data = (8, 8), "L", self.fp.read()[4:]

    def load(self) -> None:
        """Decode."""
        behave(self._data)


def register() -> None:
    """Have Pillow read the format in this process."""
    Image.register_open("ODD", OddFile, lambda prefix: prefix.startswith(b"ODD "))
