"""What a section of a page is made of: text, key figures, tables, charts, pictures. All that comes in is escaped."""

import math
from collections.abc import Mapping, Sequence
from typing import Any  # of a template, and of a Vega-Lite specification

from markupsafe import Markup

from .document import environment
from .thumbnail import Thumbnail

NOTHING = "–"  # for a value that there is not


def _macro(name: str, *values: object) -> Markup:
    module: Any = environment().get_template("parts.html").module
    return Markup(getattr(module, name)(*values))


def text(words: str) -> Markup:
    """Return a paragraph."""
    return _macro("text", words)


def note(words: str) -> Markup:
    """Return a paragraph that says what is missing or to be kept in mind."""
    return _macro("note", words)


def heading(words: str) -> Markup:
    """Return a heading within a section."""
    return _macro("heading", words)


def key_figures(figures: Mapping[str, object]) -> Markup:
    """Return the few values that matter most, side by side; numbers are formatted by `number`."""
    return _macro("key_figures", [(name, number(value)) for name, value in figures.items()])


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """Return a table that scrolls within itself where it is too wide; columns of numbers are right-aligned.

    The first column names the rows. Markup in a cell stays as it is.
    """
    numeric = [
        any(_is_number(row[place]) for row in rows)
        and all(_is_number(row[place]) or row[place] is None for row in rows)
        for place in range(len(header))
    ]
    return _macro("table", caption, header, [[number(cell) for cell in row] for row in rows], numeric)


def details(summary: str, parts: Sequence[Markup], *, is_open: bool = False) -> Markup:
    """Return parts that stay folded under a line until it is clicked."""
    return _macro("details", summary, parts, is_open)


def side_by_side(parts: Sequence[Markup]) -> Markup:
    """Return parts in two columns where there is room."""
    return _macro("side_by_side", parts)


def chart(title: str, spec: Mapping[str, Any], numbers: Markup, *, explanation: str = "") -> Markup:
    """Return a chart by a Vega-Lite specification, such as those of `chart.py`.

    Args:
        title, explanation: what it shows in a few words, and a sentence for those who do not know it.
        spec: the specification; its `description` is what a screen reader says of the chart.
        numbers: the same numbers as a `table`, folded below the chart.
    """
    return _macro("chart", title, explanation, {"description": title, **spec}, numbers)


def figure(title: str, picture: Thumbnail, *, explanation: str = "") -> Markup:
    """Return one picture with its caption; what cannot be read is a note."""
    if picture.source is None:
        return note(f"{title}: {picture.reason}.")
    return _macro("figure", title, explanation, picture)


def gallery(label: str, pictures: Sequence[Thumbnail]) -> Markup:
    """Return thumbnails in rows; `label` says to a screen reader what they are."""
    return _macro("gallery", label, pictures)


def number(value: object) -> object:
    """Return a value as text for people: whole numbers with separators, others with four digits; text as it is."""
    if value is None:
        return NOTHING
    if not _is_number(value):
        return value
    assert isinstance(value, int | float)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
