"""The catalog: a DuckDB file that knows what was made, from what, with which settings.

Losing it loses convenience only: manifests carry their own provenance, and `rebuild` restores it from them.
"""

import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from datetime import datetime
from pathlib import Path

import duckdb

from ..errors import ToolkitError
from .lock import try_lock
from .manifest import Provenance, Source, open_manifest

LOCK_PATIENCE_S = 60.0  # chosen: DuckDB lets one process write at a time; a transaction here takes milliseconds

SCHEMA = """
    create sequence if not exists artifact_ids;
    create table if not exists artifacts (
        id bigint primary key default nextval('artifact_ids'),
        kind varchar not null,          -- embeddings, selection, removed, scores, metrics, run
        path varchar not null,          -- absolute
        digest varchar not null,        -- content id
        rows bigint,
        bytes bigint,
        command varchar,
        parameters varchar,             -- JSON
        seed bigint,
        version varchar,
        time timestamp not null,
        duration double,                -- seconds
        role varchar,                   -- pool, queries or eval
        model varchar                   -- content id of the model that made the vectors
    );
    create table if not exists inputs (
        artifact bigint not null,       -- artifacts.id
        role varchar not null,
        path varchar not null,
        digest varchar not null         -- artifacts.digest of the input, where it is an artifact
    );
    create table if not exists metrics (artifact bigint not null, name varchar not null, value double);
    create or replace view newest as
        select * from artifacts qualify row_number() over (partition by path order by time desc, id desc) = 1;
"""


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


def catalog_path() -> Path:
    """Return where the catalog is: $DINOV2_CATALOG, else .dinov2/catalog.duckdb under the working folder."""
    return Path(os.environ.get("DINOV2_CATALOG") or ".dinov2/catalog.duckdb")


@contextmanager
def connect(read_only: bool = False) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open the catalog for one short transaction. Raises ToolkitError when it stays locked, or is not a catalog."""
    path = catalog_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with closing(_open_patiently(path, folder)) as connection:
            connection.execute("begin transaction")
            connection.execute(SCHEMA)
            yield connection
            connection.execute("rollback" if read_only else "commit")
    finally:
        os.close(folder)


def _open_patiently(path: Path, folder: int) -> duckdb.DuckDBPyConnection:
    """Open the catalog while this process alone holds a lock on its folder, until that is closed.

    DuckDB's own lock is not enough: a file that another process is just making has none yet.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_S
    pause_s = 0.01
    while True:
        try:
            if try_lock(folder):
                return duckdb.connect(str(path))
        except duckdb.IOException as problem:
            if "lock" not in str(problem).lower():
                raise ToolkitError(f"{path} is not a catalog; move it away and run `dinov2 catalog rebuild`") from None
        if time.monotonic() > deadline:
            raise ToolkitError(f"{path} is in use by another process; end it and try again")
        time.sleep(pause_s * (0.5 + random.random()))
        pause_s = min(2 * pause_s, 0.5)


def record(output: Path, provenance: Provenance, duration_s: float | None, *, at: datetime | None = None) -> None:
    """Enter an artifact with its inputs; numbers among its figures become its metrics. `at` is now by default."""
    files = [output] if output.is_file() else [file for file in output.rglob("*") if file.is_file()]
    model = provenance.model()
    row = {
        "kind": provenance.kind,
        "path": str(output.absolute()),
        "digest": provenance.content_id,
        "rows": open_manifest(output).num_rows if output.suffix == ".parquet" else None,
        "bytes": sum(file.stat().st_size for file in files),
        "command": provenance.command,
        "parameters": json.dumps(provenance.parameters, sort_keys=True),
        "seed": provenance.seed,
        "version": provenance.version,
        "time": at or datetime.now(),
        "duration": duration_s,
        "role": provenance.role,
        "model": model.content_id if model else None,
    }
    insert = f"insert into artifacts ({', '.join(row)}) values ({', '.join('?' for _ in row)}) returning id"
    with connect() as connection:
        _delete(connection, "path = ? and digest = ?", [row["path"], row["digest"]])
        ((artifact,),) = connection.execute(insert, list(row.values())).fetchall()
        for source in provenance.inputs:
            connection.execute("insert into inputs values (?, ?, ?, ?)", [artifact, *astuple(source)])
        for name, value in provenance.figures.items():
            if isinstance(value, int | float):
                connection.execute("insert into metrics values (?, ?, ?)", [artifact, name, float(value)])


def _delete(connection: duckdb.DuckDBPyConnection, where: str, values: list[object]) -> None:
    for table, column in (("inputs", "artifact"), ("metrics", "artifact"), ("artifacts", "id")):
        connection.execute(f"delete from {table} where {column} in (select id from artifacts where {where})", values)


def forget(path: Path) -> None:
    """Remove what the catalog knows of a path."""
    with connect() as connection:
        _delete(connection, "path = ?", [str(path.absolute())])


def artifacts(where: str = "true", values: Sequence[object] = (), *, table: str = "newest") -> list[Artifact]:
    """Return the newest artifact of each path that fulfils an SQL condition, newest first; of `artifacts`, all."""
    if not catalog_path().exists():
        return []
    with connect(read_only=True) as connection:
        rows = connection.execute(f"select * from {table} where {where} order by time desc, id desc", list(values))
        return [Artifact(*row) for row in rows.fetchall()]


def find(name: str) -> Artifact:
    """Return the artifact with this path, else the newest of this file name, .parquet or not; ToolkitError if none."""
    known = artifacts()
    by_path = [artifact for artifact in known if artifact.path == str(Path(name).absolute())]
    by_name = [artifact for artifact in known if Path(artifact.path).name in (name, f"{name}.parquet")]
    if found := by_path or by_name:
        return found[0]
    raise ToolkitError(f"the catalog {catalog_path()} has no {name!r}; see `dinov2 catalog list`")


def inputs_of(artifact: Artifact) -> list[Source]:
    """Return what an artifact was made from."""
    with connect(read_only=True) as connection:
        rows = connection.execute("select role, path, digest from inputs where artifact = ?", [artifact.id])
        return [Source(*row) for row in rows.fetchall()]


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
