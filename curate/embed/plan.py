"""What an `embed` has to do: what it resumes or updates, what is embedded already, and what is left to read.

An image is recognised by its uri and its version (size and time stamp of the file), without opening it; once it is
read, by its bytes. Rows are counted through the earlier manifest, then through the parts.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ... import console
from ...errors import ToolkitError
from ...features.extract.extract import FeatureModel, best_device
from ...store import tables
from ...store.arrays import kept_array
from ...store.artifact import difference, read_run_provenance, write_run_provenance
from ...store.cache import cache_folder, cache_key
from ...store.image_columns import image_batches
from ...store.manifest import Manifest, Provenance, Source, open_manifest
from .known import UNMATCHED
from .listing import SLICE_ENTRIES, Listed
from .parts import finished_parts, forget_work, num_in_parts, read_arrow
from .settings import EmbedSettings, extracted

MOST_GONE = 0.5  # chosen: an update that would drop a larger share of an output is more likely a mistake

EARLIER_SCHEMA = pa.schema({"uri": pa.string(), "image_id": pa.string(), "version": pa.int64(), "row": pa.int64()})
READ_SCHEMA = pa.schema({"uri": pa.string(), "version": pa.int64(), "row": pa.int64(), "reason": pa.string()})
# position: among the entries that the earlier manifest does not have
TODO_SCHEMA = pa.schema({"position": pa.int64(), "uri": pa.string(), "version": pa.int64()})


def stopped_run(folder: Path, wanted: Provenance) -> Provenance | None:
    """Return what a stopped run was making, if it can be resumed: the same settings, whatever the sources list now."""
    there = read_run_provenance(folder)
    return there if there is not None and _same_settings(there, wanted) else None


def earlier_manifest(output: Path, wanted: Provenance, stopped: Provenance | None) -> Manifest | None:
    """Return the manifest whose rows are reused: the output, where it was made with the same settings of other images.

    A run that is resumed keeps to the one that it reused, unless that has changed.
    """
    try:
        manifest = open_manifest(output)
    except ToolkitError:  # nothing there, or nothing to reuse
        return None
    if stopped is not None:
        return manifest if stopped.base == manifest.source("base") else None
    there = manifest.provenance
    return manifest if there and _same_settings(there, wanted) and not there.same_work(wanted) else None


def _same_settings(there: Provenance, wanted: Provenance) -> bool:
    """Tell whether nothing has changed but what the sources list, if that has."""
    models = [tuple(source for source in each.inputs if source.role == "model") for each in (there, wanted)]
    return replace(there, inputs=models[0]).same_work(replace(wanted, inputs=models[1]))


def start_work(
    folder: Path, output: Path, wanted: Provenance, stopped: Provenance | None, earlier: Manifest | None
) -> int:
    """Write down which entries of the listing are left to read; return how many are not in the earlier manifest.

    Raises ToolkitError when most images of the output are gone.
    """
    if stopped is None:
        if num := num_in_parts(folder):
            other = read_run_provenance(folder)
            why = "" if other is None else f" ({difference(other, wanted)})"
            console.say(f"discarding {num:,} images that a stopped run embedded with other settings{why}")
        forget_work(folder)
    num_gone = 0 if earlier is None else write_unmatched(folder, earlier)
    if earlier is not None and num_gone > MOST_GONE * earlier.num_rows:
        raise ToolkitError(
            f"{output} has {earlier.num_rows:,} images, and the sources list only {earlier.num_rows - num_gone:,} of"
            " them now; check the sources, choose another -o, or --force to start afresh"
        )
    num_new = num_left = num_reused = 0
    with pa.ipc.new_file(str(folder / "todo.arrow"), TODO_SCHEMA) as writer:
        for entries in match_listing(folder, earlier):
            row, is_read = entries.column("row"), entries.column("is_read").to_numpy()
            is_left = np.array(row.is_null()) & np.array(entries.column("reason").is_null())
            position = num_new - 1 + np.cumsum(is_read | is_left)
            table = pa.table([position, entries.column("uri"), entries.column("version")], schema=TODO_SCHEMA)
            writer.write_table(table.filter(pa.array(is_left)))
            num_new += int((is_read | is_left).sum())
            num_left += int(is_left.sum())
            num_reused += len(entries) - row.null_count - int(is_read.sum())
    write_run_provenance(folder, replace(wanted, base=None if earlier is None else earlier.source("base")))
    if earlier is not None:
        console.say(f"{output}: {num_reused:,} images reused, {num_new:,} new or changed to read, {num_gone:,} gone")
    if num_left < num_new:
        console.say(f"resuming: {num_new - num_left:,} of {num_new:,} images are there already")
    return num_new


def versions_path(manifest: Source) -> Path:
    """Return where the versions of a manifest's files are kept, (rows,) int64: in the cache."""
    return cache_folder() / f"{cache_key(manifest)}-versions.npy"


def match_listing(folder: Path, earlier: Manifest | None) -> Iterator[pa.Table]:
    """Yield the listing in order, a little at a time, with the `row` that each entry has; null where it has none.

    The `reason` is what the listing or a part says; `is_read` tells that a part has the entry.
    """
    with _joined(folder, earlier) as connection:
        batches = connection.sql(
            """
            with known as (
                select uri, version, row, null as reason, false as is_read from earlier where version is not null
                union all
                select uri, version, row, reason, true as is_read from read
            ), once as (
                select uri, version, min(row) as row, any_value(reason) as reason, bool_or(is_read) as is_read
                from known group by uri, version
            )
            select listed.* replace (coalesce(listed.reason, once.reason) as reason),
                row, coalesce(is_read, false) as is_read
            from listed left join once using (uri, version)
            order by number
            """
        ).to_arrow_reader(tables.BATCH_ROWS)
        for batch in batches:
            for start in range(0, len(batch), SLICE_ENTRIES):
                yield pa.Table.from_batches([batch.slice(start, SLICE_ENTRIES)])


def write_unmatched(folder: Path, earlier: Manifest) -> int:
    """Write image_id and row of what an earlier manifest has beyond the listing; return how many uris are gone.

    These images were moved, changed or removed.
    """
    num_gone = 0
    with _joined(folder, earlier) as connection:
        unmatched = connection.sql(
            """
            select image_id, row, uri not in (select uri from listed where reason is null) as is_gone
            from earlier anti join listed using (uri, version)
            order by image_id, row
            """
        ).to_arrow_reader(tables.BATCH_ROWS)
        with pa.ipc.new_file(str(folder / UNMATCHED), unmatched.schema) as writer:
            for batch in unmatched:
                writer.write_batch(batch.filter(pc.is_valid(batch.column("image_id"))))
                num_gone += int(batch.column("is_gone").true_count)
    return num_gone


@contextmanager
def _joined(folder: Path, earlier: Manifest | None) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a database with the tables `listed`, `earlier` and `read`; the last two can be scanned once."""
    with tables.connect() as connection:
        connection.register("listed", read_arrow(folder / "listing.arrow"))
        connection.register("earlier", tables.stream(EARLIER_SCHEMA, _earlier_rows(earlier)))
        connection.register("read", tables.stream(READ_SCHEMA, _read_rows(folder, earlier)))
        yield connection


def _earlier_rows(earlier: Manifest | None) -> Iterator[pa.Table]:
    """Yield what an earlier manifest has; without versions where the cache has lost them."""
    if earlier is None:
        return
    path = versions_path(earlier.source("earlier"))
    versions = kept_array(path, np.int64, (earlier.num_rows,))
    if versions is None:
        versions = np.broadcast_to(-1, earlier.num_rows)
    start = 0
    for batch in image_batches(earlier, ["uri", "image_id"]):
        stop = start + len(batch)
        version = pa.array(versions[start:stop], mask=versions[start:stop] < 0)
        names = batch.column("uri"), batch.column("image_id")
        yield pa.table([*names, version, np.arange(start, stop)], schema=EARLIER_SCHEMA)
        start = stop


def _read_rows(folder: Path, earlier: Manifest | None) -> Iterator[pa.Table]:
    """Yield what parts have; an entry whose bytes the earlier manifest has, with its row there."""
    start = 0 if earlier is None else earlier.num_rows
    for part in finished_parts(folder):
        uri, version, reason, earlier_row = read_arrow(part).select(["uri", "version", "reason", "earlier_row"]).columns
        stop = start + len(uri)
        rows = pc.coalesce(earlier_row, pa.array(np.arange(start, stop)))
        table = pa.table([uri, version, rows, reason], schema=READ_SCHEMA)
        yield table if earlier is not None else table.filter(pc.is_null(earlier_row))
        start = stop


def describe_work(
    output: Path, listed: Listed, model: FeatureModel, settings: EmbedSettings, earlier: Manifest | None
) -> None:
    """Say what would be done and what it would cost, by embedding a few images."""
    start = time.perf_counter()
    num_read = sum(len(batch.indices) for batch in extracted(model, listed.sample, settings))
    seconds = (time.perf_counter() - start) / max(len(listed.sample), 1) * listed.num_entries
    size = listed.num_entries * model.dim * (2 if settings.dtype == "float16" else 4)
    console.say(
        f"would read {listed.num_entries:,} files ({num_read} of the first {len(listed.sample)} are images)"
        f" with {model.source.path} on {best_device()}, and write up to {listed.num_entries:,} rows of"
        f" {model.dim} numbers ({size / 1e6:,.1f} MB) to {output}; about {seconds:,.0f} s"
        + ("" if earlier is None else f", less what is reused of the {earlier.num_rows:,} images there")
    )
