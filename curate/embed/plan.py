"""What an `embed` has to do: what it resumes or updates, and which entries are left to read."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from ... import console
from ...errors import ToolkitError
from ...features.extract.extract import FeatureModel, best_device
from ...store.artifact import difference, read_run_provenance, write_run_provenance
from ...store.manifest import Manifest, Provenance, open_manifest
from .filters import is_filtered
from .listing import Listed
from .parts import finished_parts, forget_work, num_in_parts
from .reuse import settled, write_unmatched
from .settings import EmbedSettings, extracted

MOST_GONE = 0.5  # chosen: an update that would drop a larger share of an output is more likely a mistake
TODO_SCHEMA = pa.schema(  # position: among the entries that the earlier manifest does not have
    {"position": pa.int64(), "uri": pa.string(), "version": pa.int64()}
)


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
    num_entries = num_failed = num_new = num_left = num_reused = 0
    with pa.ipc.new_file(str(folder / "todo.arrow"), TODO_SCHEMA) as writer:
        for entries in settled(folder, earlier, finished_parts(folder)):
            row, reason = entries.column("row"), entries.column("reason")
            is_read = entries.column("is_read").to_numpy()
            is_left = np.array(row.is_null()) & np.array(reason.is_null())
            position = num_new - 1 + np.cumsum(is_read | is_left)
            table = pa.table([position, entries.column("uri"), entries.column("version")], schema=TODO_SCHEMA)
            writer.write_table(table.filter(pa.array(is_left)))
            num_entries += len(entries)
            num_failed += sum(not is_filtered(each) for each in reason.drop_null().to_pylist())
            num_new += int((is_read | is_left).sum())
            num_left += int(is_left.sum())
            num_reused += len(entries) - row.null_count - int(is_read.sum())
    base = None if earlier is None else earlier.source("base")
    write_run_provenance(folder, replace(wanted, base=base, figures={"entries": num_entries, "failed": num_failed}))
    if earlier is not None:
        news = f"{num_new:,} new or changed to read, {num_gone:,} gone"
        console.say(f"{output}: {num_reused:,} images reused, {news}")
    if num_left < num_new:
        console.say(f"resuming: {num_new - num_left:,} of {num_new:,} images are there already")
    return num_new


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
