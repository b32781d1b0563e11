"""From parts to a manifest: rows in the order of the listing, reused and embedded ones alike."""

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ... import console
from ...errors import ToolkitError
from ...store import catalog
from ...store.arrays import seal
from ...store.files import replacing
from ...store.manifest import REMOVED_FIELDS, Manifest, ManifestWriter, Provenance, Source, removed_path
from ...store.vectors import Int64
from .filters import is_filtered
from .listing import OUTPUT_COLUMNS
from .parts import finished_parts, forget_work, read_arrow
from .plan import match_listing, versions_path

OPEN_GROUPS = 2  # chosen: row groups of the earlier manifest that are kept decoded
MOST_REASONS = 5  # chosen: of removed files, that are said


def assemble(
    folder: Path, wanted: Provenance, earlier: Manifest | None, fields: list[pa.Field], output: Path, max_failed: float
) -> Provenance:
    """Write the manifest and its removed rows, enter the latter in the catalog, and return the manifest's provenance.

    Raises ToolkitError, and leaves what stands there, when no image is readable, or more than a share `max_failed` of
    the entries is not.
    """
    schema = pa.schema(fields)
    found = pa.schema([field for field in fields if field.name not in OUTPUT_COLUMNS])
    stored = StoredRows(earlier, finished_parts(folder), found)
    versions = [np.empty(0, np.int64)]
    reasons: Counter[str] = Counter()  # without the values, which stand behind a colon
    num_entries, num_reused, example = 0, 0, ""
    # The inner file is put in its place first: whoever sees the embeddings finds their removed rows beside them.
    with (
        ManifestWriter(output, fields, wanted) as embedded,
        ManifestWriter(removed_path(output), list(REMOVED_FIELDS), replace(wanted, kind="removed")) as removed,
    ):
        for entries in match_listing(folder, earlier):
            num_entries += len(entries)
            is_kept = pc.is_null(entries.column("reason"))
            kept, gone = entries.filter(is_kept), entries.filter(pc.invert(is_kept))
            rows = kept.column("row").to_numpy()
            taken = stored.take(rows)
            columns = [(kept if name in OUTPUT_COLUMNS else taken).column(name) for name in schema.names]
            embedded.write(pa.table(columns, schema=schema))
            nulls = [pa.nulls(len(gone), field.type) for field in REMOVED_FIELDS[2:]]
            columns = [gone.column("uri"), gone.column("reason"), *nulls]
            removed.write(pa.table(columns, schema=pa.schema(REMOVED_FIELDS)))
            versions.append(kept.column("version").to_numpy())
            num_reused += int((rows < stored.num_earlier).sum())
            reasons.update(reason.split(":", 1)[0] for reason in gone.column("reason").to_pylist())
            if len(gone) and not example:
                example = f"{gone.column('uri')[0]}: {gone.column('reason')[0]}"
        if embedded.num_rows == 0:
            forget_work(folder)
            raise ToolkitError(f"none of {num_entries} files is a readable image ({example}); name other sources")
        num_filtered = sum(count for reason, count in reasons.items() if is_filtered(reason))
        check_failed(removed.num_rows - num_filtered, num_entries, max_failed, example)
        filtered = {"filtered": num_filtered} if num_filtered else {}
        embedded.set_figures(images=embedded.num_rows, removed=removed.num_rows, **filtered)

    source = Source("manifest", str(output.absolute()), embedded.provenance.content_id)
    with replacing(versions_path(source)) as temporary, temporary.open("wb") as file:
        np.save(file, np.concatenate(versions))
    seal(versions_path(source))
    forget_work(folder)
    catalog.record(removed_path(output), removed.provenance, None)
    shown = reasons.most_common(MOST_REASONS)
    common = "".join(f"; {count:,} {reason}" for reason, count in shown)
    if (others := removed.num_rows - sum(count for _, count in shown)) > 0:
        common += f"; {others:,} for other reasons ({removed_path(output)})"
    reused = "" if earlier is None else f", {num_reused:,} of them reused"
    console.say(f"{embedded.num_rows:,} images embedded{reused}, {removed.num_rows:,} files removed{common}")
    return embedded.provenance


def check_failed(num_failed: int, num_entries: int, max_failed: float, example: str) -> None:
    """Raise ToolkitError when a larger share than `max_failed` of the entries is no readable image."""
    if num_failed > max_failed * num_entries:
        raise ToolkitError(
            f"{num_failed} of {num_entries} files are no readable images ({example}), more than"
            f" --max-failed {max_failed:g} allows; mend them, or allow more"
        )


class StoredRows:
    """The rows of an earlier manifest and of parts, in any order; quick where that is nearly the order of the files."""

    def __init__(self, earlier: Manifest | None, parts: list[Path], schema: pa.Schema) -> None:
        self.num_earlier = 0 if earlier is None else earlier.num_rows
        self._schema, self._parts = schema, parts
        files = [] if earlier is None else [pq.ParquetFile(part, pre_buffer=False) for part in earlier.parts]
        self._groups = [(file, group) for file in files for group in range(file.num_row_groups)]
        sizes = [file.metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = np.cumsum([0, *sizes, *(read_arrow(part).num_rows for part in parts)])
        self._decoded = lru_cache(OPEN_GROUPS)(self._decode)

    def take(self, rows: Int64) -> pa.Table:
        """Return these rows, in this order."""
        pieces = np.searchsorted(self._starts, rows, side="right") - 1  # row groups, then parts
        taken = [self._schema.empty_table()]
        for piece in np.unique(pieces).tolist():
            is_part = piece >= len(self._groups)
            table = read_arrow(self._parts[piece - len(self._groups)]) if is_part else self._decoded(piece)
            within = pa.array(rows[pieces == piece] - self._starts[piece])
            taken.append(table.select(self._schema.names).take(within).cast(self._schema))
        order = np.argsort(np.argsort(pieces, kind="stable"))
        return pa.concat_tables(taken).take(pa.array(order))

    def _decode(self, piece: int) -> pa.Table:
        file, group = self._groups[piece]
        return file.read_row_group(group, columns=self._schema.names)
