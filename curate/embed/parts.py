"""What an `embed` has done so far, on disk: a folder in the cache, from which it continues after any end.

lock                    held while the command runs
listing.arrow           all entries of the sources (`listing`)
work.json               what is being made, and what is taken over from; written last: without it nothing counts
rows.npy, unread.npy    (N,) rows taken over; (T,) numbers of the entries to read
part-FROM-TO.arrow      what became of todo[FROM:TO], renamed into place when whole
partial.parquet         what was done when the sources changed meanwhile, to be taken over
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...store.cache import cache_folder, open_cache, remove_empty_cache
from ...store.lock import held, is_held
from ...store.manifest import Provenance, Source, provenance_from, provenance_values

BLOCK_ENTRIES = 1_024  # chosen: a batch ends where a block does, so that neither stops nor processes show in a batch
PART_BYTES = 64 << 20  # chosen: a part is written when it has as much,
PART_SECONDS = 10.0  # or spans so long: what a kill can cost

LISTING, WORK, ROWS, UNREAD, PARTIAL = "listing.arrow", "work.json", "rows.npy", "unread.npy", "partial.parquet"
NUMBER_FIELD = pa.field("number", pa.int64())  # of the entry

Int64 = npt.NDArray[np.int64]
Span = tuple[int, int]  # of todo, from and to


@dataclass(frozen=True)
class Work:
    """What is being made."""

    provenance: Provenance
    earlier: Source | None  # the manifest that rows are taken over from
    num_entries: int
    num_reasons: int  # entries that are known to be no image


@dataclass(frozen=True)
class Part:
    """What became of some entries that follow one another in todo."""

    rows: pa.Table  # `number` and what was embedded
    removed: list[tuple[int, str]]  # number and reason
    known: list[tuple[int, int]]  # number and row of the earlier manifest


def work_folder(output: Path) -> Path:
    """Return the folder in which the work on an output is kept."""
    return cache_folder() / f"embed-{blake2b(os.fsencode(output.absolute()), digest_size=8).hexdigest()}"


@contextmanager
def locked(folder: Path, output: Path) -> Iterator[None]:
    """Hold the work on an output, made when missing; remove what a killed process has left half written.

    Raises ToolkitError when another process has it.
    """
    open_cache()
    folder.mkdir(exist_ok=True)
    with held(folder / "lock", f"embedding to {output}"):
        for half in folder.glob(".*.tmp"):
            half.unlink()
        yield


def is_locked(folder: Path) -> bool:
    """Tell whether a process is at work in a folder."""
    return is_held(folder / "lock")


def discard(folder: Path) -> None:
    """Remove the work, and `.dinov2/cache` above it where it is left empty."""
    shutil.rmtree(folder)
    remove_empty_cache()


def read_work(folder: Path) -> Work | None:
    """Return what the folder holds the work on, or None."""
    path = folder / WORK
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    earlier = None if values["earlier"] is None else Source(**values["earlier"])
    provenance = provenance_from(values["provenance"], path)
    return Work(provenance, earlier, values["num_entries"], values["num_reasons"])


def forget_work(folder: Path) -> None:
    """Remove the parts of earlier work; what else it has left is written anew."""
    (folder / WORK).unlink(missing_ok=True)
    for part in folder.glob("part-*.arrow"):
        part.unlink()


def start_work(folder: Path, work: Work, rows: Int64 | None, todo: Int64) -> None:
    """Begin: write what is to be done; after this, parts count."""
    if rows is None:
        (folder / ROWS).unlink(missing_ok=True)
    else:
        np.save(folder / ROWS, rows)
    np.save(folder / UNREAD, todo)
    values = {**asdict(work), "provenance": provenance_values(work.provenance)}
    temporary = folder / f".{WORK}.tmp"
    temporary.write_text(json.dumps(values, indent=1))
    os.replace(temporary, folder / WORK)


def taken_rows(folder: Path) -> Int64 | None:
    """Return the rows (N,) that are taken over, `taken_over.NO_ROW` where none is; None if there is none at all."""
    return np.load(folder / ROWS, mmap_mode="r") if (folder / ROWS).exists() else None


def entries_to_read(folder: Path) -> Int64:
    """Return the numbers (T,) of the entries that must be read, ascending."""
    todo: Int64 = np.load(folder / UNREAD, mmap_mode="r")
    return todo


def part_path(folder: Path, span: Span) -> Path:
    """Return where the part that covers a span lies."""
    return folder / f"part-{span[0]:012}-{span[1]:012}.arrow"


def finished_spans(folder: Path) -> list[Span]:
    """Return the spans that are done, in order; a part that cannot be read, as after a power cut, is removed."""
    spans = []
    for path in sorted(folder.glob("part-*.arrow")):
        _, start, stop = path.stem.split("-")
        try:
            read_part(folder, (int(start), int(stop)))
        except (pa.ArrowInvalid, OSError):
            path.unlink()
            continue
        spans.append((int(start), int(stop)))
    return spans


def missing_blocks(finished: list[Span], num_todo: int) -> list[Span]:
    """Return what is left of todo, cut at the ends of blocks."""
    blocks = []
    at = 0
    for start, stop in [*finished, (num_todo, num_todo)]:
        while at < start:
            end = min((at // BLOCK_ENTRIES + 1) * BLOCK_ENTRIES, start)
            blocks.append((at, end))
            at = end
        at = stop
    return blocks


def write_part(folder: Path, span: Span, part: Part) -> None:
    """Write what became of a span of todo, whole or not at all."""
    path = part_path(folder, span)
    temporary = path.with_name(f".{path.name}.tmp")
    told = {"removed": json.dumps(part.removed), "known": json.dumps(part.known)}
    try:
        with pa.ipc.new_file(str(temporary), part.rows.schema.with_metadata(told)) as writer:
            writer.write_table(part.rows.combine_chunks())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_part(folder: Path, span: Span) -> Part:
    """Return what became of a span of todo; its rows stay on disk until they are used."""
    table = pa.ipc.open_file(pa.memory_map(str(part_path(folder, span)))).read_all()
    told = table.schema.metadata
    removed, known = (json.loads(told[name]) for name in (b"removed", b"known"))
    return Part(table.replace_schema_metadata(None), [(n, why) for n, why in removed], [(n, row) for n, row in known])


class PartWriter:
    """Gathers what became of images that follow one another, and writes a part when it is large or old enough."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[Part] = []
        self._span = (0, 0)
        self._since = 0.0

    def __enter__(self) -> "PartWriter":
        return self

    def add(self, span: Span, part: Part) -> None:
        """Take what became of a span of todo."""
        if self._parts and span[0] != self._span[1]:
            self.flush()
        if not self._parts:
            self._span, self._since = (span[0], span[0]), time.monotonic()
        self._parts.append(part)
        self._span = (self._span[0], span[1])
        size = sum(one.rows.nbytes for one in self._parts)
        if size >= PART_BYTES or time.monotonic() - self._since >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        parts, self._parts = self._parts, []
        if parts:
            rows = pa.concat_tables([part.rows for part in parts])
            removed = [pair for part in parts for pair in part.removed]
            known = [pair for part in parts for pair in part.known]
            write_part(self._folder, self._span, Part(rows, removed, known))

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()  # after an exception too: the images are embedded
