"""What SOURCE arguments name: folders, images, Parquet files, lists of names; entry by entry, in a fixed order.

Everything that a source lists is accounted for: as an image to try, or with the reason why it cannot be one.
"""

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import pyarrow as pa

from ..errors import ToolkitError
from .image_columns import has_images, read_images
from .manifest import Manifest, open_manifest

LIST_SUFFIXES = (".txt", ".lst", ".list")
SLICE_ROWS = 10_000  # chosen: rows of a manifest that are Python objects at a time

Kind = Literal["folder", "manifest", "names"]
Skip = Callable[[str], bool]  # tells of an absolute path whether the walk leaves it out


@dataclass(frozen=True)
class Entry:
    """An image to try; with a `reason`, something that is known to be none."""

    uri: str
    label: str | None = None
    reason: str | None = None
    source: str | None = None  # of a manifest's rows, carried over
    weight: float | None = None


@dataclass(frozen=True)
class ImageSource:
    """An opened SOURCE argument."""

    kind: Kind
    path: str  # absolute; "-" for stdin
    manifest: Manifest | None = None
    names: tuple[str, ...] = ()  # of kind "names": uris, or paths as they were listed
    folder: str = ""  # of kind "names": where relative names are looked for first

    @property
    def is_file(self) -> bool:
        """Tell whether the argument named a single image file."""
        return self.names == (self.path,)


def open_sources(arguments: list[str], *, null: bool = False) -> list[ImageSource]:
    """Return what SOURCE arguments name; image files that follow one another (a shell's *.png) are one source.

    Raises ToolkitError as `open_source` does, and when stdin is named twice.
    """
    if arguments.count("-") > 1:
        raise ToolkitError("- is given twice, but there is one stdin; give it once")
    sources: list[ImageSource] = []
    for is_file, run in groupby(map(partial(open_source, null=null), arguments), key=lambda source: source.is_file):
        following = list(run)
        if not is_file or len(following) == 1:
            sources += following
            continue
        names = tuple(source.path for source in following)
        sources.append(ImageSource("names", os.path.commonpath(names), names=names))
    return sources


def open_source(argument: str, *, null: bool = False) -> ImageSource:
    """Return what a SOURCE argument names; `-` reads file names from stdin, ended by NUL where `null`, else by newline.

    Raises ToolkitError when there is no such file, or a Parquet file without images.
    """
    if argument == "-":
        return ImageSource("names", "-", names=_split(sys.stdin.buffer.read(), null), folder=os.getcwd())
    path = os.path.abspath(argument)
    if not os.path.lexists(path):
        raise ToolkitError(f"no file or folder {argument}; check the path")
    if argument.endswith(".parquet") or os.path.exists(os.path.join(path, "_manifest.json")):
        manifest = open_manifest(Path(path))
        if not has_images(manifest):
            raise ToolkitError(
                f"{argument} names no images (columns: {', '.join(manifest.names())});"
                " it needs a `uri`, `path` or `image` column"
            )
        return ImageSource("manifest", path, manifest)
    if os.path.isdir(path):
        return ImageSource("folder", path)
    if argument.endswith(LIST_SUFFIXES):
        return ImageSource(
            "names", path, names=_split(Path(path).read_bytes(), null=False), folder=os.path.dirname(path)
        )
    return ImageSource("names", path, names=(path,))


def _split(text: bytes, null: bool) -> tuple[str, ...]:
    lines = text.split(b"\0") if null else [line.removesuffix(b"\r") for line in text.split(b"\n")]
    return tuple(os.fsdecode(line) for line in lines if line)


def check_labels(labels: str, sources: list[ImageSource]) -> None:
    """Raise ToolkitError when `labels` is none of folder, none and column:NAME, or a source has no such column."""
    if labels in ("folder", "none"):
        return
    column = _label_column(labels)
    if not column:
        raise ToolkitError(f"--labels {labels!r} is unknown; use folder, none or column:NAME")
    for source in sources:
        if source.manifest is None:
            raise ToolkitError(f"--labels {labels} needs Parquet files, but {source.path} is none; use folder or none")
        if column not in source.manifest.names():
            present = ", ".join(source.manifest.names())
            raise ToolkitError(f"{source.path} has no column {column!r} for --labels; it has {present}")


def _label_column(labels: str) -> str | None:
    return labels.removeprefix("column:") if labels.startswith("column:") else None


def survey(source: ImageSource, skip: Skip) -> tuple[str, int]:
    """Return a content id and the number of entries: of files the listing (path, size, time stamp), nothing is opened.

    `skip` tells which paths do not count, such as the output of the command itself.
    """
    if source.manifest is not None:
        return source.manifest.content_id, source.manifest.num_rows
    digest = hashlib.blake2b(digest_size=16)
    count = 0
    for path in _paths(source, skip):
        try:
            status = os.stat(path)
            digest.update(b"%s\0%d\0%d\n" % (os.fsencode(path), status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):  # a broken link, a uri, a name with NUL
            digest.update(b"%s\0\n" % os.fsencode(path))
        count += 1
    return digest.hexdigest(), count


def entries(source: ImageSource, labels: str, skip: Skip) -> Iterator[Entry]:
    """Yield everything that a source lists, in the order of its paths (as bytes), of its rows or of its lines.

    With --labels folder an image's label is the first folder below the source, a manifest's its own label column.
    """
    if source.manifest is not None:
        yield from _manifest_entries(source.manifest, labels)
        return
    below = len(os.path.join(source.path, ""))
    for path in _paths(source, skip):
        label = None
        if source.kind == "folder" and labels == "folder" and os.sep in path[below:]:
            label = os.fsencode(path[below:].split(os.sep, 1)[0]).decode("utf-8", "backslashreplace")
        yield Entry(file_uri(path), label, _known_reason(path) if source.kind == "folder" else None)


def _paths(source: ImageSource, skip: Skip) -> Iterator[str]:
    """Yield absolute paths, and uris where a list has them."""
    if source.kind == "folder":
        yield from _walk(source.path, skip)
        return
    for name in source.names:
        if "://" in name:
            yield name
            continue
        beside = os.path.abspath(os.path.join(source.folder, name))
        yield beside if os.path.lexists(beside) else os.path.abspath(name)


def _walk(folder: str, skip: Skip) -> Iterator[str]:
    """Yield every entry below a folder that is not a folder itself, and folders that cannot be read or are links.

    The order is that of the paths as bytes, whatever the file system says.
    """
    stack = [os.path.join(folder, "")]  # folders end in a separator
    while stack:
        path = stack.pop()
        if not path.endswith(os.sep):
            yield path
            continue
        try:
            with os.scandir(path) as found:
                listed = [
                    entry.path + os.sep if entry.is_dir(follow_symlinks=False) else entry.path
                    for entry in found
                    if not skip(entry.path)
                ]
        except OSError:
            listed = [path.rstrip(os.sep)]
        stack.extend(sorted(listed, key=os.fsencode, reverse=True))


def _known_reason(path: str) -> str | None:
    """Return why an entry of a folder is no image, where that shows without opening it."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return "gone since it was listed"
    if stat.S_ISLNK(mode) and os.path.isdir(path):
        return "a link to a folder, not followed"
    if stat.S_ISDIR(mode):
        return "a folder that cannot be read"
    if path.endswith(".parquet"):
        return "a Parquet file; name it as a source of its own"
    return None


def file_uri(path: str) -> str:
    """Return an absolute path as a uri: itself, or percent-encoded file:// where its bytes are not UTF-8."""
    raw = os.fsencode(path)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "file://" + quote(raw)


def _manifest_entries(manifest: Manifest, labels: str) -> Iterator[Entry]:
    place = file_uri(str(manifest.path.absolute()))
    table = read_images(manifest, label_column=_label_column(labels) or "label")
    if labels == "none":
        nulls = pa.nulls(table.num_rows, pa.string())
        table = table.set_column(table.schema.get_field_index("label"), "label", nulls)
    columns = [name for name in ("uri", "label", "source", "weight") if name in table.column_names]
    for start in range(0, table.num_rows, SLICE_ROWS):
        for number, row in enumerate(table.select(columns).slice(start, SLICE_ROWS).to_pylist(), start):
            if row["uri"] is None:
                row.update(uri=f"{place} row {number}", reason="the row names no image")
            yield Entry(**row)
