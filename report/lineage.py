"""Where a run comes from: what it was made from, what that was made from, back to the raw pool."""

import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ToolkitError
from ..features.page.parts import Branch
from ..store import catalog
from ..store.artifact import provenance_at
from ..store.manifest import Provenance, Source, is_manifest_name, open_manifest


def lineage(provenance: Provenance, near: Path, seen: set[str]) -> list[Branch]:
    """Return the inputs of a step as branches, each with its own inputs below it; what `seen` has only by name.

    An input is looked for where it was, beside `near`, and in the catalog by its content, for it may have moved.
    """
    return [_branch(source, near, seen) for source in provenance.inputs]


def _branch(source: Source, near: Path, seen: set[str]) -> Branch:
    found = locate(source, near)
    made = None if found is None else provenance_at(found)
    if found is None or made is None:
        is_path = os.sep in source.path and "://" not in source.path
        is_gone = found is None and is_path and not Path(source.path).exists()
        return _from_here(source.path), f"{source.role}, not there any more" if is_gone else source.role, []
    remark = f"{source.role}, made by {made.command}"
    if is_manifest_name(str(found)):
        remark += f", {open_manifest(found).num_rows:,} images"
    if source.content_id in seen:
        return _from_here(str(found)), f"{remark}; see above", []
    seen.add(source.content_id)
    return _from_here(str(found)), remark, lineage(made, found, seen)


def _from_here(path: str) -> str:
    """Shorten a path that lies under the working folder."""
    return path.removeprefix(os.path.join(os.getcwd(), ""))


def locate(source: Source, near: Path) -> Path | None:
    """Return where a manifest or run that a step read is now; None where it is gone, or another stands there."""
    recorded = Path(source.path)
    for path in (recorded, near.absolute().parent / recorded.name, *_moved(source)):
        if _content_id(path) == source.content_id:
            return path
    return None


def _moved(source: Source) -> Iterator[Path]:
    for known in catalog.artifacts("digest = ?", [source.content_id], table="artifacts"):
        yield Path(known.path)


def _content_id(path: Path) -> str | None:
    """Return the content id of the manifest or run at a path, None where there is none that can be read."""
    made = provenance_at(path)
    try:
        return open_manifest(path).content_id if made is None else made.content_id
    except ToolkitError:
        return None
