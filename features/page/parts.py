"""What a section of a page is made of: text, key figures, tables, charts, pictures. All that comes in is escaped."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal  # Any: of a template, and of a Vega-Lite specification

from markupsafe import Markup

from .document import environment
from .thumbnail import Thumbnail

Branch = tuple[str, str, Sequence["Branch"]]  # a name, a remark, and what stands below it
FORMATTED = re.compile(r"[-−+]?\d[\d,]*(\.\d+)?( ?(%|h|min|s|px|[KMG]i?B))?")
NOTHING = "–"  # for a value that there is not


def _macro(name: str, *values: object) -> Markup:
    module: Any = environment().get_template("parts.html").module
    made: Markup = getattr(module, name)(*values)
    return made


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
    columns = [[row[place] for row in rows] for place in range(len(header))]
    numeric = [any(map(_stands_right, cells)) and all(map(_may_stand_right, cells)) for cells in columns]
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


def gallery(label: str, pictures: Sequence[Thumbnail], *, size: Literal["", "small", "wide"] = "") -> Markup:
    """Return thumbnails in rows; `label` says to a screen reader what they are. Wide ones are as wide as two."""
    return _macro("gallery", label, pictures, size)


def tree(branches: Sequence[Branch]) -> Markup:
    """Return lists within lists."""
    return _macro("tree", branches)


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


def _stands_right(value: object) -> bool:
    """Tell whether a cell is a number, or one that the caller has formatted, such as "12.5 %"."""
    return _is_number(value) or (isinstance(value, str) and FORMATTED.fullmatch(value) is not None)


def _may_stand_right(value: object) -> bool:
    return value in (None, NOTHING) or _stands_right(value)
