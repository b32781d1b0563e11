"""How clustering changed the balance of a pool, as one page: figures, sorted sizes before and after, suspected junk."""

import html
import os
from collections.abc import Sequence
from math import log10
from pathlib import Path

import duckdb

from ... import console
from ...errors import ToolkitError
from ...store import tables
from ...store.artifact import Options
from ...store.manifest import Provenance, open_manifest
from .sheet import checked_table_path

LISTED = 20  # clusters of a list
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 240, 52, 34
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #fbfbf9; max-width: 1000px; margin: 2em auto }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; text-align: right }
th { color: #6d737a; font-weight: normal; border-bottom: 1px solid #dcdcd6 } td:first-child { text-align: left }
figure { display: inline-block; margin: 0 1em 1em 0 } figcaption { color: #6d737a }
"""
HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Clusters: '  # by which a report of ours is known
BEFORE, AFTER = "#b8bcc2", "#1f6f8b"

GROUPS = """
    select level, count(*) from read_parquet($clusters)
    group by level order by level
"""
SORTED = """
    with ranked as (
        select {column} as size, row_number() over (order by {column} desc) as place from read_parquet($clusters)
        where level = $level and images > 0
    )
    select place, size from ranked where size > 0 and
        (place <= 20 or floor(ln(place) * 30) > floor(ln(place - 1) * 30) or place = (select max(place) from ranked))
    order by place
"""
LIST = """
    select cluster, images, sampled, round(mean_distance, 4), round(isolation, 4), label, round(purity, 3)
    from read_parquet($clusters) where level = 0 and {condition} order by {order}, cluster limit $count
"""


def check_report(report: Path, options: Options, is_made: bool) -> None:
    """Raise ToolkitError when a report could not stand at `report`, or something is there before the work is done."""
    if report.suffix != ".html":
        raise ToolkitError(f"--report {report} does not end in .html; a report is a page: name it so")
    if report.is_dir():
        raise ToolkitError(f"--report {report} is a folder; name a file")
    if report.exists() and not options.force and not (is_made and _is_ours(report)):
        raise ToolkitError(f"{report} exists; choose another --report, or --force to overwrite it")


def _is_ours(report: Path) -> bool:
    with report.open("rb") as file:
        return file.read(len(HEAD)) == HEAD.encode()


def write_report(path: Path, report: Path) -> None:
    """Write a page about the selection at `path`, from its figures and its cluster table.

    Raises ToolkitError when that table is missing.
    """
    selection = open_manifest(path)
    clusters = checked_table_path(path)
    with tables.connect() as connection:
        body = _body(connection, clusters, selection.provenance)
    page = (
        f"{HEAD}{html.escape(path.name)}</title>"
        f"<style>{STYLE}</style><h1>Clusters: {html.escape(path.name)}</h1>{body}</html>\n"
    )
    report.parent.mkdir(parents=True, exist_ok=True)
    temporary = report.with_name(f".{report.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page)
        os.replace(temporary, report)
    finally:
        temporary.unlink(missing_ok=True)
    console.say(f"{report}: how the balance changed")


def _body(connection: duckdb.DuckDBPyConnection, clusters: Path, provenance: Provenance | None) -> str:
    figures = {} if provenance is None else provenance.figures
    settings = {} if provenance is None else provenance.parameters
    given = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    parts = [f"<p>{figures.get('images', 0):,} images. {html.escape(given)}.</p>"]
    levels = connection.execute(GROUPS, {"clusters": str(clusters)}).fetchall()
    rows: list[list[object]] = []
    for level, _ in levels:
        names = ("clusters", "empty", "smallest", "median", "largest", "entropy", "sample_entropy", "purity", "nmi")
        rows.append([f"cluster_{level}", *(figures.get(f"{name}_{level}") for name in names)])
    if "class_entropy" in figures:
        sizes = [figures.get(f"class_{name}") for name in ("smallest", "median", "largest")]
        entropies = [figures["class_entropy"], figures["sample_class_entropy"]]
        rows.append(["label", figures.get("classes"), None, *sizes, *entropies, None, None])
    header = ["", "number", "empty", "smallest", "median", "largest", "entropy", "of the sample", "purity", "NMI"]
    parts.append("<p>Entropy is 1 when all are of one size, 0 when one holds everything.</p>")
    parts.append(_table(header, rows))
    for level, _ in levels:
        if level and figures.get(f"hub_{level}"):
            parts.append(
                f"<p><b>Level {level} finds no hierarchy</b>: its largest cluster holds"
                f" {figures[f'hub_share_{level}']:.0%} of those below, whose mean has length"
                f" {figures[f'hub_norm_{level}']:.2f}; clusters put together are more alike than any two by a cosine of"
                f" {figures[f'grouping_{level}']:.2f}. Leave it out, or share out by --allocation flat.</p>"
            )
    parts.append("<h2>Sizes, from the largest to the smallest</h2><p>Grey: the pool. Blue: what was taken of it.</p>")
    for level, number in levels:
        curves = [
            connection.execute(SORTED.format(column=column), {"clusters": str(clusters), "level": level}).fetchall()
            for column in ("images", "sampled")
        ]
        caption = f"{number:,} clusters of level {level}"
        parts.append(f"<figure>{_curves(curves)}<figcaption>{caption}</figcaption></figure>")
    header = ["cluster", "images", "taken", "mean distance", "isolation", "label", "purity"]
    for title, condition, order in (
        ("Tiny clusters far from all others: perhaps junk", "suspected", "isolation desc"),
        ("The largest clusters", "images > 0", "images desc"),
    ):
        query = LIST.format(condition=condition, order=order)
        found = connection.execute(query, {"clusters": str(clusters), "count": LISTED}).fetchall()
        if found:
            parts.append(f"<h2>{title}</h2>{_table(header, found)}")
    return "".join(parts)


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = "".join(f"<tr>{''.join(f'<td>{_cell(value)}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _curves(curves: Sequence[Sequence[tuple[int, int]]]) -> str:
    """Return sizes over places, both on logarithmic axes, as an SVG picture."""
    far = max(log10(max((place for curve in curves for place, _ in curve), default=1)), 0.1)
    high = max(log10(max((size for curve in curves for _, size in curve), default=1)), 0.1)
    parts = []
    for curve, colour in zip(curves, (BEFORE, AFTER), strict=True):
        points = " ".join(
            f"{LEFT + log10(place) / far * (WIDTH - LEFT - 10):.1f},"
            f"{HEIGHT - BOTTOM - log10(size) / high * (HEIGHT - BOTTOM - 10):.1f}"
            for place, size in curve
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
    for power in range(int(high) + 1):
        y = HEIGHT - BOTTOM - power / high * (HEIGHT - BOTTOM - 10)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dcdcd6"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10**power:,}</text>')
    for power in range(int(far) + 1):
        x = LEFT + power / far * (WIDTH - LEFT - 10)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10**power:,}</text>')
    return f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="12" fill="#6d737a">{"".join(parts)}</svg>'
