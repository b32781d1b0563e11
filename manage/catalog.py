"""What the catalog can tell: listings, lineage, verification; and how it is rebuilt."""

import json
import shutil
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from .. import console
from ..errors import ToolkitError
from ..store import catalog
from ..store.artifact import FILE_PROVENANCE, RUN_PROVENANCE, read_run_provenance
from ..store.cache import cached
from ..store.catalog import Artifact
from ..store.lock import is_held
from ..store.manifest import Provenance, data_content_id, open_manifest, provenance_from


def list_artifacts(kind: str | None, as_json: bool) -> None:
    """Print one line an artifact, newest first: time, kind, rows, path."""
    found = catalog.artifacts() if kind is None else catalog.artifacts("kind = ?", [kind])
    if as_json:
        print(json.dumps({"rows": [_plain(artifact) for artifact in found]}))
        return
    for artifact in found:
        gone = "" if Path(artifact.path).exists() else "  (gone)"
        rows = "" if artifact.rows is None else f"{artifact.rows:,}"
        print(f"{artifact.time:%Y-%m-%d %H:%M:%S}  {artifact.kind:<10}  {rows:>12}  {_near(artifact.path)}{gone}")


def show(name: str, as_json: bool) -> None:
    """Print all that is known of an artifact.

    Raises ToolkitError when the catalog does not have it.
    """
    artifact = catalog.find(name)
    inputs, metrics = catalog.inputs_of(artifact), dict(catalog.metrics_of(artifact))
    if as_json:
        print(json.dumps({**_plain(artifact), "inputs": [asdict(source) for source in inputs], "metrics": metrics}))
        return
    for key, value in _plain(artifact).items():
        if key not in ("id", "parameters") and value is not None:
            print(f"{key:<10}  {value}")
    for key, value in json.loads(artifact.parameters).items():
        print(f"parameter   {key} = {value}")
    for source in inputs:
        print(f"input       {source.role}: {source.path} ({source.content_id})")
    for key, value in metrics.items():
        print(f"metric      {key} = {value:g}")


def lineage(name: str, as_json: bool) -> None:
    """Print the tree of what an artifact was made from: by content, so a moved or remade input is still found.

    Raises ToolkitError when the catalog does not have it.
    """
    artifact = catalog.find(name)
    tree = _ancestors(artifact, {candidate.digest: candidate for candidate in reversed(_all_artifacts())})
    print(json.dumps(tree) if as_json else "\n".join(_indented(tree)))


def _all_artifacts() -> list[Artifact]:
    with catalog.connect(read_only=True) as connection:
        return [Artifact(*row) for row in connection.execute("select * from artifacts order by time desc").fetchall()]


def _ancestors(artifact: Artifact, by_digest: dict[str, Artifact]) -> dict[str, object]:
    inputs: list[dict[str, object]] = []
    for source in catalog.inputs_of(artifact):
        known = by_digest.get(source.content_id)
        tree = (
            _ancestors(known, by_digest) if known and known.id != artifact.id else {"path": source.path, "inputs": []}
        )
        inputs.append({**tree, "as": source.role})
    return {"path": artifact.path, "command": artifact.command, "inputs": inputs}


def _indented(tree: dict[str, object], depth: int = 0) -> list[str]:
    role = f"{tree['as']}: " if "as" in tree else ""
    command = f"  [{tree['command']}]" if "command" in tree else ""
    lines = [f"{'  ' * depth}{role}{_near(str(tree['path']))}{command}"]
    inputs = tree["inputs"]
    assert isinstance(inputs, list)
    for child in inputs:
        lines += _indented(child, depth + 1)
    return lines


def verify(names: list[str], as_json: bool) -> None:
    """Read artifacts whole, and compare their contents with their content ids; print one line each.

    Raises ToolkitError when one is gone or differs.
    """
    found = [catalog.find(name) for name in names] or catalog.artifacts()
    states = [(artifact.path, _state(artifact)) for artifact in found]
    if as_json:
        print(json.dumps({"rows": [{"path": path, "state": state} for path, state in states]}))
    else:
        for path, state in states:
            print(f"{state:<8}  {_near(path)}")
    if bad := [path for path, state in states if state != "ok"]:
        raise ToolkitError(
            f"{len(bad)} of {len(states)} artifacts are not as they were made, first {bad[0]}; make them again"
        )


def _state(artifact: Artifact) -> str:
    path = Path(artifact.path)
    if not path.exists():
        return "gone"
    if artifact.kind in ("run", "export"):
        from ..models.weights import model_content_id

        return "ok" if model_content_id(path) == artifact.digest else "changed"
    return "ok" if data_content_id(path) == artifact.digest else "changed"


def rebuild(paths: list[Path]) -> None:
    """Enter every manifest, run folder and export under `paths` that carries provenance; times are those of the files.

    Raises ToolkitError when a path does not exist.
    """
    entered = 0
    for path in paths:
        if not path.exists():
            raise ToolkitError(f"no {path} to rebuild the catalog from; name manifests, run folders or their folder")
        for file, provenance in _carriers(path):
            catalog.record(file, provenance, None, at=datetime.fromtimestamp(file.stat().st_mtime))
            entered += 1
    console.say(f"entered {entered} artifacts in {catalog.catalog_path()}")
    print(catalog.catalog_path())


def _carriers(path: Path) -> list[tuple[Path, Provenance]]:
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    found: list[tuple[Path, Provenance]] = []
    for file in files:
        if file.suffix == ".parquet" and (provenance := open_manifest(file).provenance) is not None:
            found.append((file, provenance))
    for file in sorted(path.rglob(RUN_PROVENANCE)) if path.is_dir() else []:
        if (provenance := read_run_provenance(file.parent)) is not None and provenance.content_id:
            found.append((file.parent, provenance))
    for file in sorted(path.rglob(f"*{FILE_PROVENANCE}")) if path.is_dir() else []:
        carrier = file.with_name(file.name.removesuffix(FILE_PROVENANCE))
        if carrier.name and carrier.exists():
            found.append((carrier, provenance_from(json.loads(file.read_text(encoding="utf-8")), file)))
    return sorted(found, key=lambda carrier: carrier[0].stat().st_mtime)


def gc() -> None:
    """Empty the cache, and forget artifacts that no longer exist; print how many bytes came free.

    Only what has a name of our making goes. What an `embed` is writing this moment stays; what stopped ones have kept
    goes, and they start anew. Raises ToolkitError when something that is no cache of ours stands in its place.
    """
    freed = 0
    for found in cached():
        is_folder = found.is_dir() and not found.is_symlink()
        if is_folder and is_held(found / "lock"):
            continue
        freed += sum(file.lstat().st_size for file in (found.rglob("*") if is_folder else [found]))
        shutil.rmtree(found) if is_folder else found.unlink()
    gone = [artifact.path for artifact in catalog.artifacts() if not Path(artifact.path).exists()]
    for path in gone:
        catalog.forget(Path(path))
    console.say(f"removed {freed / 2**20:,.1f} MiB of the cache; forgot {len(gone)} artifacts that are gone")
    print(freed)


def _plain(artifact: Artifact) -> dict[str, object]:
    return {**asdict(artifact), "time": artifact.time.isoformat(sep=" ", timespec="seconds")}


def _near(path: str) -> str:
    """Shorten a path that lies under the working folder."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
