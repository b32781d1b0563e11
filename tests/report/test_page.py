"""A whole report in a real browser: runs and scores whose names, labels and settings are markup."""

import json
import shutil
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest

from dinov2_toolkit.report.report import report
from dinov2_toolkit.store.artifact import Options
from dinov2_toolkit.store.manifest import SCORE_FIELDS, ManifestWriter, Provenance
from dinov2_toolkit.tests.browser import NARROW_PX, WIDE_PX, OpenPage, scrolls_sideways, violations
from dinov2_toolkit.tests.train.small_run import noise_images, settings
from dinov2_toolkit.train.pretrain import pretrain

MARKUP = ["<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "{{7*7}}", "\"'`${alert(1)}"]
RUNS = ["<img src=x onerror=alert(1)>", "{{7*7}} '\".[0]"]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of two runs and two files of scores."""
    here = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DINOV2_CATALOG", str(here / "catalog.duckdb"))
        patch.chdir(here)
        pretrain(noise_images(here), "run", settings("log_every=1"), Options())
        for name in RUNS:
            shutil.copytree("run", name)
        # A setting that is markup: the architecture of a run that somebody sends.
        config = Path(RUNS[1], "config.toml")
        config.write_text(config.read_text().replace('"vit_tiny"', json.dumps(MARKUP[1])))
        for file in ("one", "two"):
            write_scores(here / f"{file}.parquet")
        report([*RUNS, "one.parquet", "two.parquet"], "report.html", Options())
    return here / "report.html"


def write_scores(path: Path) -> None:
    known = {"method": "knn", "parameters": json.dumps({"k": 20}), "low": 0.4, "high": 0.7, "value": 0.5}
    known |= {"num_train": 10, "num_test": 20, "true_class": None, "predicted_class": None}
    rows: list[dict[str, object]] = []
    for model in MARKUP[:2]:
        rows.append({**known, "model": model, "metric": "top1"})
        rows += [{**known, "model": model, "metric": "recall", "true_class": name} for name in MARKUP]
        pairs = zip(MARKUP, MARKUP[1:], strict=False)
        rows += [
            {**known, "model": model, "metric": "confusion", "true_class": true, "predicted_class": predicted}
            for true, predicted in pairs
        ]
    with ManifestWriter(path, list(SCORE_FIELDS), Provenance("scores", "evaluate probe", {})) as writer:
        writer.write(pa.Table.from_pylist(rows, schema=pa.schema(SCORE_FIELDS)))


@pytest.mark.parametrize(("width", "scheme"), [(NARROW_PX, "dark"), (WIDE_PX, "light")])
def test_a_page_is_readable_for_all(
    page_file: Path, open_page: OpenPage, width: int, scheme: Literal["light", "dark"]
) -> None:
    page = open_page(page_file, width, scheme)
    assert not scrolls_sideways(page)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert not scrolls_sideways(page)
    assert violations(page) == []  # contrast, names of controls, order of headings and more


def test_names_classes_and_settings_are_words_in_tables_and_charts(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    assert page.locator("img:not([src^='data:image/'])").count() == 0
    shown = page.locator("main").inner_text() + (page.locator("main").text_content() or "")  # also what is folded
    for words in (*MARKUP, *RUNS):
        assert words in shown
    assert "49" not in page.locator("h3").all_inner_texts()
    legend = page.locator("figure.chart svg").first.text_content()
    assert legend is not None and all(name in legend for name in RUNS)
    axes = page.locator("figure.chart:has-text('taken for') svg").first.text_content() or ""
    assert all(name[:12] in axes for name in MARKUP)


def test_the_keyboard_alone_reaches_every_section_and_opens_what_is_folded(
    page_file: Path, open_page: OpenPage
) -> None:
    page = open_page(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    sections = page.locator("nav a").count()
    assert sections == 5
    for _ in range(sections):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Scores"
    page.keyboard.press("Enter")
    assert page.evaluate("Math.abs(document.querySelector('#section-5').getBoundingClientRect().top) < innerHeight")
    folded = page.locator("details:not([open]) > summary", has_text="All settings").first
    folded.focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) != "none"
    page.keyboard.press("Enter")
    assert page.locator("details[open] > summary", has_text="All settings").count() == 1


def test_charts_follow_a_page_that_turns_dark(page_file: Path, open_page: OpenPage) -> None:
    page = open_page(page_file)
    line = page.locator("figure.chart svg .mark-line path").first
    light = line.get_attribute("stroke")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "(old) => document.querySelector('figure.chart svg .mark-line path')?.getAttribute('stroke') !== old", arg=light
    )
    page.wait_for_function(
        "[...document.querySelectorAll('figure.chart')].every((figure) => figure.querySelector('svg'))"
    )
