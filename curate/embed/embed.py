"""Images in, embeddings out: one manifest row an image, and a list of what could not be read.

list the sources -> take over what an earlier manifest has -> decode in threads -> model -> parts -> manifest

The parts are kept until the manifest stands, so that the same command continues after any end; rows come in the order
of the walk, whatever the number of threads and processes.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ... import console
from ...errors import Stopped, ToolkitError
from ...features.extract.extract import FeatureBatch, FeatureModel, best_device, precision
from ...features.launch import Group, caught_signals, is_launched, join_group, launch
from ...store import catalog
from ...store.artifact import Options, Result, check_manifest_name, recorded
from ...store.manifest import Provenance, open_manifest, removed_path
from ...store.sources import check_labels, open_sources
from .assemble import assemble, is_filtered
from .listing import Listing
from .parts import (
    LISTING,
    NUMBER_FIELD,
    Part,
    PartWriter,
    Span,
    Work,
    discard,
    entries_to_read,
    finished_spans,
    forget_work,
    locked,
    missing_blocks,
    read_part,
    read_work,
    taken_rows,
    work_folder,
)
from .plan import prepare_work
from .reuse import NO_ROW
from .settings import EmbedSettings as EmbedSettings
from .settings import chosen_model, extracted, manifest_fields, reading_of

Vectors = npt.NDArray[np.float16 | np.float32]
Int64 = npt.NDArray[np.int64]


def embed_images(arguments: list[str], output: str, settings: EmbedSettings, options: Options) -> Result | None:
    """Embed all images that the SOURCE arguments name; return None after a dry run, and where another process speaks.

    Raises:
        Stopped: if a signal came; what was done is kept, and the same command goes on.
        ToolkitError: if an argument is wrong, something else stands at `output`, no image at all can be read, or more
            than the share `max_failed` cannot.
    """
    path = check_manifest_name(output)
    if settings.num_processes > 1 and not is_launched(os.environ) and not options.dry_run:
        launch(settings.num_processes)
        return None
    group = join_group()
    folder = work_folder(path)
    with nullcontext() if options.dry_run or not group.is_first else locked(folder, path):
        try:
            return _embed(arguments, output, settings, options, group)
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
            kept = sum(stop - start for start, stop in finished_spans(folder))
            raise ToolkitError(
                f"the disk is full; {kept:,} images are kept: make room and run the same command again"
            ) from None
        finally:
            if group.is_first and not options.dry_run and read_work(folder) is None:
                discard(folder)  # nothing is left to be done, or nothing was begun


def _embed(arguments: list[str], output: str, settings: EmbedSettings, options: Options, group: Group) -> Result | None:
    path = Path(output)
    folder = work_folder(path)
    models: list[FeatureModel] = []

    def prepare() -> bool:
        sources = open_sources(arguments, null=settings.null)
        check_labels(settings.labels, sources)
        models.append(chosen_model(settings, options))
        return prepare_work(sources, path, models[0], settings, options)

    is_needed = group.decide(prepare)  # by the first process: what is wrong is said once
    model = models[0] if models else chosen_model(settings, options)
    if is_needed:
        recording: AbstractContextManager[list[Provenance]] = recorded(path) if group.is_first else nullcontext([])
        with recording as finished:
            with caught_signals("batch") as signals:
                _embed_share(folder, model, settings, group, signals)
            group.wait()
            if group.is_first:
                finished.append(_finish(folder, path, model, settings))
    if options.dry_run or not group.is_first:
        return None
    made = open_manifest(path)
    assert made.provenance is not None, "it is ours"
    num_removed, num_filtered = (int(str(made.provenance.figures.get(name, 0))) for name in ("removed", "filtered"))
    num_files = made.num_rows + num_removed
    _check_share(num_removed - num_filtered, num_files, settings, f"see {removed_path(path)}")
    figures = {"images": made.num_rows, "removed": num_removed}
    return Result(output, {**figures, "model": model.source.path, "dim": model.dim})


def _embed_share(folder: Path, model: FeatureModel, settings: EmbedSettings, group: Group, signals: list[int]) -> None:
    """Embed this process's share of what is left, a part at a time, until a signal comes."""
    work = read_work(folder)
    assert work is not None, "the first process has written it"
    todo, finished = entries_to_read(folder), finished_spans(folder)
    left = missing_blocks(finished, len(todo))
    group.wait()  # until all have seen what is left, none may add to it
    share = left[group.rank :: group.count]
    num_left = sum(stop - start for start, stop in left)
    if finished:
        console.say(f"continuing: {len(todo) - num_left:,} of {len(todo):,} images are there already")
    earlier = None if work.earlier is None or not share else open_manifest(Path(work.earlier.path))
    reading = reading_of(settings, earlier, taken_rows(folder))
    listing = Listing(folder / LISTING)
    num_failed = _failed_before(folder, work, finished)

    def uris() -> Iterator[str | None]:
        for start, stop in share:
            yield from listing.uris(todo[start:stop])
            yield None  # a batch ends with its block

    device = best_device()
    if device.type == "cuda" and share:
        console.say(f"embedding in {str(precision(device)).removeprefix('torch.')} on {group.count} GPU(s)")
    begun, waited_s = time.perf_counter(), 0.0
    num_mine = sum(stop - start for start, stop in share)
    title = "embedding" if group.count == 1 else f"embedding, 1 of {group.count} processes"
    with (
        PartWriter(folder) as parts,
        console.progress(title, num_mine, "images") as advance,
        closing(extracted(model, uris(), settings, reading)) as batches,
    ):
        blocks = iter(share)
        num_seen = at = stop = 0  # uris settled; the next position in todo; where its block ends
        for batch in batches:
            if at == stop:
                at, stop = next(blocks)
            positions = at - num_seen  # from a uri's index to its position in todo
            part = _part(batch, todo, positions, model, settings)
            num_settled = len(batch.indices) + len(batch.failures) + len(batch.known)
            parts.add((at, at + num_settled), part)
            at, num_seen = at + num_settled, num_seen + num_settled

            failed = [(number, reason) for number, reason in part.removed if not is_filtered(reason)]
            num_failed += len(failed)
            if failed and num_failed > settings.max_failed * work.num_entries:
                number, reason = failed[0]
                (uri,) = listing.uris(np.array([number]))
                _check_share(num_failed, work.num_entries, settings, f"{uri}: {reason}")
            waited_s += batch.waited_s
            advance(num_settled, note=f"data_wait {waited_s / (time.perf_counter() - begun):.0%}")
            if signals:
                break


def _failed_before(folder: Path, work: Work, finished: list[Span]) -> int:
    """Return how many entries are known to be no readable image."""
    removed = (reason for span in finished for _, reason in read_part(folder, span).removed)
    return work.num_reasons + sum(not is_filtered(reason) for reason in removed)


def _part(batch: FeatureBatch, todo: Int64, shift: int, model: FeatureModel, settings: EmbedSettings) -> Part:
    """Return what became of the images of a batch; `shift` leads from their indices to positions in todo."""
    with np.errstate(over="ignore"):  # too large for half precision is infinite, and found below
        vectors: Vectors = batch.features.numpy().astype(settings.dtype)
        patches = [image.numpy().astype(settings.dtype) for image in batch.patches]
    is_finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
    if patches:
        is_finite &= np.array([bool(np.isfinite(image).all()) for image in patches])
    numbers = todo[np.array(batch.indices, np.int64) + shift]
    removed = [(int(todo[index + shift]), reason) for index, reason in batch.failures]
    removed += [(number, "features that are not finite") for number in numbers[~is_finite].tolist()]
    known = [(int(todo[index + shift]), row) for index, row in batch.known]

    facts = [fact for fact, is_kept in zip(batch.facts, is_finite, strict=True) if is_kept]
    fields = {field.name: field for field in manifest_fields(model, settings, [])}
    columns = {
        "number": pa.array(numbers[is_finite]),
        "image_id": pa.array([fact.image_id for fact in facts], pa.string()),
        "width": pa.array([fact.width for fact in facts], pa.int32()),
        "height": pa.array([fact.height for fact in facts], pa.int32()),
    }
    if settings.tokens == "patches":
        kept = [image for image, is_kept in zip(patches, is_finite, strict=True) if is_kept]
        columns["grid_height"] = pa.array([image.shape[0] for image in kept], pa.int32())
        columns["grid_width"] = pa.array([image.shape[1] for image in kept], pa.int32())
        flat = [image.reshape(-1, model.dim) for image in kept]
        ends = np.cumsum([0, *map(len, flat)]).astype(np.int32)
        kind = fields["patches"].type
        values = np.concatenate([np.empty((0, model.dim), settings.dtype), *flat]).reshape(-1)
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind.value_type)
        columns["patches"] = pa.ListArray.from_arrays(pa.array(ends), tokens, type=kind)
    kept_vectors = pa.array(vectors[is_finite].reshape(-1))
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(kept_vectors, type=fields["embedding"].type)
    schema = pa.schema([NUMBER_FIELD, *(fields[name] for name in columns if name != "number")])
    return Part(pa.table(list(columns.values()), schema=schema), sorted(removed), known)


def _finish(folder: Path, path: Path, model: FeatureModel, settings: EmbedSettings) -> Provenance:
    """Write the manifest from the parts, enter its removed rows in the catalog, and return its provenance.

    Raises:
        Stopped, KeyboardInterrupt: if something is left to be done, and something or nothing has been.
        ToolkitError: if nothing is readable, or too little.
    """
    work = read_work(folder)
    assert work is not None, "it was begun"
    finished, num_todo = finished_spans(folder), len(entries_to_read(folder))
    if missing_blocks(finished, num_todo):
        num_done = sum(stop - start for start, stop in finished)
        if num_done == 0:
            raise KeyboardInterrupt
        raise Stopped(f"stopped: {num_done:,} of {num_todo:,} images are embedded and kept; the same command goes on")
    if not _has_rows(folder, finished):
        example = _first_removed(folder, finished)
        forget_work(folder)
        raise ToolkitError(f"none of {work.num_entries} files is a readable image ({example}); name other sources")
    num_failed = _failed_before(folder, work, finished)
    if num_failed > settings.max_failed * work.num_entries:
        _check_share(num_failed, work.num_entries, settings, _first_removed(folder, finished))
    fields = manifest_fields(model, settings, work.provenance.parameters["columns"])
    embedded, removed, summary = assemble(folder, work, fields, path)
    forget_work(folder)
    catalog.record(removed_path(path), removed, None)
    common = "".join(f"; {count:,} {reason}" for reason, count in summary.reasons.most_common(3))
    taken = f", {summary.num_taken:,} of them taken over" if work.earlier is not None else ""
    num_removed = summary.reasons.total()
    console.say(f"{summary.num_rows:,} images embedded{taken}, {num_removed:,} files removed{common}")
    return embedded


def _has_rows(folder: Path, finished: list[Span]) -> bool:
    rows = taken_rows(folder)
    if rows is not None and bool((rows != NO_ROW).any()):
        return True
    parts = (read_part(folder, span) for span in finished)
    return any(len(part.rows) or part.known for part in parts)


def _first_removed(folder: Path, finished: list[Span]) -> str:
    """Return the uri and reason of a removed entry, as an example."""
    listing = Listing(folder / LISTING)
    for span in finished:
        for number, reason in read_part(folder, span).removed:
            return f"{next(listing.uris(np.array([number])))}: {reason}"
    for piece in listing.pieces():
        for uri, reason in zip(piece.column("uri").to_pylist(), piece.column("reason").to_pylist(), strict=True):
            if reason is not None:
                return f"{uri}: {reason}"
    return "no entry"


def _check_share(num_removed: int, num_entries: int, settings: EmbedSettings, example: str) -> None:
    if num_removed > settings.max_failed * num_entries:
        raise ToolkitError(
            f"{num_removed} of {num_entries} files are no readable images ({example}), more than"
            f" --max-failed {settings.max_failed:g} allows; mend them, or allow more"
        )
