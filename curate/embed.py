"""Images in, embeddings out: one manifest row an image, and a list of what could not be read.

list the sources -> take over what an earlier manifest has -> decode in threads -> model -> parts -> manifest

The parts are kept until the manifest stands, so that the same command continues after any end; rows come in the order
of the walk, whatever the number of threads and processes.
"""

import errno
import os
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .. import console
from ..errors import Stopped, ToolkitError
from ..features.extract import (
    FeatureBatch,
    FeatureModel,
    Reading,
    best_device,
    extract,
    open_model,
    precision,
    with_choice,
)
from ..features.processes import Group, caught_signals, is_launched, join_group, launch, local_count
from ..features.tokens import TokenChoice, Tokens
from ..store import catalog
from ..store.artifact import Options, Result, check_manifest_name, difference, is_up_to_date, recorded
from ..store.manifest import (
    IMAGE_FIELDS,
    OPTIONAL_IMAGE_FIELDS,
    Manifest,
    Provenance,
    Source,
    embedding_field,
    open_manifest,
    patch_fields,
    removed_path,
)
from ..store.sources import Entry, ImageSource, Skip, check_labels, entries, listing_line, open_sources
from ..store.vectors import cache_folder
from .embed_assembly import assemble, is_filtered
from .embed_filters import Filters
from .embedded_parts import (
    LISTING,
    NUMBER_FIELD,
    PART_BYTES,
    PART_SECONDS,
    PARTIAL,
    Part,
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
    start_work,
    taken_rows,
    work_folder,
    write_part,
)
from .listing import Listing, write_listing
from .taken_over import NO_ROW, find_known, known_by_bytes

TRIAL_IMAGES = 16  # chosen: how many a dry run embeds to learn the rate
MOST_GONE = 0.5  # chosen: an update that would drop a larger share of an output is more likely a mistake

Vectors = npt.NDArray[np.float16 | np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EmbedSettings:
    """What `dinov2 curate embed` can be told, beside the options that all commands share."""

    model: str | None = None  # None: the newest finished run, else what `open_model` takes then
    role: str = "pool"  # pool, queries or eval: what bare commands take the images for
    labels: str = "folder"  # folder, none or column:NAME
    dtype: str = "float16"
    max_failed: float = 1.0  # share of the files, above which the command fails
    batch_size: int = 64
    num_workers: int | None = None  # None: one a core
    null: bool = False  # names on stdin end in NUL
    tokens: Tokens = "cls"
    layers: int = 1  # the last so many blocks
    image_size: int | None = None  # pixels a side; None: the model's own
    windows: int | None = None  # short side in pixels of what is looked at in tiles
    filters: Filters = Filters()
    num_processes: int = 1


def embed_images(arguments: list[str], output: str, settings: EmbedSettings, options: Options) -> Result | None:
    """Embed all images that the SOURCE arguments name; return None after a dry run, and where another process speaks.

    Raises:
        Stopped: if a signal came; what was done is kept, and the same command goes on.
        ToolkitError: if an argument is wrong, something else stands at `output`, no image at all can be read, or more
            than the share `max_failed` cannot.
    """
    path = check_manifest_name(output)
    if settings.num_processes > 1 and not is_launched() and not options.dry_run:
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
        models.append(_model(settings, options))
        return _prepare(sources, path, models[0], settings, options)

    is_needed = group.decide(prepare)  # by the first process: what is wrong is said once
    model = models[0] if models else _model(settings, options)
    if is_needed:
        recording: AbstractContextManager[list[Provenance]] = recorded(path) if group.is_first else nullcontext([])
        with recording as finished:
            with caught_signals() as signals:
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


def _model(settings: EmbedSettings, options: Options) -> FeatureModel:
    choice = TokenChoice(settings.tokens, settings.layers)
    return with_choice(open_model(settings.model, options.seed), choice, settings.image_size, settings.windows)


# Before the first image is opened


def _prepare(
    sources: list[ImageSource], path: Path, model: FeatureModel, settings: EmbedSettings, options: Options
) -> bool:
    """Write down what is to be done; return False when nothing is, as in a dry run.

    Raises ToolkitError when something else stands at the output.
    """
    folder = work_folder(path)
    listed = folder / f"new-{LISTING}"
    survey = Survey(sources, settings.labels, _own_files(path), options.limit)
    if options.dry_run:
        for _ in survey.entries():
            pass
    else:
        write_listing(listed, survey.entries())
    if survey.num_entries == 0:
        raise ToolkitError(f"{', '.join(source.path for source in sources)}: no files there; name a folder with images")
    provenance = _provenance(survey, model, settings, options)
    unfinished = read_work(folder)
    continues = unfinished is not None and not options.force and _continues(unfinished, provenance)
    earlier = None if options.force else _manifest_of_ours(path)
    if earlier is not None and not _grows(earlier.provenance, provenance):
        earlier = None
    if not continues and earlier is None and is_up_to_date(path, provenance, options):
        forget_work(folder)
        return False
    if options.dry_run:
        _describe(path, survey, model, settings, earlier)
        return False
    if continues:
        listed.unlink()
        return True

    if unfinished is not None and not options.force:
        fields = _fields(model, settings, provenance.parameters["columns"])
        _keep_unfinished(folder, unfinished, provenance, fields)
    partial = None if options.force else _manifest_of_ours(folder / PARTIAL)
    if partial is not None and _grows(partial.provenance, provenance, or_is_same=True):
        earlier = partial
    _start(folder, listed, path, survey, provenance, earlier)
    return True


class Survey:
    """The entries of some sources, in one walk, and what is known after it."""

    def __init__(self, sources: list[ImageSource], labels: str, skip: Skip, limit: int | None) -> None:
        self.sources = sources
        self.inputs: list[Source] = []  # with their content ids, of everything that they list
        self.num_entries = 0  # within the limit
        self.sample: list[str] = []  # the first uris
        self._labels, self._skip, self._limit = labels, skip, limit

    def entries(self) -> Iterator[Entry]:
        """Yield the entries of all sources, as many as the limit allows."""
        for source in self.sources:
            digest = blake2b(digest_size=16)
            for entry in entries(source, self._labels, self._skip):
                if source.manifest is None:
                    digest.update(listing_line(entry))
                if self._limit is not None and self.num_entries >= self._limit:
                    continue
                self.num_entries += 1
                if self.num_entries <= TRIAL_IMAGES and entry.reason is None:
                    self.sample.append(entry.uri)
                yield entry
            manifest = source.manifest
            role, content_id = ("images", digest.hexdigest()) if manifest is None else ("manifest", manifest.content_id)
            self.inputs.append(Source(role, source.path, content_id))


def _provenance(survey: Survey, model: FeatureModel, settings: EmbedSettings, options: Options) -> Provenance:
    filters = settings.filters
    parameters: dict[str, object] = {
        "sources": [source.path for source in survey.sources],
        "role": settings.role,
        "labels": settings.labels,
        "dtype": settings.dtype,
        "limit": options.limit,
        "tokens": settings.tokens,
        "layers": settings.layers,
        "image_size": model.preprocess.image_size,
        "windows": settings.windows,
        "min_side": filters.min_side,
        "max_aspect": filters.max_aspect,
        "min_contrast": filters.min_contrast,
        "min_sharpness": filters.min_sharpness,
        "columns": _carried(survey.sources),
    }
    return Provenance(
        kind="embeddings",
        command="curate embed",
        parameters=parameters,
        seed=options.seed,
        inputs=(*survey.inputs, model.source),
        role=settings.role,
    )


def _carried(sources: list[ImageSource]) -> list[str]:
    """Return the optional image columns that a manifest among the sources has."""
    present = {name for source in sources if source.manifest is not None for name in source.manifest.names()}
    return [field.name for field in OPTIONAL_IMAGE_FIELDS if field.name in present]


def _fields(model: FeatureModel, settings: EmbedSettings, columns: object) -> list[pa.Field]:
    """Return the columns of the output; `columns` names the optional ones that the sources have."""
    dtype = pa.float16() if settings.dtype == "float16" else pa.float32()
    assert isinstance(columns, list), "a list of names in the parameters"
    optional = [field for field in OPTIONAL_IMAGE_FIELDS if field.name in columns]
    patches = patch_fields(model.dim, dtype) if settings.tokens == "patches" else []
    return [*IMAGE_FIELDS, *optional, *patches, embedding_field(model.dim, dtype)]


def _own_files(path: Path) -> Skip:
    """Return what tells the files that this command itself writes, should they lie below a source."""
    output, removed = str(path.absolute()), str(removed_path(path).absolute())
    catalog_file = str(catalog.catalog_path().absolute())
    own = {output, removed, catalog_file, f"{catalog_file}.wal", str(cache_folder().absolute())}
    temporary = tuple(os.path.join(os.path.dirname(file), f".{os.path.basename(file)}.") for file in (output, removed))

    def is_own(found: str) -> bool:
        return found in own or (found.startswith(temporary) and found.endswith(".tmp"))

    return is_own


def _manifest_of_ours(path: Path) -> Manifest | None:
    try:
        manifest = open_manifest(path)
    except ToolkitError:  # nothing there, or nothing to take over from
        return None
    return manifest if manifest.provenance is not None else None


def _continues(unfinished: Work, provenance: Provenance) -> bool:
    """Tell whether unfinished work is this very work, and what it takes over from still stands."""
    if not unfinished.provenance.same_work(provenance):
        return False
    if unfinished.earlier is None:
        return True
    earlier = _manifest_of_ours(Path(unfinished.earlier.path))
    return earlier is not None and earlier.content_id == unfinished.earlier.content_id


def _grows(there: Provenance | None, wanted: Provenance, *, or_is_same: bool = False) -> bool:
    """Tell whether the images of a manifest's sources have changed since, and nothing else."""
    if there is None or (there.same_work(wanted) and not or_is_same):
        return False
    of_images = ("images", "manifest")
    settings = [
        replace(one, inputs=tuple(replace(s, content_id="") if s.role in of_images else s for s in one.inputs))
        for one in (there, wanted)
    ]
    return settings[0].same_work(settings[1])


def _keep_unfinished(folder: Path, unfinished: Work, provenance: Provenance, fields: list[pa.Field]) -> None:
    """Make what was done before the sources changed a manifest to take over from; say so if it is of no use."""
    spans = finished_spans(folder)
    if not _grows(unfinished.provenance, provenance, or_is_same=True):
        count = sum(stop - start for start, stop in spans)
        why = difference(unfinished.provenance, provenance)
        console.say(f"discarding {count:,} images that were embedded otherwise before a stop ({why})")
    elif any(len(read_part(folder, span).rows) for span in spans):
        assemble(folder, unfinished, fields, folder / PARTIAL)


def _start(
    folder: Path, listed: Path, path: Path, survey: Survey, provenance: Provenance, earlier: Manifest | None
) -> None:
    """Write down what is to be read, and what is taken over from an earlier manifest."""
    is_image = np.concatenate([piece.column("reason").is_null().to_numpy(False) for piece in Listing(listed).pieces()])
    rows = None
    if earlier is not None:
        known = find_known(listed, len(is_image), earlier)
        num_gone = earlier.num_rows - known.num_listed
        if earlier.path == path and num_gone > MOST_GONE * earlier.num_rows:
            raise ToolkitError(
                f"{path} has {earlier.num_rows:,} images, and the sources list only {known.num_listed:,} of them now;"
                " check the sources, choose another -o, or --force to start afresh"
            )
        rows = known.rows
        is_image &= rows == NO_ROW
        console.say(
            f"{path}: {int((rows != NO_ROW).sum()):,} images taken over, {int(is_image.sum()):,} new or changed"
            f" to read, {num_gone:,} gone"
        )
    num_reasons = len(is_image) - int(is_image.sum()) - (0 if rows is None else int((rows != NO_ROW).sum()))
    forget_work(folder)
    os.replace(listed, folder / LISTING)
    source = None if earlier is None else earlier.source("earlier")
    start_work(folder, Work(provenance, source, survey.num_entries, num_reasons), rows, np.flatnonzero(is_image))


def _describe(
    path: Path, survey: Survey, model: FeatureModel, settings: EmbedSettings, earlier: Manifest | None
) -> None:
    """Say what would be done and what it would cost, by trying a few images."""
    start = time.perf_counter()
    batches = _extract(model, iter(survey.sample), settings, _reading(settings))
    num_read = sum(len(batch.indices) for batch in batches)
    seconds = (time.perf_counter() - start) / max(len(survey.sample), 1) * survey.num_entries
    size = survey.num_entries * model.dim * (2 if settings.dtype == "float16" else 4)
    console.say(
        f"would read {survey.num_entries:,} files ({num_read} of the first {len(survey.sample)} are images)"
        f" with {model.source.path} on {best_device()}, and write up to {survey.num_entries:,} rows of"
        f" {model.dim} numbers ({size / 1e6:,.1f} MB) to {path}; about {seconds:,.0f} s"
        + ("" if earlier is None else f", less what is taken over of the {earlier.num_rows:,} images there")
    )


# The images


def _reading(settings: EmbedSettings, earlier: Manifest | None = None, rows: Int64 | None = None) -> Reading | None:
    """Return what else is asked of the images; None if nothing is."""
    filters = settings.filters
    if not filters and earlier is None:
        return None
    known = None if earlier is None or rows is None else known_by_bytes(earlier, rows)
    return Reading(known, filters.reason if filters else None, filters.decode_side)


def _extract(
    model: FeatureModel, uris: Iterator[str | None], settings: EmbedSettings, reading: Reading | None
) -> Generator[FeatureBatch, None, None]:
    num_workers = settings.num_workers or max(1, (os.cpu_count() or 1) // local_count())
    return extract(model, uris, batch_size=settings.batch_size, num_workers=num_workers, reading=reading)


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
    reading = _reading(settings, earlier, taken_rows(folder))
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
        closing(_extract(model, uris(), settings, reading)) as batches,
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
    fields = {field.name: field for field in _fields(model, settings, [])}
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


# The end


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
    fields = _fields(model, settings, work.provenance.parameters["columns"])
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
