"""What a long step has reached, kept on disk so that a stopped one goes on from there."""

import hashlib
import json
import shutil
import time
import zipfile
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import Stopped, ToolkitError
from .arrays import Array, discard, kept_array, new_array
from .cache import cache_folder, cache_key, open_cache
from .files import open_regular, replacing
from .manifest import Provenance, toolkit_version

SAVE_EVERY_S = 30.0  # chosen: what a kill costs at most


class Progress:
    """A folder in the cache that belongs to one piece of work: the same work on the same contents finds it again.

    `artifact.make` forgets all that belongs to a step when its output stands.
    """

    def __init__(self, provenance: Provenance, *details: object) -> None:
        """Find the folder of a step's work, or of a part of it that `details` (values for JSON) tell apart."""
        self.folder = _folder(provenance) / _digest(details)
        self._last = time.monotonic()
        self.signals: list[int] = []  # that came in; the next thing to be saved is then the last

    def due(self) -> bool:
        """Tell whether to save now: the last time is long ago, or a signal came."""
        return bool(self.signals) or time.monotonic() - self._last >= SAVE_EVERY_S

    def save(self, name: str, **arrays: npt.ArrayLike) -> None:
        """Keep arrays under a name, in place of what it had. Raises Stopped afterwards when a signal has come."""
        open_cache()
        with replacing(self.folder / f"{name}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{key: np.asarray(value) for key, value in arrays.items()})
        self._last = time.monotonic()
        if self.signals:
            raise Stopped("stopped: the progress is saved; the same command resumes")

    def load(self, name: str) -> dict[str, Array] | None:
        """Return what was kept under a name; None where there is nothing, or it is damaged, which is said."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as kept:  # which compares checksums
                return {member.removesuffix(".npy"): _array(kept.read(member)) for member in kept.namelist()}
        except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, RuntimeError):
            discard(path)
            return None

    def mapped(self, name: str, dtype: type[np.generic], num: int) -> Array:
        """Return an array of `num` on disk, as it was left; it is as long as the pool, and only parts are in memory."""
        path = self.folder / f"{name}.npy"
        array = kept_array(path, dtype, (num,), "r+")
        if array is None:
            open_cache()
            with replacing(path) as temporary:
                new_array(temporary, dtype, (num,))
            array = np.load(path, mmap_mode="r+")
        return array

    def remove(self) -> None:
        """Forget all of it: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # not there, or with other parts of the work
            self.folder.parent.rmdir()


def forget_progress(provenance: Provenance) -> None:
    """Remove what was kept of all parts of a step's work, as when its output stands."""
    with suppress(ToolkitError):  # where the cache would be, something else stands
        shutil.rmtree(_folder(provenance), ignore_errors=True)


def _folder(provenance: Provenance) -> Path:
    sources = [*provenance.inputs, *([] if provenance.base is None else [provenance.base])]
    inputs = [(source.role, cache_key(source)) for source in sources]
    work = [toolkit_version(), provenance.command, provenance.parameters, provenance.seed, inputs]
    return cache_folder() / f"progress-{_digest(work)}"


def _digest(values: object) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _array(data: bytes) -> Array:
    array: Array = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
    return array
