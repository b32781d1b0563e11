"""What a long clustering has reached, kept on disk so that a killed one goes on from there."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import Stopped
from ..store.cache import cache_folder, cache_key, open_cache
from ..store.manifest import Provenance, toolkit_version

SAVE_EVERY_S = 30.0  # chosen: what a kill costs at most

Array = npt.NDArray[Any]  # the name it is kept under tells of what


class Saved:
    """A folder in the cache that belongs to one piece of work: the same command on the same contents finds it again."""

    def __init__(self, provenance: Provenance) -> None:
        sources = [*provenance.inputs, *([] if provenance.base is None else [provenance.base])]
        inputs = [(source.role, cache_key(source)) for source in sources]
        work = json.dumps(
            [toolkit_version(), provenance.command, provenance.parameters, provenance.seed, inputs], sort_keys=True
        )
        key = hashlib.blake2b(work.encode(), digest_size=16).hexdigest()
        self.folder = cache_folder() / f"clustering-{key}"
        self._last = time.monotonic()
        self.signals: list[int] = []  # that came in; the next thing to be saved is then the last

    def due(self) -> bool:
        """Tell whether to save now: enough was done since the last time, or a signal came."""
        return bool(self.signals) or time.monotonic() - self._last >= SAVE_EVERY_S

    def save(self, name: str, **arrays: npt.ArrayLike) -> None:
        """Keep arrays under a name, instead of what it had before.

        Raises Stopped afterwards when a signal has come.
        """
        open_cache()
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **{key: np.asarray(value) for key, value in arrays.items()})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / f"{name}.npz")
        self._last = time.monotonic()
        if self.signals:
            raise Stopped("stopped: what the clustering has reached is kept; the same command goes on")

    def load(self, name: str) -> dict[str, Array] | None:
        """Return what was kept under a name, None where there is nothing."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        with np.load(path) as kept:
            return {key: kept[key] for key in kept.files}

    def mapped(self, name: str, dtype: type[np.generic], num: int) -> Array:
        """Return an array of `num` on disk, as it was left; it is as long as the pool, and only parts are in memory."""
        open_cache()
        self.folder.mkdir(exist_ok=True)
        path: Path = self.folder / f"{name}.npy"
        if not path.exists():
            temporary = self.folder / f".{name}.{os.getpid()}.tmp"
            np.lib.format.open_memmap(temporary, "w+", dtype, (num,)).flush()
            os.replace(temporary, path)
        array: Array = np.lib.format.open_memmap(path, "r+")
        return array

    def remove(self) -> None:
        """Forget all of it: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
