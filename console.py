"""What people read: messages, progress and tables, all on stderr. Results go to stdout and never pass here."""

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

# Control characters, line and paragraph separators, marks of direction, and bytes of names that are not UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
LONGEST = 10_000  # chosen: characters of a message, for labels of others may have any number
RATE_SECONDS = 60.0  # chosen: the rate that is shown, and what is left by it, are of the last so many seconds
LOG_INTERVAL_S = 10.0  # chosen: how often a progress line is written where stderr is no terminal

_verbosity = 1  # 0: errors only, 1: messages, 2: details


def set_verbosity(quiet: bool, verbose: int) -> None:
    """Let only errors through when `quiet`; also details when `verbose` > 0."""
    global _verbosity
    _verbosity = 0 if quiet else 1 + verbose


def plain(text: str) -> str:
    """Return text with escapes such as \\x1b in place of what a terminal obeys: control and bidirectional marks."""
    return UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def say(message: str) -> None:
    """Write one line unless `-q` was given."""
    if _verbosity >= 1:
        _write(message)


def warn(message: str) -> None:
    """Write one line that starts with "warning:" unless `-q` was given."""
    if _verbosity >= 1:
        _write(f"warning: {message}")


def detail(message: str) -> None:
    """Write one line if `-v` was given."""
    if _verbosity >= 2:
        _write(message)


def error(message: str) -> None:
    """Write one line that starts with "error:", whatever the verbosity."""
    _write(f"error: {message}")


def _write(message: str) -> None:
    with suppress(OSError):  # nobody reads it any more, which is no reason to end the work
        print(plain(message[:LONGEST]), file=sys.stderr, flush=True)


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Draw a table; figures are right-aligned, floats shown with four digits."""
    if _verbosity < 1:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left")
    for position, name in enumerate(header):
        is_text = all(isinstance(row[position], str) for row in rows)
        drawn.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(f"{cell:.4g}" if isinstance(cell, float) else plain(str(cell))) for cell in row))
    with suppress(OSError, SystemExit):  # as in `_write`; Rich ends the process where a pipe has no reader
        Console(stderr=True, width=None if sys.stderr.isatty() else 120).print(drawn)


@contextmanager
def progress(description: str | None, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Show how far a loop is: a bar on a terminal, otherwise a line every ten seconds.

    Yields `advance(count=1, note="")`, to be called after `count` more units; `note` stands behind the rate. Nothing is
    shown without a description.
    """
    if _verbosity < 1 or description is None:
        yield lambda count=1, note="": None
        return
    done, points = 0, deque([(time.monotonic(), 0)])  # when, and how many were done then
    with (_bar if sys.stderr.isatty() else _log_lines)(description, total, unit) as show:

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            done += count
            now = time.monotonic()
            while len(points) > 1 and now - points[1][0] >= RATE_SECONDS:
                points.popleft()
            since, done_then = points[0]
            show(done, max(done - done_then, 1e-9) / max(now - since, 1e-9), note)
            if now - points[-1][0] >= RATE_SECONDS / 60:
                points.append((now, done))

        yield advance


Show = Callable[[int, float, str], None]  # takes the number done, the rate a second and a note


@contextmanager
def _bar(description: str, total: int, unit: str) -> Iterator[Show]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]}"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[note]}"),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, rate="", note="")
        yield lambda done, rate, note: bar.update(task, completed=done, rate=f"{rate:,.1f} {unit}/s", note=note)


@contextmanager
def _log_lines(description: str, total: int, unit: str) -> Iterator[Show]:
    last = time.monotonic()

    def show(done: int, rate: float, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LOG_INTERVAL_S:
            last = now
            left_s = max(total - done, 0) / rate
            text = f"{done:,} of {total:,} {unit}, {rate:,.1f} {unit}/s, {left_s:.0f} s left {note}"
            _write(f"{description}: {text}".rstrip())

    yield show
