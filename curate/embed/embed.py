"""Images in, embeddings out: one manifest row an image, and a list of what could not be read.

list the sources -> what is embedded already -> embed the rest, part by part -> assemble the manifest

The parts are kept until the manifest stands, so that the same command resumes after any end. Rows come in the order
of the walk, whatever the number of threads and processes.
"""

import errno
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

from ... import console
from ...errors import Stopped, ToolkitError
from ...features.extract.extract import FeatureModel, best_device, precision
from ...features.image_server import server
from ...features.launch import Group, caught_signals, is_launched, join_group, launch
from ...store.artifact import Options, Result, check_manifest_name, make, read_run_provenance
from ...store.manifest import Provenance, removed_path
from ...store.sources import check_labels, open_sources
from .assemble import assemble, check_failed
from .filters import is_filtered
from .known import UNMATCHED, KnownRows
from .listing import SLICE_ENTRIES, list_sources
from .parts import (
    PartWriter,
    discard_damaged_parts,
    forget_work,
    locked,
    num_in_parts,
    part_rows,
    part_schema,
    read_arrow,
    work_folder,
)
from .plan import describe_work, earlier_manifest, start_work, stopped_run
from .settings import EmbedSettings as EmbedSettings
from .settings import chosen_model, extracted, manifest_fields, wanted_provenance

RESUMES = "the same command resumes"
BLOCK_ENTRIES = 1_024  # chosen: a batch ends where a block does, so that neither stops nor processes show in a batch


def embed_images(arguments: list[str], output: str, settings: EmbedSettings, options: Options) -> Result | None:
    """Embed all images that the SOURCE arguments name; return None after a dry run, and where another process speaks.

    Raises Stopped when a signal came (the same command resumes), and ToolkitError when an argument is wrong, something
    else stands at `output`, no image at all can be read, or more than the share `max_failed` cannot.
    """
    path = check_manifest_name(output)
    is_new = options.force or not path.exists()
    if is_new and not is_launched(os.environ) and settings.num_processes == 1:
        server.start()  # while sources are listed and the model is read
    if settings.num_processes > 1 and not is_launched(os.environ) and not options.dry_run:
        launch(settings.num_processes, lambda: f"{num_in_parts(work_folder(path)):,} images are kept; {RESUMES}")
        return None
    group = join_group()
    folder = work_folder(path)
    try:
        if group.is_first:
            with nullcontext() if options.dry_run else locked(folder, path):
                return _run_first(arguments, output, folder, settings, options, group)
        if group.decide(lambda: True):  # what the first process says
            _embed_share(folder, chosen_model(settings, options), settings, group)
            group.wait()
        return None
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
        kept = num_in_parts(folder)
        do = "make room and run the same command again"
        raise ToolkitError(f"the disk is full; {kept:,} images are kept: {do}") from None


def _run_first(
    arguments: list[str], output: str, folder: Path, settings: EmbedSettings, options: Options, group: Group
) -> Result | None:
    """Run the command as the first process: list, plan, embed a share and assemble."""
    path = Path(output)
    has_started = False
    try:
        sources = open_sources(arguments, null=settings.null)
        check_labels(settings.labels, sources)
        model = chosen_model(settings, options)
        listing = None if options.dry_run else folder / "listing.arrow"
        listed = list_sources(listing, sources, settings.labels, path, options.limit)
        if listed.num_entries == 0:
            paths = ", ".join(source.path for source in sources)
            raise ToolkitError(f"{paths}: no files there; name a folder with images")
        wanted = wanted_provenance(sources, listed, model, settings, options)
        if options.force and not options.dry_run:
            forget_work(folder)
        if not options.dry_run:
            discard_damaged_parts(folder)
        stopped = stopped_run(folder, wanted)
        earlier = None if options.force else earlier_manifest(path, wanted, stopped)

        def work() -> Provenance:
            nonlocal has_started
            num_new = start_work(folder, path, wanted, stopped, earlier)
            num_before = num_in_parts(folder)
            has_started = group.decide(lambda: True)
            _embed_share(folder, model, settings, group)
            group.wait()
            num_kept = num_in_parts(folder)
            if num_kept - num_before < len(read_arrow(folder / "todo.arrow")):
                if num_kept == 0:
                    raise KeyboardInterrupt
                kept = f"{num_kept:,} of {num_new:,} images are embedded and kept"
                raise Stopped(f"stopped: {kept}; {RESUMES}")
            fields = manifest_fields(model, settings, wanted.parameters["columns"])
            return assemble(folder, wanted, earlier, fields, path, settings.max_failed)

        result = make(
            output,
            wanted,
            options,
            describe=lambda: describe_work(path, listed, model, settings, earlier),
            work=work,
            side_files={removed_path(path): "removed"},
            update=earlier is not None or (stopped is not None and stopped.same_work(wanted)),
        )
    finally:
        if not has_started:
            group.decide(lambda: False)
    if result is None:
        return None
    if not has_started:
        forget_work(folder)
    images, removed, filtered = (int(str(result.figures.get(name, 0))) for name in ("images", "removed", "filtered"))
    check_failed(removed - filtered, images + removed, settings.max_failed, f"see {removed_path(path)}")
    return replace(result, figures={"images": images, "removed": removed, "model": model.source.path, "dim": model.dim})


def _embed_share(folder: Path, model: FeatureModel, settings: EmbedSettings, group: Group) -> None:
    """Embed this process's share of what is left, a part at a time, until a signal comes."""
    begun, todo = read_run_provenance(folder), read_arrow(folder / "todo.arrow")
    assert begun is not None, "the first process has written it"
    num_entries, num_failed = len(read_arrow(folder / "listing.arrow")), 0
    schema = part_schema(manifest_fields(model, settings, []))
    recognise = None if begun.base is None else KnownRows(folder / UNMATCHED)
    waiting: deque[tuple[str, int]] = deque()  # uris and versions that were read, and are not embedded yet

    def uris() -> Iterator[str | None]:
        last = None
        for batch in todo.to_batches(SLICE_ENTRIES):
            for position, uri, version in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                block = position // BLOCK_ENTRIES
                if block % group.count == group.rank:
                    if block != last:
                        yield None  # a batch ends with its block
                    last = block
                    waiting.append((uri, version))
                    yield uri

    device = best_device()
    if device.type == "cuda" and len(todo):
        console.say(f"embedding in {str(precision(device)).removeprefix('torch.')} on {group.count} GPU(s)")
    start, waited_s, num_done = time.perf_counter(), 0.0, 0
    title = "embedding" if group.count == 1 else f"embedding, 1 of {group.count} processes"
    with (
        caught_signals("batch") as signals,
        closing(PartWriter(folder)) as parts,
        console.progress(title, len(todo) // group.count, "images") as advance,
        closing(extracted(model, uris(), settings, recognise)) as batches,
    ):
        for batch in batches:
            entries = [waiting.popleft() for _ in (*batch.indices, *batch.failures, *batch.known)]
            table = part_rows(batch, num_done, entries, schema, settings.dtype)
            parts.add(table)
            num_done += len(entries)

            reasons = zip(table.column("uri").to_pylist(), table.column("reason").to_pylist(), strict=True)
            if failed := [f"{uri}: {reason}" for uri, reason in reasons if reason and not is_filtered(reason)]:
                num_failed += len(failed)
                check_failed(num_failed, num_entries, settings.max_failed, failed[0])
            waited_s += batch.waited_s
            advance(len(entries), note=f"data_wait {waited_s / (time.perf_counter() - start):.0%}")
            if signals:
                break
