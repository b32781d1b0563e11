"""The cache: files that steps share and can make again, in a marked folder of its own.

Only files with names of ours are ever removed. Their names are hashes that we make: what a manifest says of itself,
such as its content id, never becomes a path.
"""

import os
import re
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from ..errors import ToolkitError
from .files import TEMPORARY, write_text
from .manifest import Source, part_paths
from .places import cache_path

try:
    CACHE_BYTES = int(os.environ.get("DINOV2_CACHE_BYTES") or 64 << 30)  # arrays are kept up to this size
except ValueError as problem:
    raise ToolkitError(f"DINOV2_CACHE_BYTES is no number of bytes ({problem}); give one, or unset it") from None

MARKER = "CACHEDIR.TAG"  # by this name and first line, backup programs know a cache too
MARK = """\
Signature: 8a477f597d28d172789f06886806bc55
# This folder was made by dinov2-toolkit for what it can make again; `dinov2 catalog gc` empties it.
"""
OUR_NAMES = re.compile(
    r"[0-9a-f]{32}(-[a-z]+|\.files)?\.npy|[0-9a-f]{32}\.same|embed-[0-9a-f]{16}|(clustering|progress)-[0-9a-f]{32}|spill"
    rf"|\.[\w.-]+\.[0-9]+\.tmp|{TEMPORARY.pattern}"
)
KEY = re.compile(r"[0-9a-f]{32}")
SPILL = "spill"  # where DuckDB of an earlier version put what does not fit in memory
SPILLED_NAMES = re.compile(r"duckdb_temp_[\w.-]+")


def cache_folder() -> Path:
    """Return where the cache is or will be.

    A folder without the marker counts as ours when all names in it are, as in a cache of a version that set no marker.
    Raises ToolkitError when something else stands there.
    """
    folder = cache_path()
    if not os.path.lexists(folder):
        return folder
    if not folder.is_dir():
        raise ToolkitError(f"{folder} is no folder, and the cache needs one there; move it away")
    others = _foreign_names(folder)  # before the marker is looked for, which another process may just have written
    if others and not _is_marked(folder):
        raise ToolkitError(
            f"{folder} is not a cache of ours (without our {MARKER}, but with {others[0]!r}); move it away"
        )
    return folder


def _foreign_names(folder: Path) -> list[str]:
    """Return what lies in an unmarked folder, and no toolkit can have put there; through a link, all of it."""
    names = sorted(os.listdir(folder))
    if folder.is_symlink():
        return names
    spilled = sorted(os.listdir(folder / SPILL)) if (folder / SPILL).is_dir() else []
    foreign = [name for name in names if not OUR_NAMES.fullmatch(name)]
    return foreign + [f"{SPILL}/{name}" for name in spilled if not SPILLED_NAMES.fullmatch(name)]


def open_cache() -> Path:
    """Return the cache, made and marked when missing. Raises ToolkitError when something else stands there."""
    folder = cache_folder()
    if not _is_marked(folder):
        write_text(folder / MARKER, MARK)
    return folder


def remove_empty_cache() -> None:
    """Remove the cache, and `.dinov2` around it, where nothing is in them."""
    folder = cache_folder()
    with suppress(OSError):  # not there, or not empty
        if os.listdir(folder) == [MARKER]:
            (folder / MARKER).unlink()
            folder.rmdir()
            folder.parent.rmdir()


def cached() -> list[Path]:
    """Return what is in the cache under names of ours, in order; nothing else may be removed."""
    folder = cache_folder()
    found = sorted(folder.iterdir()) if folder.exists() else []
    return [path for path in found if OUR_NAMES.fullmatch(path.name)]


def make_room(num_bytes: int) -> None:
    """Remove the arrays that were used longest ago where the cache would grow too large with `num_bytes` more."""
    arrays = [path for path in cached() if path.suffix == ".npy"]
    total = num_bytes
    for file in sorted(arrays, key=lambda file: file.stat().st_atime, reverse=True):
        total += file.stat().st_size
        if total > CACHE_BYTES:
            file.unlink()


def cache_key(source: Source) -> str:
    """Return the name under which the cache keeps what is made from a manifest.

    It depends on the content id, which only the file itself says, and on paths, sizes and time stamps of its parts.
    """
    stamp = _stamp(source)
    same = cache_folder() / f"{stamp}.same"
    key = same.read_text(errors="replace") if same.is_file() else stamp
    return key if KEY.fullmatch(key) else stamp  # a damaged one becomes no path


def touch(source: Source) -> None:
    """Set the time stamp of a manifest to now; its key stays, in a file that has the name of its new stamp."""
    key, old = cache_key(source), _stamp(source)
    os.utime(source.path)
    new = _stamp(source)
    if _is_marked(cache_folder()) and new != old:
        write_text(cache_folder() / f"{new}.same", key)
        (cache_folder() / f"{old}.same").unlink(missing_ok=True)


def _stamp(source: Source) -> str:
    path = Path(os.path.realpath(source.path))
    stats = [(str(part), part.stat()) for part in part_paths(path)] if path.exists() else []
    parts = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return blake2b(ascii((source.content_id, str(path), parts)).encode(), digest_size=16).hexdigest()


def _is_marked(folder: Path) -> bool:
    marker = folder / MARKER
    return marker.is_file() and marker.stat().st_size == len(MARK) and marker.read_text() == MARK
