"""What the sources of an `embed` list: one walk, written to disk piece by piece, whatever its length.

number   from 0: the order of the output
reason   why the entry is no image, where that is known without opening it
version  changes with the file (`_version`)
"""

import os
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import pyarrow as pa

from ...store import catalog
from ...store.cache import cache_folder
from ...store.files import is_temporary
from ...store.manifest import Source, removed_path
from ...store.places import catalog_path
from ...store.sources import Entry, ImageSource, Skip, entries, listing_line

SLICE_ENTRIES = 1_024  # chosen: entries that are Python objects at a time
SAMPLE_IMAGES = 16  # chosen: how many a dry run embeds to measure the rate
OUTPUT_COLUMNS = {"uri": pa.string(), "label": pa.string(), "source": pa.string(), "weight": pa.float32()}
SCHEMA = pa.schema({"number": pa.int64(), **OUTPUT_COLUMNS, "reason": pa.string(), "version": pa.int64()})


@dataclass(frozen=True)
class Listed:
    """What is known of the sources after the walk."""

    inputs: tuple[Source, ...]  # the sources with the content ids of what they list
    num_entries: int  # within the limit
    sample: list[str]  # the first uris


def list_sources(path: Path | None, sources: list[ImageSource], labels: str, output: Path, limit: int | None) -> Listed:
    """Write the first `limit` entries of the sources (None: all) to `path`, an Arrow file; None writes nothing."""
    skip = _own_files(output)
    inputs, sample, number = [], [], 0
    with pa.ipc.new_file(pa.MockOutputStream() if path is None else str(path), SCHEMA) as writer:
        for source in sources:
            manifest, digest = source.manifest, blake2b(digest_size=16)
            content_id = "" if manifest is None else manifest.content_id
            following = islice(entries(source, labels, skip), None if limit is None else limit - number)
            while piece := list(islice(following, SLICE_ENTRIES)):
                if manifest is None:
                    for entry in piece:
                        digest.update(listing_line(entry))
                columns = {name: [getattr(entry, name) for entry in piece] for name in (*OUTPUT_COLUMNS, "reason")}
                columns["number"] = list(range(number, number + len(piece)))
                columns["version"] = [_version(entry, content_id) for entry in piece]
                writer.write_table(pa.table(columns, schema=SCHEMA))
                sample += [entry.uri for entry in piece[: max(SAMPLE_IMAGES - number, 0)] if entry.reason is None]
                number += len(piece)
            role = "images" if manifest is None else "manifest"
            inputs.append(Source(role, source.path, content_id or digest.hexdigest()))
    return Listed(tuple(inputs), number, sample)


def _version(entry: Entry, content_id: str) -> int:
    """Return a number from 0 that changes with a file's size and time stamp.

    Other entries have one below 0, by the content id of the manifest that lists them. It holds while a stopped run
    resumes; a later run reads such images again.
    """
    is_file = entry.size is not None
    text = f"{entry.size} {entry.mtime_ns}" if is_file else content_id
    number = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    return number if is_file else -1 - number


def _own_files(output: Path) -> Skip:
    """Return what recognises the files that the command itself writes, should they lie below a source."""
    outputs = [str(path.absolute()) for path in (output, removed_path(output))]
    database = str(catalog_path().absolute())
    own = {*outputs, database, str(cache_folder().absolute())}
    written = [*outputs, str(catalog.known_paths().absolute())]
    locks = {os.path.join(os.path.dirname(file), f".{os.path.basename(file)}.lock") for file in written}
    beside = tuple(f"{database}.{ending}" for ending in ("wal", "paths", "broken-"))
    return lambda found: (
        found in own or found in locks or found.startswith(beside) or is_temporary(os.path.basename(found))
    )
