"""The catalog: a DuckDB file that knows what was made, from what, with which settings.

Losing it loses convenience only: manifests carry their own provenance, and `rebuild` restores it from them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path

import duckdb

from .. import console
from ..errors import ToolkitError, nearest
from .database import opened
from .files import write_text
from .manifest import Provenance, Source, open_manifest
from .places import catalog_path

KINDS = ("images", "embeddings", "selection", "removed", "clusters", "scores", "run", "export")
COLUMNS = "id, kind, path, digest, rows, bytes, command, parameters, seed, version, time, duration, role, model"


@dataclass(frozen=True)
class Artifact:
    """A row of the catalog."""

    id: int
    kind: str
    path: str
    digest: str
    rows: int | None
    bytes: int | None
    command: str
    parameters: str
    seed: int
    version: str
    time: datetime
    duration: float | None
    role: str
    model: str | None


def known_paths() -> Path:
    """Return the file beside the catalog that lists the paths in it, from which a broken one is made again."""
    path = catalog_path()
    return path.with_name(f"{path.name}.paths")


@contextmanager
def connect(read_only: bool = False, problem: duckdb.Error | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the catalog for one short transaction; a broken one is made again first, from the files that it knew.

    `problem` is what was met in it while it was open. Raises ToolkitError when it cannot be opened, or stays in use by
    another process.
    """
    with opened(catalog_path(), read_only=read_only, problem=problem) as (connection, is_broken):
        if is_broken:
            _enter_known(connection)
        connection.execute("begin transaction")
        yield connection
        connection.execute("rollback" if read_only else "commit")
        if not read_only or is_broken:
            paths = connection.execute("select distinct path from artifacts order by path").fetchall()
            text, known = "".join(f"{json.dumps(path)}\n" for (path,) in paths), known_paths()
            if not known.is_file() or known.read_bytes() != text.encode():
                write_text(known, text)


def _enter_known(connection: duckdb.DuckDBPyConnection) -> None:
    """Enter the files that the lost catalog knew and that still say how they came about."""
    from .artifact import provenance_at  # which records what it makes here

    lines = known_paths().read_text(errors="replace").splitlines() if known_paths().is_file() else []
    found = 0
    for line in lines:
        try:
            path = Path(json.loads(line))
            provenance = provenance_at(path) if path.exists() else None
            if provenance is not None and provenance.content_id:
                made = datetime.fromtimestamp(path.stat().st_mtime)
                _enter(connection, _row(path, provenance, None, made), provenance)
                found += 1
        except (ToolkitError, OSError, ValueError, TypeError, RecursionError) as problem:
            console.warn(f"{line[:300]} is not entered in the catalog again: {problem}")
    console.warn(f"{found} of {len(lines)} artifacts are in the new catalog; `dinov2 catalog rebuild PATH` finds more")


def check() -> None:
    """Raise ToolkitError when nothing could be entered in the catalog; makes none."""
    path = catalog_path()
    if path.exists():
        with connect():
            return
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(there, os.W_OK):
        raise ToolkitError(f"the catalog {path} cannot be made in {there}; set DINOV2_CATALOG to where you may write")


def record(output: Path, provenance: Provenance, duration_s: float | None, *, at: datetime | None = None) -> None:
    """Enter an artifact with its inputs; numbers among its figures become its metrics. `at` is now by default."""
    row = _row(output, provenance, duration_s, at or datetime.now())
    try:
        with connect() as connection:
            _enter(connection, row, provenance)
    except duckdb.Error as problem:  # of blocks that are read when a row is entered, and not before
        with connect(problem=problem) as connection:
            _enter(connection, row, provenance)


def _row(output: Path, provenance: Provenance, duration_s: float | None, at: datetime) -> dict[str, object]:
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    model = provenance.model()
    return {
        "kind": provenance.kind,
        "path": str(output.absolute()),
        "digest": provenance.content_id,
        "rows": open_manifest(output).num_rows if output.suffix == ".parquet" else None,
        "bytes": sum(file.stat().st_size for file in files),
        "command": provenance.command,
        "parameters": json.dumps(provenance.parameters, sort_keys=True),
        "seed": provenance.seed,
        "version": provenance.version,
        "time": at,
        "duration": duration_s,
        "role": provenance.role,
        "model": model.content_id if model else None,
    }


def _enter(connection: duckdb.DuckDBPyConnection, row: dict[str, object], provenance: Provenance) -> None:
    _delete(connection, "path = ? and digest = ?", [row["path"], row["digest"]])
    insert = f"insert into artifacts ({', '.join(row)}) values ({', '.join('?' for _ in row)}) returning id"  # noqa: S608
    ((artifact,),) = connection.execute(insert, list(row.values())).fetchall()
    for source in provenance.inputs:
        connection.execute("insert into inputs values (?, ?, ?, ?)", [artifact, *astuple(source)])
    for name, value in provenance.figures.items():
        if isinstance(value, int | float):
            connection.execute("insert into metrics values (?, ?, ?)", [artifact, name, float(value)])


def _delete(connection: duckdb.DuckDBPyConnection, where: str, values: list[object]) -> None:
    for table, column in (("inputs", "artifact"), ("metrics", "artifact"), ("artifacts", "id")):
        known = f"select id from artifacts where {where}"  # noqa: S608  # a condition of ours, and so below
        connection.execute(f"delete from {table} where {column} in ({known})", values)  # noqa: S608


def forget(path: Path) -> None:
    """Remove what the catalog knows of a path."""
    with connect() as connection:
        _delete(connection, "path = ?", [str(path.absolute())])


def artifacts(where: str = "true", values: Sequence[object] = (), *, table: str = "newest") -> list[Artifact]:
    """Return the newest artifact of each path that fulfils an SQL condition, newest first; of `artifacts`, all."""
    if not catalog_path().exists():
        return []
    with connect(read_only=True) as connection:
        query = f"select {COLUMNS} from {table} where {where} order by time desc, id desc"  # noqa: S608  # a condition of ours
        return [Artifact(*row) for row in connection.execute(query, list(values)).fetchall()]


def find(name: str) -> Artifact:
    """Return the artifact with this path, else the newest of this file name, .parquet or not; ToolkitError if none."""
    known = artifacts()
    by_path = [artifact for artifact in known if artifact.path == str(Path(name).absolute())]
    by_name = [artifact for artifact in known if Path(artifact.path).name in (name, f"{name}.parquet")]
    if found := by_path or by_name:
        return found[0]
    paths = [Path(artifact.path) for artifact in known]
    near = nearest(Path(name).name, [name for path in paths for name in (path.name, path.stem)])
    raise ToolkitError(f"the catalog {catalog_path()} has no {name!r}{near}; see `dinov2 catalog list`")


def inputs() -> dict[int, list[Source]]:
    """Return what each artifact, by its id, was made from; those without inputs are missing."""
    found: dict[int, list[Source]] = {}
    with connect(read_only=True) as connection:
        rows = connection.execute("select artifact, role, path, digest from inputs").fetchall()
    for artifact, *source in rows:
        found.setdefault(artifact, []).append(Source(*source))
    return found


def inputs_of(artifact: Artifact) -> list[Source]:
    """Return what an artifact was made from."""
    return inputs().get(artifact.id, [])


def metrics_of(artifact: Artifact) -> list[tuple[str, float]]:
    """Return the numbers that were recorded with an artifact."""
    with connect(read_only=True) as connection:
        return connection.execute("select name, value from metrics where artifact = ?", [artifact.id]).fetchall()


def newest_features(role: str) -> list[Artifact]:
    """Return what a bare command may read as `role`: existing outputs of embed and dedup alone, newest first."""
    made = artifacts("role = ? and command in ('curate embed', 'curate dedup')", [role])
    return [a for a in made if a.kind in ("embeddings", "selection") and Path(a.path).exists()]


def choose(role: str) -> Path:
    """Return the newest of `newest_features(role)`. Raises ToolkitError, listing what there is, when there is none."""
    return Path(_newest(role).path)


def choose_pair() -> tuple[Path, Path]:
    """Return queries and pool for a bare `retrieve`: the newest of each, made by the same model.

    Raises ToolkitError, listing the candidates, when one is missing or the newest two come from different models.
    """
    queries, pool = _newest("queries"), _newest("pool")
    if queries.model == pool.model:
        return Path(queries.path), Path(pool.path)
    candidates = newest_features("queries")[:3] + newest_features("pool")[:3]
    listed = ", ".join(f"{a.path} ({a.role}, model {(a.model or 'unknown')[:8]})" for a in candidates)
    raise ToolkitError(f"the newest queries and pool come from two models ({listed}); name --queries and --pool")


def _newest(role: str) -> Artifact:
    if found := newest_features(role):
        return found[0]
    others = ", ".join(f"{a.path} ({a.role})" for a in artifacts("kind in ('embeddings', 'selection')")[:5])
    what = f"no manifest given, and the catalog {catalog_path()} has no manifest with role {role!r}"
    known = f"it has {others}" if others else "it is empty"
    raise ToolkitError(f"{what} ({known}); name one, or embed with --role {role}")


def newest_run() -> Path | None:
    """Return the newest finished run that still exists, the model of commands without --model."""
    runs = (Path(run.path) for run in artifacts("kind = 'run'"))
    return next((run for run in runs if (run / "model.json").exists()), None)
