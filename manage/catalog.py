"""`dinov2 catalog`: lists, shows, traces and verifies artifacts; rebuilds the catalog and empties the cache."""

import json
import os
import shutil
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import console
from ..errors import ToolkitError, nearest
from ..store import catalog
from ..store.artifact import FILE_PROVENANCE, RUN_PROVENANCE, provenance_at
from ..store.cache import cached
from ..store.catalog import Artifact
from ..store.content_id import data_content_id
from ..store.files import sweep
from ..store.lock import is_held
from ..store.manifest import Provenance, open_manifest
from ..store.places import catalog_path


def list_artifacts(kind: str | None, as_json: bool) -> None:
    """Print one line an artifact, newest first: time, kind, rows, path. Raises ToolkitError for an unknown kind."""
    known = catalog.artifacts()
    kinds = list(dict.fromkeys((*catalog.KINDS, *(artifact.kind for artifact in known))))
    if kind is not None and kind not in kinds:
        raise ToolkitError(f"--kind {kind}: there is no such kind{nearest(kind, kinds)}; give {', '.join(kinds)}")
    found = [artifact for artifact in known if kind in (None, artifact.kind)]
    if as_json:
        print(json.dumps({"rows": [_plain(artifact) for artifact in found]}))
        return
    for artifact in found:
        gone = "" if Path(artifact.path).exists() else "  (gone)"
        rows = "" if artifact.rows is None else f"{artifact.rows:,}"
        _print(f"{artifact.time:%Y-%m-%d %H:%M:%S}  {artifact.kind:<10}  {rows:>12}  {_from_here(artifact.path)}{gone}")


def show(name: str, as_json: bool) -> None:
    """Print all that is known of an artifact. Raises ToolkitError when the catalog does not have it."""
    artifact = catalog.find(name)
    inputs, metrics = catalog.inputs_of(artifact), dict(catalog.metrics_of(artifact))
    if as_json:
        print(json.dumps({**_plain(artifact), "inputs": [asdict(source) for source in inputs], "metrics": metrics}))
        return
    for key, value in _plain(artifact).items():
        if key not in ("id", "parameters") and value is not None:
            _print(f"{key:<10}  {value}")
    for key, value in json.loads(artifact.parameters).items():
        _print(f"parameter   {key} = {value}")
    for source in inputs:
        _print(f"input       {source.role}: {source.path} ({source.content_id})")
    for key, value in metrics.items():
        _print(f"metric      {key} = {value:g}")


def lineage(name: str, as_json: bool) -> None:
    """Print the tree of what an artifact was made from, found by content; what stands in it twice is opened once.

    Raises ToolkitError as `show` does.
    """
    artifact, inputs = catalog.find(name), catalog.inputs()
    known_artifacts = list(reversed(catalog.artifacts(table="artifacts")))
    by_digest = {known.digest: known for known in known_artifacts}
    by_place = {(known.digest, known.path): known for known in known_artifacts}  # where two have the same content
    opened = {artifact.id}

    def ancestors(of: Artifact) -> dict[str, Any]:
        below: list[dict[str, Any]] = []
        for source in inputs.get(of.id, []):
            known = by_place.get((source.content_id, str(Path(source.path).absolute()))) or by_digest.get(
                source.content_id
            )
            if known is None or known.id == of.id:
                tree: dict[str, Any] = {"path": source.path, "inputs": []}
            elif known.id in opened:
                tree = {"path": known.path, "command": known.command, "inputs": [], "again": True}
            else:
                opened.add(known.id)
                tree = ancestors(known)
            below.append({**tree, "as": source.role})
        return {"path": of.path, "command": of.command, "inputs": below}

    tree = ancestors(artifact)
    print(json.dumps(tree)) if as_json else _print(*_indented(tree))


def _indented(tree: dict[str, Any], depth: int = 0) -> list[str]:
    role = f"{tree['as']}: " if "as" in tree else ""
    command = f"  [{tree['command']}]" if "command" in tree else ""
    again = "  (as above)" if "again" in tree else ""
    line = f"{'  ' * depth}{role}{_from_here(tree['path'])}{command}{again}"
    return [line, *(below for child in tree["inputs"] for below in _indented(child, depth + 1))]


def verify(names: list[str], as_json: bool) -> None:
    """Compare artifacts, read whole, with their content ids. Raises ToolkitError when one is not as it was made."""
    found = [catalog.find(name) for name in names] or catalog.artifacts()
    states = [(artifact.path, _state(artifact)) for artifact in found]
    if as_json:
        print(json.dumps({"rows": [{"path": path, "state": state} for path, state in states]}))
    else:
        _print(*(f"{state:<8}  {_from_here(path)}" for path, state in states))
    if bad := [path for path, state in states if state != "ok"]:
        changed = f"{len(bad)} of {len(states)} artifacts are not as they were made, first {bad[0]}"
        raise ToolkitError(f"{changed}; make them again")


def _state(artifact: Artifact) -> str:
    path = Path(artifact.path)
    if not path.exists():
        return "gone"
    try:
        if artifact.kind in ("run", "export"):
            from ..models.weights import model_content_id

            return "ok" if model_content_id(path) == artifact.digest else "changed"
        open_manifest(path)
        return "ok" if data_content_id(path) == artifact.digest else "changed"
    except (ToolkitError, OSError) as problem:
        console.warn(f"{path} cannot be read: {problem}")
        return "broken"


def rebuild(paths: list[Path]) -> None:
    """Enter every manifest, run folder and export under `paths` that carries provenance; times are those of the files.

    What is broken is named and left out. Raises ToolkitError when a path does not exist.
    """
    entered = 0
    for path in paths:
        if not path.exists():
            raise ToolkitError(f"no {path} to rebuild the catalog from; name manifests, run folders or their folder")
        for file, provenance in _carriers(path):
            catalog.record(file, provenance, None, at=datetime.fromtimestamp(file.stat().st_mtime))
            entered += 1
    console.say(f"entered {entered} artifacts in {catalog_path()}")
    print(catalog_path())


def _carriers(path: Path) -> list[tuple[Path, Provenance]]:
    """Return what carries provenance at or under a path, oldest first."""
    carriers = [path]
    if path.is_dir():
        runs = [file.parent for file in path.rglob(RUN_PROVENANCE)]
        files = [file.with_name(file.name.removesuffix(FILE_PROVENANCE)) for file in path.rglob(f"?*{FILE_PROVENANCE}")]
        carriers = sorted({*path.rglob("*.parquet"), *runs, *files})
    found = []
    for carrier in carriers:
        try:
            provenance = None
            if carrier.exists():
                is_manifest = carrier.suffix == ".parquet"
                provenance = open_manifest(carrier).provenance if is_manifest else provenance_at(carrier)
            if provenance is not None and provenance.content_id:  # an unfinished run has none
                found.append((carrier, provenance, carrier.stat().st_mtime))
        except (ToolkitError, OSError) as problem:
            console.warn(f"{carrier} is left out: {problem}")
    return [(carrier, provenance) for carrier, provenance, _ in sorted(found, key=lambda each: each[2])]


def gc(as_json: bool = False) -> None:
    """Empty the cache, and forget artifacts that no longer exist; print how many bytes came free.

    Only files with names of ours are removed, and not what an `embed` is writing at this moment. What stopped commands
    have kept is removed too: they start anew. Raises ToolkitError when the folder is no cache of ours.
    """
    freed = 0
    for found in cached():
        is_folder = found.is_dir() and not found.is_symlink()
        if is_folder and is_held(found / "lock"):
            continue
        freed += sum(file.lstat().st_size for file in (found.rglob("*") if is_folder else [found]))
        shutil.rmtree(found) if is_folder else found.unlink()
    gone = [path for artifact in catalog.artifacts() if not (path := Path(artifact.path)).exists()]
    for path in gone:
        catalog.forget(path)
    if catalog_path().exists():
        sweep(catalog_path().parent)
    console.say(f"removed {freed / 2**20:,.1f} MiB of the cache; forgot {len(gone)} artifacts that are gone")
    print(json.dumps({"freed_bytes": freed, "forgotten": len(gone)}) if as_json else freed)


def _plain(artifact: Artifact) -> dict[str, object]:
    return {**asdict(artifact), "time": artifact.time.isoformat(sep=" ", timespec="seconds")}


def _print(*lines: str) -> None:
    for line in lines:
        print(console.plain(line))


def _from_here(path: str) -> str:
    """Shorten a path that lies under the working folder."""
    return path.removeprefix(os.path.join(os.getcwd(), ""))
