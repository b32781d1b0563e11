"""Pages in a real browser: nothing runs that comes from data, everything can be reached and read."""

import json
import re
from pathlib import Path

import pytest
from markupsafe import Markup
from PIL import Image

from dinov2_toolkit.errors import ToolkitError
from dinov2_toolkit.features.page import chart, parts
from dinov2_toolkit.features.page.document import (
    Section,
    asset,
    check_page_name,
    page_provenance,
    render,
    write_page,
)
from dinov2_toolkit.features.page.thumbnail import thumbnail, thumbnails
from dinov2_toolkit.store.manifest import Provenance, Source
from dinov2_toolkit.tests.browser import NARROW_PX, OpenPage, scrolls_sideways

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "{{7*7}}",
    "a\"b'c",
    "<!--",
    "x.y[0]'s",
]
PROVENANCE = Provenance("page", "report", {"targets": HOSTILE}, inputs=(Source("run", HOSTILE[0], "id"),))


def full_page(tmp_path: Path) -> Path:
    """Write a page with one part of each kind, all of hostile words."""
    red = Image.new("RGB", (300, 200), "red")
    points = [{"step": step, "loss": 1.0 / (step + 1), "run": name} for name in HOSTILE for step in range(3)]
    header = ["run", "step", "loss"]
    numbers = parts.table("Losses", header, [[point["run"], point["step"], point["loss"]] for point in points])
    wide = parts.table("Wide", [f"column {place}" for place in range(30)], [[1234.5] * 30])
    pictures = [thumbnail(red, alt=name, caption=name, mark=name) for name in HOSTILE]
    pictures += thumbnails([(str(tmp_path / "gone.png"), "gone", "")])
    shown = [
        parts.text(HOSTILE[0]),
        parts.key_figures(dict.fromkeys(HOSTILE, 1)),
        parts.chart("Loss", chart.lines(points, x="step", y="loss", series="run"), numbers, explanation=HOSTILE[1]),
        wide,
        parts.details(HOSTILE[0], [parts.note(HOSTILE[1])]),
        parts.gallery(HOSTILE[0], pictures),
        parts.figure(HOSTILE[0], pictures[0]),
    ]
    sections = [Section(name, shown if name == HOSTILE[0] else [parts.text(name)]) for name in HOSTILE]
    path = tmp_path / "page.html"
    write_page(render(HOSTILE[1], sections, note=HOSTILE[0], provenance=PROVENANCE), path)
    return path


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_from_data_stay_words(tmp_path: Path, open_page: OpenPage, scheme: str) -> None:
    page = open_page(full_page(tmp_path), NARROW_PX, scheme)
    assert page.title() == HOSTILE[1]
    assert page.locator("h2").all_inner_texts() == HOSTILE
    assert page.locator("img:not([src^='data:'])").count() == 0
    assert page.locator("figure.chart svg").count() == 1
    shown = page.locator("figure.chart svg").inner_html()
    assert "{{7*7}}" in shown and "&lt;img src=x" in shown
    assert not scrolls_sideways(page)


@pytest.mark.browser
def test_a_chart_names_columns_with_dots_and_brackets(tmp_path: Path, open_page: OpenPage) -> None:
    rows = [{"a.b[0]'s": step, 'c."d': 2.0 * step} for step in range(5)]
    drawn = parts.chart("Dots", chart.lines(rows, x="a.b[0]'s", y='c."d'), parts.table("", ["a.b[0]"], []))
    path = tmp_path / "page.html"
    write_page(render("Dots", [Section("one", [drawn])]), path)
    line = open_page(path).locator("figure.chart svg .mark-line path").first.get_attribute("d")
    assert line is not None and line.count("L") == 4


@pytest.mark.browser
def test_every_kind_of_chart_is_drawn(tmp_path: Path, open_page: OpenPage) -> None:
    rows = [{"name": name, "value": value, "side": side} for name in "ab" for value, side in ((1, "x"), (2, "y"))]
    none = parts.table("", ["a"], [])
    specs = [
        chart.bars(rows[:2], name="side", value="value"),
        chart.bars(rows, name="name", value="value", series="side"),
        chart.histogram([0, 0.5, 1], [3, 4], x="similarity"),
        chart.heatmap(rows, x="side", y="name", value="value"),
    ]
    path = tmp_path / "page.html"
    write_page(render("Kinds", [Section("one", [parts.chart("c", spec, none) for spec in specs])]), path)
    page = open_page(path)
    marks = [page.locator("figure.chart").nth(place).locator("svg .mark-rect path").count() for place in range(4)]
    assert marks == [2, 4, 2, 4]


@pytest.mark.browser
def test_the_keyboard_reaches_links_tables_and_details(tmp_path: Path, open_page: OpenPage) -> None:
    page = open_page(full_page(tmp_path))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + ' ' + document.activeElement.className").strip())
    assert {"A", "DIV scroll", "SUMMARY"} <= reached
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


def test_only_our_own_scripts_may_run_and_charts_bring_theirs(tmp_path: Path) -> None:
    plain = render("a", [Section("b", [parts.text("c")])])
    assert "<script>" not in plain and "script-src &#39;none&#39;" in plain and len(plain) < 20_000
    page = full_page(tmp_path).read_text()
    assert page.count("<script>") == 4 and "unsafe-eval" not in page and "sourceMappingURL=" not in page
    assert re.search(r"default-src &#39;none&#39;|default-src 'none'", page)
    data = re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert [row["c"] for row in json.loads(data[0])["data"]["values"]][::3] == HOSTILE


def test_a_script_that_would_end_early_is_refused() -> None:
    with pytest.raises(ValueError, match="too early"):
        render("a", [], scripts=["'</script>'"])
    assert "/* own */" in render("a", [], scripts=["/* own */"], styles=["p > a {}"])


def test_a_page_says_how_it_came_about(tmp_path: Path) -> None:
    there = page_provenance(full_page(tmp_path))
    assert there is not None and there.same_work(PROVENANCE)
    (tmp_path / "other.html").write_text("<!doctype html><title>theirs</title>")
    (tmp_path / "binary.html").write_bytes(bytes(range(256)))
    assert page_provenance(tmp_path / "other.html") is None
    assert page_provenance(tmp_path / "binary.html") is None
    assert page_provenance(tmp_path / "none.html") is None


def test_a_page_is_an_html_file(tmp_path: Path) -> None:
    assert check_page_name("a.html") == Path("a.html")
    (tmp_path / "folder.html").mkdir()
    for name in ("a.png", str(tmp_path / "folder.html")):
        with pytest.raises(ToolkitError):
            check_page_name(name)


def test_numbers_are_formatted_alike() -> None:
    values = [1234567, 0.123456, 12345.6, None, "1e3", True, float("nan")]
    assert [parts.number(value) for value in values] == ["1,234,567", "0.1235", "12,346", "–", "1e3", True, "nan"]
    drawn = parts.table("t", ["name", "value"], [["a", 1.0], ["b", None]])
    assert drawn.count('class="number"') == 3  # one heading, two cells
    assert isinstance(drawn, Markup) and Markup("<b>") not in parts.text("<b>")


def test_thumbnails_are_small_and_say_what_cannot_be_read(tmp_path: Path) -> None:
    Image.effect_noise((2000, 1000), 60).save(tmp_path / "large.png")
    Image.new("RGB", (28, 28), "red").save(tmp_path / "tiny.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    names = [tmp_path / f"{name}.png" for name in ("large", "tiny", "broken", "gone")]
    large, tiny, broken, gone, none = thumbnails([*((str(name), name.stem, "") for name in names), (None, "", "")])
    assert (large.width, large.height, large.is_tiny) == (128, 64, False)
    assert (tiny.width, tiny.height, tiny.is_tiny) == (28, 28, True)
    assert (
        large.source is not None and large.source.startswith("data:image/webp;base64,") and len(large.source) < 12_000
    )
    assert broken.source is None and broken.reason and gone.source is None and gone.reason
    assert none.reason == "no uri"


@pytest.mark.usefixtures("odd_format")
def test_an_image_whose_decoder_crashes_is_one_that_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "crash").write_bytes(b"ODD crash")
    Image.new("RGB", (28, 28), "red").save(tmp_path / "good.png")
    crash, good = thumbnails([(str(tmp_path / name), name, "") for name in ("crash", "good.png")])
    assert (crash.source, crash.reason) == (None, "its decoder crashed, or took more memory than there is")
    assert good.source is not None


def test_the_vendored_scripts_name_version_and_licence() -> None:
    licence = asset("LICENSE-vega.txt")
    assert "University of Washington Interactive Data Lab" in licence and "Redistribution and use" in licence
    for name, version in re.findall(r"^(\S+\.min\.js) +\S+ ([\d.]+)", licence, re.MULTILINE):
        assert f'"{version}"' in asset(name)
