"""Vega-Lite specifications of the charts that pages have in common; `parts.chart` draws them.

Rows are given under the names that people read. In a specification their columns are a, b, c in the order of the
arguments, since Vega takes dots, brackets and quotes in a name for a path.
Source: https://vega.github.io/vega-lite/docs/
"""

from collections.abc import Mapping, Sequence
from typing import Any  # a specification is JSON

Spec = dict[str, Any]
Rows = Sequence[Mapping[str, object]]
HEIGHT_PX = 220
BAR_PX, GROUPED_BAR_PX = 20, 12


def lines(
    points: Rows,
    *,
    x: str,
    y: str,
    series: str | None = None,
    order: Sequence[str] | None = None,
    log: bool = False,
    limit: float | None = None,
    band: tuple[str, str] | None = None,
) -> Spec:
    """Return lines over a number, one for each value of `series`.

    Args:
        points: rows that have the columns named by the others; a null `y` is a gap.
        x, y, series: names of columns, which are also the titles of the axes.
        order: all values of `series`, so that each has the same colour in several charts.
        log: a logarithmic y axis; all values must be above 0.
        limit: where a dashed line stands, such as the edge of what is healthy.
        band: columns with the lowest and highest value that a point stands for, drawn as an area.
    """
    columns = _columns(x, y, series, *(band or ()))
    encoding: Spec = {
        "x": {
            **columns[x],
            "type": "quantitative",
            "scale": {"zero": False, "nice": False},
            "axis": {"tickCount": 6},
        },
        # The figure's caption says what the y axis is.
        "y": {
            **columns[y],
            "type": "quantitative",
            "scale": {"type": "log"} if log else {"zero": False},
            "axis": {"title": None},
        },
        "tooltip": list(columns.values()),
    }
    if series is not None:
        own: Spec = {**columns[series], "type": "nominal", "sort": None, "legend": {"title": None}}
        own |= {} if order is None else {"scale": {"domain": list(order)}}
        encoding |= {"color": own, "strokeDash": own}
    mark = {"type": "line", "point": {"size": 24} if len(points) <= 40 else {"size": 40, "opacity": 0}}
    layers: list[Spec] = [{"mark": mark, "encoding": encoding}]
    if band is not None:
        low, high = (columns[name]["field"] for name in band)
        area: Spec = {name: encoding[name] for name in ("x", "color") if name in encoding}
        area |= {"y": {**encoding["y"], "field": low}, "y2": {"field": high}}
        layers.insert(0, {"mark": {"type": "area", "aria": False}, "encoding": area})
    if limit is not None:
        rule = {"mark": {"type": "rule", "strokeDash": [2, 4], "aria": False}, "encoding": {"y": {"datum": limit}}}
        layers.append(rule)
    return _spec(points, columns, {"layer": layers} if len(layers) > 1 else layers[0])


def bars(rows: Rows, *, name: str, value: str, series: str | None = None) -> Spec:
    """Return horizontal bars, one a row, in the order of the rows; with `series` grouped by it."""
    columns = _columns(name, value, series)
    encoding: Spec = {
        "y": {**columns[name], "type": "nominal", "sort": None},
        "x": {**columns[value], "type": "quantitative"},
        "tooltip": list(columns.values()),
    }
    if series is not None:
        own = {**columns[series], "type": "nominal", "sort": None}
        legend = {"title": None, "symbolType": "square", "symbolSize": 120}  # filled as the bars; lines have strokes
        encoding |= {"color": {**own, "legend": legend}, "yOffset": own}
    bar_px = BAR_PX if series is None else GROUPED_BAR_PX
    return _spec(rows, columns, {"mark": "bar", "encoding": encoding}, height_px=bar_px * len(rows))


def intervals(rows: Rows, *, name: str, value: str, low: str, high: str, series: str) -> Spec:
    """Return a point and an interval a row, grouped by name and coloured by `series`; null bounds draw no interval."""
    columns = _columns(name, value, low, high, series)
    own = {**columns[series], "type": "nominal", "sort": None}
    place: Spec = {
        "y": {**columns[name], "type": "nominal", "sort": None, "axis": {"title": None, "grid": True}},
        "yOffset": own,
        "color": {**own, "legend": {"title": None}},
        "tooltip": list(columns.values()),
    }
    start: Spec = {**columns[low], "type": "quantitative", "title": value, "scale": {"zero": False}}
    start["axis"] = {"tickCount": 8}
    bounds: Spec = {"x": start, "x2": {"field": columns[high]["field"]}}
    rule = {"mark": {"type": "rule", "strokeWidth": 2}, "encoding": {**place, **bounds}}
    point_x = {**columns[value], "type": "quantitative"}
    point = {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 1}, "encoding": {**place, "x": point_x}}
    num_names, num_series = (len({row[each] for row in rows}) for each in (name, series))
    return _spec(rows, columns, {"layer": [rule, point]}, height_px=(GROUPED_BAR_PX * num_series + 14) * num_names)


def histogram(edges: Sequence[float], counts: Sequence[int], *, x: str, y: str = "images") -> Spec:
    """Return a histogram of counts between edges, one more edge than counts."""
    rows = [{"from": low, "to": high, y: count} for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    columns = _columns("from", "to", y)
    encoding: Spec = {
        "x": {**columns["from"], "type": "quantitative", "title": x, "bin": {"binned": True}},
        "x2": {"field": columns["to"]["field"]},
        "y": {**columns[y], "type": "quantitative"},
        "tooltip": list(columns.values()),
    }
    return _spec(rows, columns, {"mark": "bar", "encoding": encoding})


def heatmap(cells: Rows, *, x: str, y: str, value: str, order: Sequence[str] | None = None, side_px: int = 22) -> Spec:
    """Return a matrix of cells coloured by a value from 0 up; missing cells stay empty.

    `order` is that of both axes.
    """
    columns = _columns(x, y, value)
    scale: Spec = {} if order is None else {"domain": list(order)}
    encoding: Spec = {
        "x": {**columns[x], "type": "nominal", "sort": None, "scale": scale},
        "y": {**columns[y], "type": "nominal", "sort": None, "scale": scale},
        "color": {**columns[value], "type": "quantitative", "legend": None},
        "tooltip": list(columns.values()),
    }
    num_rows = len({cell[y] for cell in cells} if order is None else order)
    return _spec(cells, columns, {"mark": "rect", "encoding": encoding}, height_px=side_px * num_rows)


def _columns(*names: str | None) -> dict[str, Spec]:
    """Return a reference to each column by its name, None left out."""
    given = [name for name in names if name is not None]
    return {name: {"field": letter, "title": name} for name, letter in zip(given, "abcde", strict=False)}


def _spec(rows: Rows, columns: Mapping[str, Spec], drawn: Spec, height_px: int = HEIGHT_PX) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": height_px,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": [{column["field"]: row[name] for name, column in columns.items()} for row in rows]},
        **drawn,
    }
