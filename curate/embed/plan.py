"""What an `embed` writes down before it opens an image: what its sources list, what is taken over, what is left to do.

The sources are walked once, and nothing of the size of the pool is held but a number or two an image.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from ... import console
from ...errors import ToolkitError
from ...features.extract.extract import FeatureModel, best_device
from ...store import catalog
from ...store.artifact import Options, check_side_file, difference, is_up_to_date
from ...store.cache import cache_folder
from ...store.manifest import OPTIONAL_IMAGE_FIELDS, Manifest, Provenance, Source, open_manifest, removed_path
from ...store.sources import Entry, ImageSource, Skip, entries, listing_line
from .assemble import assemble
from .listing import Listing, write_listing
from .parts import LISTING, PARTIAL, Work, finished_spans, forget_work, read_part, read_work, start_work, work_folder
from .reuse import NO_ROW, find_known
from .settings import EmbedSettings, extracted, manifest_fields, reading_of

TRIAL_IMAGES = 16  # chosen: how many a dry run embeds to learn the rate
MOST_GONE = 0.5  # chosen: an update that would drop a larger share of an output is more likely a mistake


def prepare_work(
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
    check_side_file(removed_path(path), "removed", path, provenance, options)
    if options.dry_run:
        _describe(path, survey, model, settings, earlier)
        return False
    if continues:
        listed.unlink()
        return True

    if unfinished is not None and not options.force:
        fields = manifest_fields(model, settings, provenance.parameters["columns"])
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
    batches = extracted(model, iter(survey.sample), settings, reading_of(settings))
    num_read = sum(len(batch.indices) for batch in batches)
    seconds = (time.perf_counter() - start) / max(len(survey.sample), 1) * survey.num_entries
    size = survey.num_entries * model.dim * (2 if settings.dtype == "float16" else 4)
    console.say(
        f"would read {survey.num_entries:,} files ({num_read} of the first {len(survey.sample)} are images)"
        f" with {model.source.path} on {best_device()}, and write up to {survey.num_entries:,} rows of"
        f" {model.dim} numbers ({size / 1e6:,.1f} MB) to {path}; about {seconds:,.0f} s"
        + ("" if earlier is None else f", less what is taken over of the {earlier.num_rows:,} images there")
    )
