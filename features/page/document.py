"""A whole page as one string: sections under one title, styles, scripts, and no way to a network."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from io import TextIOWrapper
from pathlib import Path

from jinja2 import Environment, FunctionLoader
from markupsafe import Markup

from ...errors import ToolkitError
from ...store.files import open_regular, write_text
from ...store.json_text import json_object
from ...store.manifest import Provenance, provenance_from, provenance_values, toolkit_version

CHART_SCRIPTS = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js", "charts.js")
PROVENANCE_NAME = "dinov2-toolkit"  # of the meta tag
SNIFFED = 4_000_000  # characters in which the meta tag must stand


@dataclass(frozen=True)
class Section:
    """A section of a page: its title, and parts as `parts.py` makes them."""

    title: str
    parts: Sequence[Markup]


def render(
    title: str,
    sections: Sequence[Section],
    *,
    note: str = "",
    provenance: Provenance | None = None,
    scripts: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> str:
    """Return a page that needs no other file and reaches no network.

    Args:
        title, note: heading of the page, and a line below it.
        sections: what it shows, in order; the navigation lists them.
        provenance: how it came about; `page_provenance` reads it back.
        scripts, styles: JavaScript and CSS of the caller's own, besides those of the charts and of the page.
    """
    charts = CHART_SCRIPTS if any('<figure class="chart">' in part for each in sections for part in each.parts) else ()
    sources = [*map(asset, charts), *scripts]
    if any("</script" in source.lower() or "<!--" in source for source in sources):
        raise ValueError("a script that holds </script or <!-- would end too early")
    values = None if provenance is None else provenance_values(replace(provenance, version=toolkit_version()))
    return (
        environment()
        .get_template("base.html")
        .render(
            title=title,
            note=note,
            sections=sections,
            policy=_policy(sources),
            provenance=None if values is None else json.dumps(values, sort_keys=True),
            styles=[Markup(style) for style in (asset("page.css"), *styles)],  # noqa: S704  # files of ours
            scripts=[Markup(source) for source in sources],  # noqa: S704  # files of ours
            made_by=f"Made by dinov2-toolkit {toolkit_version()}. This file holds all that it shows.",
        )
    )


def _policy(scripts: Sequence[str]) -> str:
    """Return the content security policy: these very scripts, images from the file itself, nothing from elsewhere."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'"


@cache
def environment() -> Environment:
    """Return the templates; all that they are given is escaped unless it is Markup."""
    folder = files(__package__) / "templates"
    return Environment(loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")), autoescape=True)


@cache
def asset(name: str) -> str:
    """Return a script or style of this folder, without the name of its source map, which is not here."""
    text = (files(__package__) / "assets" / name).read_text("utf-8")
    return text.partition("//# sourceMappingURL=")[0]


def check_page_name(output: str) -> Path:
    """Return the output as a path. Raises ToolkitError when it does not end in .html, or is a folder."""
    if not output.endswith(".html"):
        raise ToolkitError(f"output {output!r} does not end in .html; a page is an HTML file: name it so")
    if Path(output).is_dir():
        raise ToolkitError(f"output {output} is a folder; name an HTML file")
    return Path(output)


def write_page(page: str, path: Path) -> None:
    """Write a page: beside its place first, then renamed."""
    write_text(path, page)


def page_provenance(path: Path) -> Provenance | None:
    """Return how a page came about, None where it is not ours."""
    reader = _Meta()
    try:
        with TextIOWrapper(open_regular(path), "utf-8") as file:
            reader.feed(file.read(SNIFFED).partition("</head>")[0])
    except (OSError, UnicodeDecodeError):
        return None
    try:
        return None if reader.content is None else provenance_from(json_object(reader.content), path)
    except (ValueError, KeyError, TypeError):
        return None


class _Meta(HTMLParser):
    """Finds the meta tag with the provenance."""

    content: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "meta" and values.get("name") == PROVENANCE_NAME:
            self.content = values.get("content")
