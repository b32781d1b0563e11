"""Tables larger than memory: DuckDB with a limit, spilling to the cache, and rows that stream through it.

Queries may name a list of names as `lines('names.txt')`: a table of its lines, in one column.
"""

import hashlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ToolkitError
from .cache import cache_folder
from .database import OFFLINE
from .files import remove, temporary_name
from .manifest import ROW_GROUP_ROWS, Manifest, Source, open_manifest
from .memory import SMALLEST, memory_budget
from .renamed import COLUMNS

MOST_BYTES = 512 << 20  # measured: millions of names are sorted no faster with more
BATCH_ROWS = 4 * ROW_GROUP_ROWS  # rows at a time
QUOTED = re.compile(r"""'((?:[^']|'')+)'|"((?:[^"]|"")+)\"""")  # DuckDB takes a column's quotes for a file's too
LIST_NAME = re.compile(r"""\blines\(\s*'([^']+)'\s*\)""")
stopped: list[Exception] = []  # what ended a stream that DuckDB was reading, which would tell it as text
LINES = """
    create macro lines(file) as table
    select line from (select rtrim(unnest(string_split(content, chr(10))), chr(13)) as line from read_text(file))
    where line <> ''
"""
WRITING = frozenset(
    "copy insert update delete merge truncate create drop alter attach detach install load set reset pragma call use"
    " export import vacuum checkpoint prepare execute".split()
)
EXPLAIN = re.compile(r"^\s*explain\s+(analyze\s+)?", re.IGNORECASE)
NOTHING = re.compile("(?!)")
READING = {  # of types of statements other than SELECT, which `describe`, `show` and `from` are too: those that read
    "MULTI": re.compile(r"\bpivot\b", re.IGNORECASE),
    "PRAGMA": re.compile(
        r"^\s*pragma\s+(table_info|show_tables|show_tables_expanded|show|database_list|database_size|version)\b",
        re.IGNORECASE,
    ),
}
PATTERNS = re.compile(r"[*?[]")  # what DuckDB takes for other characters in a file's name


@contextmanager
def connect(memory: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an empty database that takes at most half of `memory` bytes (None: of the default) and spills the rest.

    What a `stream` raises while the database reads it is raised by the block as it was.
    """
    stopped.clear()
    budget = memory_budget(None) if memory is None else memory
    connection = duckdb.connect(config=OFFLINE)
    spill = cache_folder().absolute() / temporary_name()
    try:
        connection.execute("set memory_limit = ?", [f"{min(max(budget // 2, SMALLEST), MOST_BYTES)}B"])
        connection.execute("set temp_directory = ?", [str(spill)])
        connection.execute(LINES)
        connection.execute("set python_enable_replacements = false")
        with _interrupted_by_signals(connection):
            yield connection
    except duckdb.Error:
        if stopped:
            raise stopped.pop() from None
        raise
    finally:
        connection.close()
        remove(spill)


@contextmanager
def _interrupted_by_signals(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Have a signal end the query that runs, for which Python's own handlers wait."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may ask for it
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    def interrupt() -> None:
        while ours.recv(1):
            connection.interrupt()

    watch = threading.Thread(target=interrupt, name="interrupt", daemon=True)
    watch.start()
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        watch.join()
        ours.close()


def select(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyRelation:
    """Return the answer of a query that only reads.

    Raises ToolkitError for other statements, for several, and as `restrict` does.
    """
    # What is explained by `explain analyze` is done, too.
    kinds = [statement.type.name for statement in connection.extract_statements(EXPLAIN.sub("", query))]
    is_reading = kinds == ["SELECT"] or (len(kinds) == 1 and READING.get(kinds[0], NOTHING).search(query) is not None)
    if not is_reading:
        found = ", ".join(kinds) or "nothing"
        raise ToolkitError(f"{query!r} is not one statement that reads ({found}); only reading is allowed")
    restrict(connection, query)
    return connection.sql(with_literal_names(query))


def restrict(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    """Lock the settings of a connection, which keep it from the network, before it runs what a user wrote.

    Raises ToolkitError for statements in parentheses that write, for names of pipes, which would hang, and of missing
    lists.
    """
    if (verb := _writing_part(query)) is not None:
        raise ToolkitError(f"{query!r} has a part that writes ({verb}); only reading is allowed")
    for name in _quoted_names(query):
        for path in (glob(name) if PATTERNS.search(name) else ()) or [name]:
            if os.path.lexists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                raise ToolkitError(f"{path} is no regular file; name another")
    named_lists(query)
    connection.execute("set lock_configuration = true")


def _writing_part(query: str) -> str | None:
    """Return the verb of a statement that writes, as in `with x as (copy ... to 'file') from x`; None without one."""
    data = query.encode()
    tokens = [(data[start:], kind) for start, kind in duckdb.tokenize(query) if kind != duckdb.token_type.comment]
    for (before, _), (text, kind), (after, _) in zip(tokens, tokens[1:], tokens[2:], strict=False):
        word = re.match(rb"\w*", text)
        verb = word[0].decode().lower() if word else ""
        is_column = after[:1] in (b")", b",")  # such as sum(copy)
        if before[:1] == b"(" and kind == duckdb.token_type.keyword and verb in WRITING and not is_column:
            return verb
    return None


def _quoted_names(query: str) -> list[str]:
    """Return what stands in quotes, once each."""
    return list(dict.fromkeys(map(_unquoted, QUOTED.finditer(query))))


def _unquoted(found: re.Match[str]) -> str:
    return found[1].replace("''", "'") if found[1] else found[2].replace('""', '"')


def stream(schema: pa.Schema, tables: Iterable[pa.Table]) -> pa.RecordBatchReader:
    """Return tables as one stream that DuckDB reads once, holding no more than it works on."""

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for table in tables:
                yield from table.to_batches()
        except Exception as problem:
            stopped.append(problem)
            raise

    return pa.RecordBatchReader.from_batches(schema, batches())


def literal_name(path: Path) -> str:
    """Return a file's name as DuckDB must be told it, so that it reads this file and no other.

    Raises ToolkitError for the few names that cannot be told.
    """
    name = str(path.absolute())
    if PATTERNS.search(name) and "\\" in name:
        raise ToolkitError(f"{path} has both a backslash and one of * ? [ in its name, a pattern to SQL; rename it")
    return PATTERNS.sub(r"[\g<0>]", name)


def scan(path: Path, *options: str) -> str:
    """Return the SQL that reads this very file, whatever its name or that of its folder looks like."""
    return f"read_parquet({', '.join([_quoted(path), 'hive_partitioning = false', *options])})"


def _quoted(path: Path) -> str:
    return "'" + literal_name(path).replace("'", "''") + "'"


def with_literal_names(query: str) -> str:
    """Return a query in which every 'file.parquet' and lines('file') that exists means this file alone."""

    def literal(name: re.Match[str]) -> str:
        path = Path(_unquoted(name))
        if path.suffix != ".parquet" or not path.exists():
            return name[0]
        is_argument = name.string[: name.start()].rstrip().endswith("(")
        # DuckDB would take a folder `width=9` for a column.
        return f"(from {scan(path)})" if "=" in str(path.parent.absolute()) and not is_argument else _quoted(path)

    lists = {name: literal_name(Path(name)) for name in LIST_NAME.findall(query) if Path(name).exists()}
    query = LIST_NAME.sub(lambda list_: list_[0].replace(list_[1], lists.get(list_[1], list_[1])), query)
    return QUOTED.sub(literal, query)


def named_manifests(query: str) -> list[Manifest]:
    """Open every 'file.parquet' that a query names, each once."""
    return [open_manifest(Path(name)) for name in _quoted_names(query) if name.endswith(".parquet")]


def named_lists(query: str) -> list[Source]:
    """Return every list that a query names by `lines('file')` as an input of a step, each once.

    Raises ToolkitError when there is no such file, which DuckDB would take for an empty one.
    """
    lists = []
    for name in dict.fromkeys(LIST_NAME.findall(query)):
        path = Path(name)
        if not path.is_file():
            raise ToolkitError(f"no list at {name}, which the query names; check the path")
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        lists.append(Source("list", str(path.absolute()), digest))
    return lists


def answer(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    """Yield what DuckDB streams; what goes wrong after the first rows is a duckdb.Error as well."""
    try:
        yield from reader
    except (OSError, pa.ArrowInvalid) as problem:
        raise duckdb.Error(str(problem)) from None


def failure(problem: duckdb.Error) -> str:
    """Return what DuckDB says in one line, without the advice to load an extension, which is not allowed."""
    return " ".join(str(problem).partition("Please try installing")[0].split())


def rows_where(manifest: Manifest, condition: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows that fulfil an SQL condition, rising: one int64 column. ToolkitError when DuckDB refuses it."""
    start = 0
    names = manifest.names()
    present = {old: new for old, new in COLUMNS.items() if new in names and old not in names}
    # A renamed column answers to its old name and its present one, whichever the file has.
    aliases = "".join(
        f', "{old}" as "{new}"' if new in manifest.old_names else f', "{new}" as "{old}"'
        for old, new in present.items()
    )
    with connect() as connection:
        restrict(connection, condition)
        for part in manifest.parts:
            # The condition stands in lines of its own, so that a comment in it ends there too.
            query = f"""
                select file_row_number + {start} as found
                from (select *{aliases} from {scan(part, "file_row_number = true")})
                where (
                {with_literal_names(condition)}
                )
                order by 1
            """  # noqa: S608  # the user's own SQL, which only reads
            try:
                if (num := len(connection.extract_statements(query))) != 1:  # it closed the parenthesis
                    raise ToolkitError(f"--where {condition!r} makes {num} statements; give one condition in SQL")
                yield from answer(connection.sql(query).to_arrow_reader(BATCH_ROWS))
            except duckdb.Error as problem:
                what = f"--where {condition!r} cannot be asked of {manifest.path} ({failure(problem)})"
                columns = ", ".join(manifest.names())
                raise ToolkitError(f"{what}; give a condition in SQL over its columns ({columns})") from None
            start += pq.read_metadata(part).num_rows
