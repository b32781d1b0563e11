"""The catalog's database file: one process at a time opens it, brings its layout up to date, and mends it."""

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path

import duckdb

from .. import console
from ..errors import ToolkitError
from .lock import try_lock

# DuckDB would fetch an extension from its server for a name such as 's3://…' or 'x.xlsx'.
OFFLINE: dict[str, bool | int | float | str | list[str]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
LOCK_PATIENCE_S = 60.0  # chosen: DuckDB lets one process write at a time; a transaction here takes milliseconds
CORRUPT = re.compile(
    "not a valid DuckDB database|Corrupt database file|Could not read enough bytes|replaying WAL|erializ|INTERNAL Error"
    "|FATAL Error|(Binder|Catalog) Error|sqlite"
)
MAGIC = b"DUCK"  # of every DuckDB file, behind its first checksum
NEWER_DUCKDB = re.compile("version number|newer version of DuckDB")

MIGRATIONS = (  # in order; a catalog records which it has had. Never change one, add another
    """
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
        select id, kind, path, digest, rows, bytes, command, parameters, seed, version, time, duration, role, model
        from artifacts qualify row_number() over (partition by path order by time desc, id desc) = 1;
    """,
)
WHOLE = (  # reads every block, whose checksums DuckDB compares, and fails where a column is missing
    "select bit_xor(hash(id, kind, path, digest, rows, bytes, command, parameters, seed, version, time, duration, role,"
    " model)) from artifacts",
    "select bit_xor(hash(artifact, role, path, digest)) from inputs",
    "select bit_xor(hash(artifact, name, value)) from metrics",
)


class Broken(Exception):
    """The file is no catalog any more; the text says how that shows."""


@contextmanager
def opened(
    path: Path, *, read_only: bool = False, problem: duckdb.Error | None = None
) -> Iterator[tuple[duckdb.DuckDBPyConnection, bool]]:
    """Open a catalog, made when missing; yield it, and whether it is empty because the file there was broken.

    The broken file is renamed, never removed; one that was never a database stays. Only `read_only` opens a file that
    may not be written, and finds an empty catalog where there is none. `problem` is what was met in an open catalog.

    Raises ToolkitError when it cannot be opened, stays in use by another process, comes from a newer toolkit, or is
    another database.
    """
    if read_only and not path.exists():
        with closing(duckdb.connect(config=OFFLINE)) as connection:
            _migrate(connection, path, False)
            yield connection, False
        return
    folder = _lockable_folder(path)
    try:
        _wait_for(path, folder)
        is_broken = False
        try:
            if problem is not None:
                raise translated(path, problem)
            connection = _connect(path, read_only)
        except Broken as reason:
            if path.suffix != ".duckdb" and path.read_bytes()[8:12] != MAGIC:
                raise ToolkitError(f"{path} is no catalog; set DINOV2_CATALOG to another, or move it away") from None
            aside = path.with_name(f"{path.name}.broken-{datetime.now():%Y%m%d-%H%M%S-%f}")
            wal = path.with_name(f"{path.name}.wal")
            if wal.exists():
                wal.rename(f"{aside}.wal")
            path.rename(aside)
            console.warn(f"the catalog {path} was broken ({reason}); it is now {aside}, and a new one is made")
            connection, is_broken = _connect(path, False), True
        with closing(connection):
            yield connection, is_broken
    finally:
        os.close(folder)


def _lockable_folder(path: Path) -> int:
    """Return the open folder of a catalog, which is made when missing."""
    for file in (path, path.with_name(f"{path.name}.wal")):
        if file.exists() and not file.is_file():
            raise ToolkitError(f"the catalog's {file} is no regular file; set DINOV2_CATALOG to another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path.parent, os.O_RDONLY)
    except OSError as problem:
        raise _not_opened(path, problem.strerror) from None


def _wait_for(path: Path, folder: int) -> None:
    """Return when this process alone holds a lock on the folder, until that is closed.

    DuckDB's own lock is not enough: a file that another process is just making has none yet.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_S
    pause_s = 0.01
    while not try_lock(folder):
        pause_s = _pause(path, pause_s, deadline)


def _pause(path: Path, pause_s: float, deadline: float) -> float:
    if time.monotonic() > deadline:
        raise ToolkitError(f"{path} is in use by another process; end it and try again")
    time.sleep(pause_s * (0.5 + random.random()))  # noqa: S311  # no secret
    return min(2 * pause_s, 0.5)


def _connect(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    """Return the open catalog in its present layout, read whole. Raises Broken when it is no catalog any more."""
    is_new = not path.exists()
    read_only = read_only and not os.access(path, os.W_OK)
    if not is_new:
        try:
            path.open("rb" if read_only else "r+b").close()
        except OSError as problem:
            raise _not_opened(path, problem.strerror) from None
    deadline, pause_s = time.monotonic() + LOCK_PATIENCE_S, 0.01
    while True:
        try:
            # An absolute name: md:x would be taken for a database in the cloud.
            connection = duckdb.connect(str(path.absolute()), read_only, OFFLINE)
            break
        except duckdb.Error as problem:  # another program may have it open, such as DuckDB's own
            if not str(problem).startswith("IO Error: Could not set lock on file"):
                raise translated(path, problem) from None
        pause_s = _pause(path, pause_s, deadline)
    try:
        _migrate(connection, path, read_only)
        for query in WHOLE:
            connection.execute(query).fetchall()
    except BaseException as problem:
        connection.close()
        raise (translated(path, problem) if isinstance(problem, duckdb.Error) else problem) from None
    return connection


def translated(path: Path, problem: duckdb.Error) -> Exception:
    """Return what DuckDB's error means: Broken, or a ToolkitError that says what to do."""
    reason = " ".join(str(problem).replace(str(path.absolute()), path.name).split())
    if NEWER_DUCKDB.search(reason):
        return ToolkitError(f"the catalog {path} was written by a newer DuckDB ({reason}); update duckdb")
    return Broken(reason) if CORRUPT.search(reason) else _not_opened(path, reason)


def _not_opened(path: Path, reason: str | None) -> ToolkitError:
    return ToolkitError(f"the catalog {path} cannot be opened ({reason}); mend that, or set DINOV2_CATALOG to another")


def layout(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    """Return how many of MIGRATIONS a catalog has had.

    Raises ToolkitError when it comes from a newer toolkit, or is another database.
    """
    known = "select table_name from duckdb_tables() where not internal"
    names = {str(name) for (name,) in connection.execute(known).fetchall()}
    if names and "artifacts" not in names:
        raise ToolkitError(f"{path} is a database, but no catalog (it has {min(names)}); set DINOV2_CATALOG to another")
    done: int = 0
    if "migrations" in names:
        done = connection.execute("select coalesce(max(number), 0) from migrations").fetchall()[0][0]
    if done > len(MIGRATIONS):
        what = f"the catalog {path} has layout {done}, and this toolkit knows up to {len(MIGRATIONS)}"
        raise ToolkitError(f"{what}; set DINOV2_CATALOG to another, or update the toolkit")
    return done


def _migrate(connection: duckdb.DuckDBPyConnection, path: Path, read_only: bool) -> None:
    """Bring the layout up to date, one recorded step after the other."""
    done = layout(connection, path)
    if done == len(MIGRATIONS) or read_only:
        return
    connection.execute("begin transaction")
    connection.execute("create table if not exists migrations (number bigint primary key, time timestamp not null)")
    for number, statements in enumerate(MIGRATIONS[done:], done + 1):
        connection.execute(statements)
        connection.execute("insert into migrations values (?, ?)", [number, datetime.now()])
    connection.execute("commit")
