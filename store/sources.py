"""SOURCE arguments: folders, images, Parquet files and lists of names, read entry by entry in a fixed order.

Every entry is either an image to try, or has the reason why it cannot be one.
"""

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Literal
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ToolkitError, nearest
from .files import check_regular
from .image_columns import has_images, image_batches
from .manifest import Manifest, is_manifest_name, open_manifest

LIST_SUFFIXES = (".txt", ".lst", ".list")
SLICE_ROWS = 10_000  # chosen: names of a folder that are Python objects at a time
SPOOL_BYTES = 16 << 20  # chosen: names on stdin above it wait on the disk

Skip = Callable[[str], bool]  # tells of an absolute path whether the walk leaves it out


@dataclass(frozen=True)
class Entry:
    """An image to try, or with a `reason` something that is known to be none."""

    uri: str
    label: str | None = None
    reason: str | None = None
    source: str | None = None  # as in the manifest
    weight: float | None = None
    size: int | None = None  # bytes of a file, when it was listed
    mtime_ns: int | None = None


@dataclass(frozen=True)
class ImageSource:
    """An opened SOURCE argument."""

    kind: Literal["folder", "manifest", "names"]
    path: str  # absolute; "-" for stdin
    manifest: Manifest | None = None
    names: tuple[str, ...] = ()  # image files that were arguments themselves
    text: IO[bytes] | None = None  # or a list of paths and uris, read piece by piece
    null: bool = False  # whose names end in NUL
    folder: str = ""  # of the list, where relative names are looked for first


def open_sources(arguments: list[str], *, null: bool = False) -> list[ImageSource]:
    """Open SOURCE arguments, image files in a row (*.png) as one; ToolkitError also when stdin is named twice."""
    if arguments.count("-") > 1:
        raise ToolkitError("- is given twice, but there is one stdin; give it once")
    sources: list[ImageSource] = []
    opened = map(partial(open_source, null=null), arguments)
    for is_file, run in groupby(opened, key=lambda source: source.names == (source.path,)):
        following = list(run)
        if is_file and len(following) > 1:
            names = tuple(source.path for source in following)
            following = [ImageSource("names", os.path.commonpath(names), names=names)]
        sources += following
    return sources


def open_source(argument: str, *, null: bool = False) -> ImageSource:
    """Open a SOURCE argument; `-` reads file names from stdin, which end in NUL if `null`, else in a newline.

    Raises ToolkitError when there is no such file, or a Parquet file without images.
    """
    if argument == "-":
        text = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # can be read again, and lives as long as its source
        shutil.copyfileobj(sys.stdin.buffer, text)
        return ImageSource("names", "-", text=text, null=null, folder=os.getcwd())
    path = os.path.abspath(argument)
    if not os.path.lexists(path):
        raise ToolkitError(f"no file or folder {argument}; check the path")
    if is_manifest_name(argument):
        manifest = open_manifest(Path(path))
        if not has_images(manifest):
            columns = ", ".join(manifest.names())
            raise ToolkitError(f"{argument} names no images (columns: {columns}); add a `uri` or `image` column")
        return ImageSource("manifest", path, manifest)
    if os.path.isdir(path):
        return ImageSource("folder", path)
    if argument.endswith(LIST_SUFFIXES):
        return ImageSource("names", path, text=check_regular(Path(path)).open("rb"), folder=os.path.dirname(path))
    return ImageSource("names", path, names=(path,))


def _listed_names(text: IO[bytes], null: bool) -> Iterator[str]:
    """Yield the names of a list, without holding all of them."""
    text.seek(0)
    end, rest = b"\0" if null else b"\n", b""
    for chunk in chain(iter(partial(text.read, 1 << 20), b""), [end]):  # the last name may have no end
        *lines, rest = (rest + chunk).split(end)
        for line in lines:
            if name := line if null else line.removesuffix(b"\r"):
                yield os.fsdecode(name)


def check_labels(labels: str, sources: list[ImageSource]) -> None:
    """Raise ToolkitError when `labels` is none of folder, none and column:NAME, or a source has no such column."""
    if labels in ("folder", "none"):
        return
    column = _label_column(labels)
    if not column:
        near = nearest(labels, ("folder", "none", "column:NAME"))
        raise ToolkitError(f"--labels {labels!r} is unknown{near}; use folder, none or column:NAME")
    for source in sources:
        if source.manifest is None:
            raise ToolkitError(f"--labels {labels} needs Parquet files, but {source.path} is none; use folder or none")
        if column not in (present := source.manifest.names()):
            what = f"{source.path} has no column {column!r} for --labels{nearest(column, present)}"
            raise ToolkitError(f"{what}; it has {', '.join(present)}")


def _label_column(labels: str) -> str | None:
    return labels.removeprefix("column:") if labels.startswith("column:") else None


def listing_id(source: ImageSource, skip: Skip) -> str:
    """Return the content id of a source: of files that of the listing (path, size, time stamp) less `skip`."""
    if source.manifest is not None:
        return source.manifest.content_id
    digest = hashlib.blake2b(digest_size=16)
    for entry in entries(source, "none", skip):
        digest.update(listing_line(entry))
    return digest.hexdigest()


def listing_line(entry: Entry) -> bytes:
    """Return what an entry adds to the content id of a source that is no manifest: BLAKE2b-128 of all its lines."""
    status = "" if entry.size is None else f"{entry.size}\0{entry.mtime_ns}"
    return f"{entry.uri}\0{status}\n".encode()


def entries(source: ImageSource, labels: str, skip: Skip) -> Iterator[Entry]:
    """Yield everything that a source lists, in the order of its paths (as bytes), of its rows or of its lines.

    With --labels folder an image's label is the first folder below the source, a manifest's its own label column.
    """
    if source.manifest is not None:
        yield from _manifest_entries(source.manifest, labels)
        return
    is_folder = source.kind == "folder"
    below = len(os.path.join(source.path, ""))
    for path in _paths(source, skip):
        label = None
        if is_folder and labels == "folder" and os.sep in path[below:]:
            label = os.fsencode(path[below:].split(os.sep, 1)[0]).decode("utf-8", "backslashreplace")
        reason, status = _examined(path)
        size, mtime_ns = (None, None) if status is None else (status.st_size, status.st_mtime_ns)
        yield Entry(file_uri(path), label, reason if is_folder else None, size=size, mtime_ns=mtime_ns)


def _paths(source: ImageSource, skip: Skip) -> Iterator[str]:
    """Yield absolute paths, and uris where a list has them."""
    if source.kind == "folder":
        yield from _walk(source.path, skip)
        return
    for name in source.names if source.text is None else _listed_names(source.text, source.null):
        if "://" in name:
            yield name
            continue
        beside = os.path.abspath(os.path.join(source.folder, name))
        yield beside if os.path.lexists(beside) else os.path.abspath(name)


def _walk(folder: str, skip: Skip) -> Iterator[str]:
    """Yield every file below a folder, and folders that are links or unreadable, in order of the paths as bytes."""
    stack = [_listed_folder(os.path.join(folder, ""), skip)]
    while stack:
        path = next(stack[-1], None)
        if path is None:
            stack.pop()
        elif path.endswith(os.sep):  # a folder
            stack.append(_listed_folder(path, skip))
        else:
            yield path


def _listed_folder(folder: str, skip: Skip) -> Iterator[str]:
    """Yield the paths in a folder in order, those of folders with a separator behind; itself if it cannot be read."""
    try:
        with os.scandir(folder) as listing:
            found = (
                os.fsencode(entry.path) + (b"/" if entry.is_dir(follow_symlinks=False) else b"")
                for entry in listing
                if not skip(entry.path)
            )
            # Arrow takes a tenth of the memory of Python's strings.
            pieces = [pa.array(piece, pa.binary()) for piece in iter(lambda: list(islice(found, SLICE_ROWS)), [])]
    except OSError:
        yield folder.rstrip(os.sep)
        return
    paths = pa.chunked_array(pieces, pa.binary())
    order = pc.sort_indices(paths)
    for start in range(0, len(order), SLICE_ROWS):
        yield from map(os.fsdecode, paths.take(order[start : start + SLICE_ROWS]).to_pylist())


def _examined(path: str) -> tuple[str | None, os.stat_result | None]:
    """Return why an entry of a folder is no image, if that shows without opening it, and the file's status."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return "gone since it was listed", None
    if stat.S_ISDIR(status.st_mode):
        return "a folder that cannot be read", status
    if stat.S_ISLNK(status.st_mode):
        try:
            status = os.stat(path)
        except OSError:
            return None, None  # a broken link
        if stat.S_ISDIR(status.st_mode):
            return "a link to a folder, not followed", status
    if path.endswith(".parquet"):
        return "a Parquet file; name it as a source of its own", status
    return None, status


def file_uri(path: str) -> str:
    """Return an absolute path as a uri: itself, or percent-encoded file:// where its bytes are not UTF-8."""
    raw = os.fsencode(path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "file://" + quote(raw)


def _manifest_entries(manifest: Manifest, labels: str) -> Iterator[Entry]:
    place = file_uri(str(manifest.path.absolute()))
    columns = ("uri", "source", "weight", *(() if labels == "none" else ("label",)))
    tables = image_batches(manifest, columns, label_column=_label_column(labels) or "label")
    for number, row in enumerate(chain.from_iterable(table.to_pylist() for table in tables)):
        if row["uri"] is None:
            row.update(uri=f"{place} row {number}", reason="the row names no image")
        yield Entry(**row)
