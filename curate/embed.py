"""Images in, embeddings out: one manifest row an image, and a list of what could not be read.

walk the sources -> decode in threads -> model -> rows in the order of the walk, whatever the number of threads
"""

import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .. import console
from ..errors import ToolkitError
from ..features.extract import FeatureBatch, FeatureModel, ImageFacts, best_device, extract, open_model
from ..store import catalog
from ..store.artifact import Options, Result, check_manifest_name, is_up_to_date, recorded
from ..store.manifest import (
    IMAGE_FIELDS,
    OPTIONAL_IMAGE_FIELDS,
    REMOVED_FIELDS,
    ROW_GROUP_ROWS,
    ManifestWriter,
    Provenance,
    Source,
    embedding_field,
    open_manifest,
    removed_path,
)
from ..store.sources import Entry, ImageSource, Skip, check_labels, entries, open_sources, survey
from ..store.vectors import cache_folder

TRIAL_IMAGES = 16  # chosen: how many a dry run embeds to learn the rate

Vectors = npt.NDArray[np.float16 | np.float32]


@dataclass(frozen=True)
class EmbedSettings:
    """What `dinov2 curate embed` can be told, beside the options that all commands share."""

    model: str | None = None  # None: the newest finished run, else pixels
    role: str = "pool"  # pool, queries or eval: what bare commands take the images for
    labels: str = "folder"  # folder, none or column:NAME
    dtype: str = "float16"
    max_failed: float = 1.0  # share of the files, above which the command fails
    batch_size: int = 64
    num_workers: int | None = None  # None: one a core
    null: bool = False  # names on stdin end in NUL


@dataclass(frozen=True)
class Work:
    """All that is known before the first image is opened."""

    sources: list[ImageSource]
    num_entries: int
    model: FeatureModel
    fields: list[pa.Field]
    provenance: Provenance


def embed_images(arguments: list[str], output: str, settings: EmbedSettings, options: Options) -> Result | None:
    """Embed all images that the SOURCE arguments name; return None after a dry run.

    Raises ToolkitError when an argument is wrong, something else stands at `output`, no image at all can be read,
    or more than the share `max_failed` cannot.
    """
    path = check_manifest_name(output)
    work = _prepare(arguments, path, settings, options)
    is_made = is_up_to_date(path, work.provenance, options)
    if options.dry_run:
        if not is_made:
            _describe(path, work, settings)
        return None
    if not is_made:
        with recorded(path) as finished:
            provenance, of_removed = _write(path, work, settings)
            catalog.record(removed_path(path), of_removed, None)
            finished.append(provenance)
    made = open_manifest(path)
    num_removed = work.num_entries - made.num_rows
    _check_share(num_removed, work.num_entries, settings, f"see {removed_path(path)}")
    figures = {"images": made.num_rows, "removed": num_removed}
    return Result(output, {**figures, "model": work.model.source.path, "dim": work.model.dim})


def _prepare(arguments: list[str], path: Path, settings: EmbedSettings, options: Options) -> Work:
    sources = open_sources(arguments, null=settings.null)
    check_labels(settings.labels, sources)
    model = open_model(settings.model, options.seed)
    inputs, num_entries = [], 0
    for source in sources:
        content_id, count = survey(source, _own_files(path))
        inputs.append(Source("images" if source.manifest is None else "manifest", source.path, content_id))
        num_entries += count
    if num_entries == 0:
        raise ToolkitError(f"{', '.join(arguments)}: no files there; name a folder with images")
    carried = {name for source in sources if source.manifest is not None for name in source.manifest.names()}
    optional = [field for field in OPTIONAL_IMAGE_FIELDS if field.name in carried]
    dtype = pa.float16() if settings.dtype == "float16" else pa.float32()
    parameters: dict[str, object] = {
        "sources": [source.path for source in sources],
        "role": settings.role,
        "labels": settings.labels,
        "dtype": settings.dtype,
        "limit": options.limit,
    }
    return Work(
        sources=sources,
        num_entries=num_entries if options.limit is None else min(options.limit, num_entries),
        model=model,
        fields=[*IMAGE_FIELDS, *optional, embedding_field(model.dim, dtype)],
        provenance=Provenance(
            kind="embeddings",
            command="curate embed",
            parameters=parameters,
            seed=options.seed,
            inputs=(*inputs, model.source),
            role=settings.role,
        ),
    )


def _own_files(path: Path) -> Skip:
    """Return what tells the files that this command itself writes, should they lie below a source."""
    output, removed = str(path.absolute()), str(removed_path(path).absolute())
    catalog_file = str(catalog.catalog_path().absolute())
    own = {output, removed, catalog_file, f"{catalog_file}.wal", str(cache_folder().absolute())}
    temporary = tuple(os.path.join(os.path.dirname(file), f".{os.path.basename(file)}.") for file in (output, removed))

    def is_own(found: str) -> bool:
        return found in own or (found.startswith(temporary) and found.endswith(".tmp"))

    return is_own


def _entries(work: Work, path: Path, labels: str) -> Iterator[Entry]:
    listed = chain.from_iterable(entries(source, labels, _own_files(path)) for source in work.sources)
    return islice(listed, work.num_entries)


def _describe(path: Path, work: Work, settings: EmbedSettings) -> None:
    """Say what would be done and what it would cost, by trying a few images."""
    sample = [entry.uri for entry in islice(_entries(work, path, settings.labels), TRIAL_IMAGES) if not entry.reason]
    start = time.perf_counter()
    num_read = sum(len(batch.indices) for batch in _extract(work.model, iter(sample), settings))
    seconds = (time.perf_counter() - start) / max(len(sample), 1) * work.num_entries
    size = work.num_entries * work.model.dim * (2 if settings.dtype == "float16" else 4)
    console.say(
        f"would read {work.num_entries:,} files ({num_read} of the first {len(sample)} are images)"
        f" with {work.model.source.path} on {best_device()}, and write up to {work.num_entries:,} rows of"
        f" {work.model.dim} numbers ({size / 1e6:,.1f} MB) to {path}; about {seconds:,.0f} s"
    )


def _extract(model: FeatureModel, uris: Iterator[str], settings: EmbedSettings) -> Generator[FeatureBatch, None, None]:
    num_workers = settings.num_workers or os.cpu_count() or 1
    return extract(model, uris, batch_size=settings.batch_size, num_workers=num_workers)


@dataclass(frozen=True)
class Outcome:
    """What became of some entries that follow one another."""

    entries: list[Entry]  # embedded
    facts: list[ImageFacts]
    vectors: Vectors  # (B, D), finite
    removed: list[tuple[str, str]]  # uri and reason
    waited_s: float  # for decoding


def _outcomes(path: Path, work: Work, settings: EmbedSettings) -> Iterator[Outcome]:
    """Yield what became of every entry, in order."""
    waiting: deque[Entry] = deque()  # listed, not settled

    def uris() -> Iterator[str]:
        for entry in _entries(work, path, settings.labels):
            waiting.append(entry)
            if entry.reason is None:
                yield entry.uri

    with closing(_extract(work.model, uris(), settings)) as batches:
        for batch in batches:
            with np.errstate(over="ignore"):  # too large for half precision is infinite, and found below
                vectors: Vectors = batch.features.numpy().astype(settings.dtype)
            finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
            reasons = dict(batch.failures)
            reasons.update((batch.indices[row], "features that are not finite") for row in np.flatnonzero(~finite))
            kept, removed = [], []
            for index in sorted({*batch.indices, *reasons}):
                while (entry := waiting.popleft()).reason is not None:
                    removed.append((entry.uri, entry.reason))
                if index in reasons:
                    removed.append((entry.uri, reasons[index]))
                else:
                    kept.append(entry)
            facts = [fact for fact, is_kept in zip(batch.facts, finite, strict=True) if is_kept]
            yield Outcome(kept, facts, vectors[finite], removed, batch.waited_s)
    rest = [(entry.uri, entry.reason or "") for entry in waiting]
    yield Outcome([], [], np.empty((0, work.model.dim), settings.dtype), rest, 0.0)


def _write(path: Path, work: Work, settings: EmbedSettings) -> tuple[Provenance, Provenance]:
    """Write the embeddings and the removed rows, and return the provenance of both."""
    reasons: Counter[str] = Counter()
    example = ""
    start, waited_s = time.perf_counter(), 0.0
    # The inner file is put in its place first: whoever sees the embeddings finds their removed rows beside them.
    with (
        ManifestWriter(path, work.fields, work.provenance) as embedded,
        ManifestWriter(removed_path(path), list(REMOVED_FIELDS), replace(work.provenance, kind="removed")) as removed,
        console.progress("embedding", work.num_entries, "images") as advance,
    ):
        rows: list[pa.Table] = []
        removed_rows: list[pa.Table] = []
        for outcome in _outcomes(path, work, settings):
            rows = _write_groups(embedded, [*rows, _embedded_rows(outcome, work.fields)])
            removed_rows = _write_groups(removed, [*removed_rows, _removed_rows(outcome.removed)])

            if outcome.removed and not example:
                example = ": ".join(outcome.removed[0])
            reasons.update(reason for _, reason in outcome.removed)
            _check_share(reasons.total(), work.num_entries, settings, example)
            waited_s += outcome.waited_s
            share = waited_s / (time.perf_counter() - start)
            advance(len(outcome.entries) + len(outcome.removed), note=f"data_wait {share:.0%}")
        _write_groups(embedded, rows, everything=True)
        _write_groups(removed, removed_rows, everything=True)
        if embedded.num_rows == 0:
            raise ToolkitError(f"none of {work.num_entries} files is a readable image ({example}); name other sources")
        embedded.set_figures(images=embedded.num_rows, removed=removed.num_rows)
    common = "".join(f"; {count:,} {reason}" for reason, count in reasons.most_common(3))
    console.say(f"{embedded.num_rows:,} images embedded, {removed.num_rows:,} files removed{common}")
    return embedded.provenance, removed.provenance


def _check_share(num_removed: int, num_entries: int, settings: EmbedSettings, example: str) -> None:
    if num_removed > settings.max_failed * num_entries:
        raise ToolkitError(
            f"{num_removed} of {num_entries} files are no readable images ({example}), more than"
            f" --max-failed {settings.max_failed:g} allows; mend them, or allow more"
        )


def _write_groups(writer: ManifestWriter, tables: list[pa.Table], *, everything: bool = False) -> list[pa.Table]:
    """Write all full row groups, so that a file does not depend on the batch size, and return what is left."""
    table = pa.concat_tables(tables)
    num_rows = table.num_rows if everything else table.num_rows // ROW_GROUP_ROWS * ROW_GROUP_ROWS
    if num_rows:
        writer.write(table.slice(0, num_rows))
    return [table.slice(num_rows)]


def _embedded_rows(outcome: Outcome, fields: list[pa.Field]) -> pa.Table:
    columns = {
        "image_id": [fact.image_id for fact in outcome.facts],
        "uri": [entry.uri for entry in outcome.entries],
        "width": [fact.width for fact in outcome.facts],
        "height": [fact.height for fact in outcome.facts],
        "label": [entry.label for entry in outcome.entries],
        "source": [entry.source for entry in outcome.entries],
        "weight": [entry.weight for entry in outcome.entries],
    }
    arrays = [pa.array(columns[field.name], field.type) for field in fields[:-1]]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(outcome.vectors.reshape(-1)), type=fields[-1].type)
    return pa.table([*arrays, vectors], schema=pa.schema(fields))


def _removed_rows(removed: list[tuple[str, str]]) -> pa.Table:
    columns = {"uri": [uri for uri, _ in removed], "reason": [reason for _, reason in removed]}
    arrays = [pa.array(columns.get(field.name, [None] * len(removed)), field.type) for field in REMOVED_FIELDS]
    return pa.table(arrays, schema=pa.schema(REMOVED_FIELDS))
