"""How clustering changed the balance of a pool, as one page: figures, sorted sizes before and after, suspected junk."""

import html
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ... import console
from ...errors import ToolkitError
from ...store.artifact import Options
from ...store.files import write_text
from ...store.manifest import open_manifest
from ...store.vectors import Int64
from .table import FIGURES_HEADER, checked_table_path, figure_rows

LISTED = 20  # clusters of a list
LISTED_COLUMNS = ["cluster", "images", "sampled", "mean_distance", "isolation", "label", "purity"]
CURVE_POINTS = 200
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 240, 52, 34
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #fbfbf9; max-width: 1000px; margin: 2em auto }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .2em .8em; text-align: right }
th { color: #6d737a; font-weight: normal; border-bottom: 1px solid #dcdcd6 } td:first-child { text-align: left }
figure { display: inline-block; margin: 0 1em 1em 0 } figcaption { color: #6d737a }
"""
HEAD = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Clusters: '  # by which a report of ours is known
BEFORE, AFTER = "#b8bcc2", "#1f6f8b"


def check_report(report: Path, options: Options, is_made: bool) -> None:
    """Raise ToolkitError when the report must not be written: only one of ours is replaced when the work is done."""
    if report.suffix != ".html":
        raise ToolkitError(f"--report {report} does not end in .html; a report is a page: name it so")
    if report.is_dir():
        raise ToolkitError(f"--report {report} is a folder; name a file")
    if report.exists() and not options.force and not (is_made and report.read_bytes().startswith(HEAD.encode())):
        raise ToolkitError(f"{report} exists; choose another --report, or --force to overwrite it")


def write_report(path: Path, report: Path) -> None:
    """Write a page about the selection at `path`, from its figures and its cluster table.

    Raises ToolkitError when that table is missing.
    """
    provenance = open_manifest(path).provenance
    clusters = pq.read_table(checked_table_path(path), columns=["level", *LISTED_COLUMNS, "suspected"])
    assert provenance is not None  # the command wrote it
    figures = provenance.figures
    settings = ", ".join(f"{name} {value}" for name, value in provenance.parameters.items() if value is not None)
    levels = [clusters.filter(pc.field("level") == level) for level in pc.unique(clusters.column("level")).to_pylist()]
    name = html.escape(path.name)
    parts = [
        f"{HEAD}{name}</title><style>{STYLE}</style><h1>Clusters: {name}</h1>",
        f"<p>{figures.get('images', 0):,} images. {html.escape(settings)}.</p>",
        "<p>Entropy is 1 when all are of one size, 0 when one holds everything.</p>",
        _table(FIGURES_HEADER, figure_rows(figures, len(levels))),
    ]
    for level in range(1, len(levels)):
        if figures.get(f"hub_{level}"):
            parts.append(
                f"<p><b>Level {level} finds no hierarchy</b>: its largest cluster holds"
                f" {figures[f'hub_share_{level}']:.0%} of those below. Leave it out, or use --allocation flat.</p>"
            )
    parts.append("<h2>Sizes, from the largest to the smallest</h2><p>Grey: the pool. Blue: the sample.</p>")
    for level, table in enumerate(levels):
        sizes = [table.column(name).to_numpy() for name in ("images", "sampled")]
        caption = f"<figcaption>{len(table):,} clusters of level {level}</figcaption>"
        parts.append(f"<figure>{_curves(sizes)}{caption}</figure>")
    finest = levels[0].filter(pc.field("images") > 0)
    for heading, listed, order in (
        ("Tiny clusters far from all others: perhaps junk", finest.filter(pc.field("suspected")), "isolation"),
        ("The largest clusters", finest, "images"),
    ):
        if len(listed):
            listed = listed.sort_by([(order, "descending"), ("cluster", "ascending")]).slice(0, LISTED)
            rows = [list(row.values()) for row in listed.select(LISTED_COLUMNS).to_pylist()]
            parts.append(f"<h2>{heading}</h2>{_table(LISTED_COLUMNS, rows)}")
    write_text(report, f"{''.join(parts)}</html>\n")
    console.say(f"{report}: how the balance changed")


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


def _curves(curves: Sequence[Int64]) -> str:
    """Return sizes over their ranks, from the largest, both on logarithmic axes, as an SVG picture."""
    powers = [max(math.log10(most), 0.1) for most in (len(curves[0]), max(1, *(int(sizes.max()) for sizes in curves)))]
    x_scale, y_scale = (WIDTH - LEFT - 10) / powers[0], (HEIGHT - BOTTOM - 10) / powers[1]
    parts = []
    for sizes, color in zip(curves, (BEFORE, AFTER), strict=True):
        falling = np.sort(sizes[sizes > 0])[::-1]
        ranks = np.unique(np.geomspace(1, max(len(falling), 1), CURVE_POINTS).round().astype(int))[: len(falling)]
        x = LEFT + x_scale * np.log10(ranks)
        y = HEIGHT - BOTTOM - y_scale * np.log10(falling[ranks - 1])
        points = " ".join(f"{left:.1f},{top:.1f}" for left, top in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>')
    for power in range(int(powers[1]) + 1):
        top = HEIGHT - BOTTOM - y_scale * power
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{top:.1f}" y2="{top:.1f}" stroke="#dcdcd6"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{top + 4:.1f}" text-anchor="end">{10**power:,}</text>')
    for power in range(int(powers[0]) + 1):
        left = LEFT + x_scale * power
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{10**power:,}</text>')
    return f'<svg width="{WIDTH}" height="{HEIGHT}" font-size="12" fill="#6d737a">{"".join(parts)}</svg>'
