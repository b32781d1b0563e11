"""Vega-Lite specifications of the charts that pages have in common; `parts.chart` draws them.

Source: https://vega.github.io/vega-lite/docs/
"""

from collections.abc import Mapping, Sequence
from typing import Any  # a specification is JSON

Spec = dict[str, Any]
HEIGHT_PX = 220


def lines(
    points: Sequence[Mapping[str, object]], *, x: str, y: str, series: str | None = None, log: bool = False
) -> Spec:
    """Return lines over a number, one for each value of `series`.

    Args:
        points: rows that have the columns named by the others; a null `y` is a gap.
        x, y, series: names of columns, which are also the titles of the axes.
        log: a logarithmic y axis; all values must be above 0.
    """
    scale: Spec = {"type": "log"} if log else {"zero": False}
    encoding: Spec = {
        "x": _axis(x, "quantitative", scale={"zero": False, "nice": False}),
        "y": _axis(y, "quantitative", scale=scale),
        "tooltip": [_column(name) for name in ((series,) if series else ()) + (x, y)],
    }
    if series:
        encoding["color"] = {**_column(series), "type": "nominal", "sort": None}
        encoding["strokeDash"] = {**_column(series), "type": "nominal", "sort": None, "legend": None}
    mark = {"type": "line", "point": {"size": 24} if len(points) <= 40 else {"size": 40, "opacity": 0}}
    return _spec(points, {"mark": mark, "encoding": encoding})


def bars(rows: Sequence[Mapping[str, object]], *, name: str, value: str, series: str | None = None) -> Spec:
    """Return horizontal bars, one a row, in the order of the rows; with `series` grouped by it."""
    encoding: Spec = {
        "y": {**_axis(name, "nominal"), "sort": None},
        "x": _axis(value, "quantitative"),
        "tooltip": [_column(each) for each in (name, *((series,) if series else ()), value)],
    }
    step = 20
    if series:
        encoding["color"] = {**_column(series), "type": "nominal", "sort": None}
        encoding["yOffset"] = {**_column(series), "type": "nominal", "sort": None}
        step = 12
    return _spec(rows, {"mark": "bar", "encoding": encoding}, height_px=step * len(rows))


def histogram(edges: Sequence[float], counts: Sequence[int], *, x: str, y: str = "images") -> Spec:
    """Return a histogram of counts between edges, one more edge than counts."""
    rows = [{"from": low, "to": high, y: count} for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    encoding: Spec = {
        "x": {"field": "from", "type": "quantitative", "title": x, "bin": {"binned": True}},
        "x2": {"field": "to"},
        "y": _axis(y, "quantitative"),
        "tooltip": [{"field": each} for each in ("from", "to", y)],
    }
    return _spec(rows, {"mark": "bar", "encoding": encoding})


def heatmap(cells: Sequence[Mapping[str, object]], *, x: str, y: str, value: str, side_px: int = 18) -> Spec:
    """Return a matrix of cells coloured by a value from 0 up; missing cells stay empty."""
    encoding: Spec = {
        "x": {**_axis(x, "nominal"), "sort": None},
        "y": {**_axis(y, "nominal"), "sort": None},
        "color": {**_column(value), "type": "quantitative", "legend": None},
        "tooltip": [_column(each) for each in (y, x, value)],
    }
    num_rows = len({cell[y] for cell in cells})
    return _spec(cells, {"mark": "rect", "encoding": encoding}, height_px=side_px * num_rows)


def _spec(rows: Sequence[Mapping[str, object]], drawn: Spec, height_px: int = HEIGHT_PX) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height_px,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        **drawn,
    }


def _axis(name: str, kind: str, **settings: object) -> Spec:
    return {**_column(name), "type": kind, **settings}


def _column(name: str) -> Spec:
    """Return a reference to a column; Vega reads dots and brackets in a name as a path unless escaped."""
    escaped = "".join(f"\\{letter}" if letter in ".[]\\" else letter for letter in name)
    return {"field": escaped, "title": name}
