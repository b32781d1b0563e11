"""From finished parts to a manifest: rows in the order of the sources, taken over and embedded ones alike."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...store.cache import open_cache
from ...store.manifest import (
    REMOVED_FIELDS,
    ROW_GROUP_ROWS,
    ManifestWriter,
    Provenance,
    Source,
    open_manifest,
    removed_path,
)
from .filters import REASONS
from .listing import Listing
from .parts import LISTING, NUMBER_FIELD, Part, Work, finished_spans, read_part, taken_rows
from .reuse import NO_ROW, EarlierRows, files_path

PATCH_GROUP_ROWS = 64  # chosen: 256 patches of 384 half floats are 200 KB an image
OF_ENTRIES = ("uri", "label", "source", "weight")  # columns that come from the listing

Int64 = npt.NDArray[np.int64]


@dataclass
class Summary:
    """What an assembly has seen so far."""

    num_rows: int = 0
    num_taken: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # why entries were removed, without the values
    num_filtered: int = 0
    example: str = ""


def reason_kind(reason: str) -> str:
    """Return a reason without its values, which stand behind a colon."""
    return reason.split(":", 1)[0]


def is_filtered(reason: str) -> bool:
    """Tell whether an image was removed by a filter, though it could be read."""
    return reason.startswith(REASONS)


def assemble(folder: Path, work: Work, fields: list[pa.Field], path: Path) -> tuple[Provenance, Provenance, Summary]:
    """Write the manifest and its removed rows from what is done; return the provenance of both, and a summary.

    Entries that no part has settled are left out.
    """
    summary = Summary()
    files: list[Int64] = [np.empty((2, 0), np.int64)]
    group_rows = PATCH_GROUP_ROWS if any(column.name == "patches" for column in fields) else ROW_GROUP_ROWS
    kinds = work.provenance, replace(work.provenance, kind="removed")
    # The inner file is put in its place first: whoever sees the embeddings finds their removed rows beside them.
    with (
        ManifestWriter(path, fields, kinds[0]) as embedded,
        ManifestWriter(removed_path(path), list(REMOVED_FIELDS), kinds[1]) as removed,
    ):
        rows, removed_rows = [pa.schema(fields).empty_table()], [pa.schema(REMOVED_FIELDS).empty_table()]
        for table, size_and_time, reasons in _pieces(folder, work, fields, summary):
            files.append(size_and_time)
            rows = _write_groups(embedded, [*rows, table], group_rows)
            removed_rows = _write_groups(removed, [*removed_rows, _removed_rows(reasons)], ROW_GROUP_ROWS)
            for uri, reason in reasons:
                summary.reasons[reason_kind(reason)] += 1
                summary.num_filtered += is_filtered(reason)
                summary.example = summary.example or f"{uri}: {reason}"
        for writer, rest in ((embedded, rows), (removed, removed_rows)):
            if rest[0].num_rows:
                writer.write(rest[0].combine_chunks())
        summary.num_rows = embedded.num_rows
        filtered = {"filtered": summary.num_filtered} if summary.num_filtered else {}
        embedded.set_figures(images=embedded.num_rows, removed=removed.num_rows, **filtered)
    open_cache()
    written = Source("manifest", str(path.absolute()), embedded.provenance.content_id)
    np.save(files_path(written), np.concatenate(files, axis=1))
    return embedded.provenance, removed.provenance, summary


def _pieces(
    folder: Path, work: Work, fields: list[pa.Field], summary: Summary
) -> Iterator[tuple[pa.Table, Int64, list[tuple[str, str]]]]:
    """Yield, a thousand entries at a time, their rows, the files' sizes and time stamps, and what was removed."""
    taken = taken_rows(folder)
    found = [column.name for column in fields if column.name not in OF_ENTRIES]
    earlier = None
    if work.earlier is not None:
        earlier = EarlierRows(open_manifest(Path(work.earlier.path)), found)
    schema = pa.schema([NUMBER_FIELD, *(column for column in fields if column.name in found)])
    parts = _Parts(folder, schema.empty_table())
    first = 0
    for entries in Listing(folder / LISTING).pieces():
        numbers = np.arange(first, first + len(entries))
        old = np.full(len(entries), NO_ROW, np.int64) if taken is None else np.array(taken[numbers])
        reasons = {n: why for n, why in zip(numbers.tolist(), entries.column("reason").to_pylist(), strict=True) if why}
        part = parts.until(first + len(entries))
        reasons.update(part.removed)
        for number, row in part.known:
            old[number - first] = row

        is_old = old != NO_ROW
        pieces = [part.rows.select(found)]
        order = [part.rows.column("number").to_numpy()]
        if is_old.any():
            assert earlier is not None, "rows are taken over from somewhere"
            pieces.append(earlier.take(old[is_old]).cast(pieces[0].schema))
            order.append(numbers[is_old])
        kept = np.concatenate(order)
        places = pa.array(np.argsort(kept, kind="stable"))
        columns = pa.concat_tables(pieces).take(places)
        mine = entries.take(pa.array(np.sort(kept) - first))
        table = pa.table(
            [mine.column(f.name) if f.name in OF_ENTRIES else columns.column(f.name) for f in fields],
            schema=pa.schema(fields),
        )
        files = np.stack([mine.column(name).fill_null(-1).to_numpy() for name in ("size", "mtime_ns")])
        uris = entries.column("uri")
        yield table, files, [(uris[number - first].as_py(), reasons[number]) for number in sorted(reasons)]
        summary.num_taken += int(is_old.sum())
        first += len(entries)


class _Parts:
    """The parts of a folder, read once from the first entry to the last."""

    def __init__(self, folder: Path, empty: pa.Table) -> None:
        self._empty = empty
        self._parts = (read_part(folder, span) for span in finished_spans(folder))
        self._left: list[Part] = []  # opened, not used up
        self._last = -1  # the last number of those

    def until(self, number: int) -> Part:
        """Return what became of all entries below a number that were not asked for before."""
        while self._last < number and (part := next(self._parts, None)) is not None:
            self._left.append(part)
            self._last = max(_settled(part))
        taken = [_between(part, 0, number) for part in self._left]
        left = [_between(part, number, self._last + 1) for part in self._left]
        self._left = [part for part in left if _settled(part)]
        return Part(
            pa.concat_tables([self._empty, *(part.rows for part in taken)]),
            [pair for part in taken for pair in part.removed],
            [pair for part in taken for pair in part.known],
        )


def _settled(part: Part) -> list[int]:
    """Return the numbers of the entries that a part speaks of."""
    told = [number for pairs in (part.removed, part.known) for number, _ in pairs]
    return [*part.rows.column("number").to_pylist(), *told]


def _between(part: Part, start: int, stop: int) -> Part:
    """Return what a part says of the entries from start to stop."""
    first, end = np.searchsorted(part.rows.column("number").to_numpy(), (start, stop)).tolist()
    return Part(
        part.rows.slice(first, end - first),
        [pair for pair in part.removed if start <= pair[0] < stop],
        [pair for pair in part.known if start <= pair[0] < stop],
    )


def _write_groups(writer: ManifestWriter, tables: list[pa.Table], group_rows: int) -> list[pa.Table]:
    """Write all full row groups, so that a file does not depend on how its rows came, and return what is left."""
    table = pa.concat_tables(tables)
    while table.num_rows >= group_rows:
        writer.write(table.slice(0, group_rows).combine_chunks())
        table = table.slice(group_rows)
    return [table]


def _removed_rows(removed: list[tuple[str, str]]) -> pa.Table:
    columns = {"uri": [uri for uri, _ in removed], "reason": [reason for _, reason in removed]}
    arrays = [pa.array(columns.get(field.name, [None] * len(removed)), field.type) for field in REMOVED_FIELDS]
    return pa.table(arrays, schema=pa.schema(REMOVED_FIELDS))
