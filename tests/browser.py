"""A real browser for tests of pages: fixtures that open a file in headless Chromium and let nothing wrong pass.

Every page that is opened must log no error, throw none, and ask for nothing but its own file.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REQUIRED = bool(os.environ.get("TESTS_REQUIRE_CHROMIUM"))  # set by .ci/run, where a skip would hide a failure
NARROW_PX, WIDE_PX = 390, 1280
PATIENCE_MS = 120_000  # for a page to load and draw, on a machine that runs other tests at the same time

OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="session")
def chromium() -> Iterator["Browser"]:
    """Yield a headless Chromium; skip where none is installed, fail where TESTS_REQUIRE_CHROMIUM is set."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        reason = "no Chromium here; install Debian's chromium, or Chrome"
        pytest.fail(reason) if REQUIRED else pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS, headless=True)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: "Browser") -> Iterator[OpenPage]:
    """Yield `open_page(file, width=1280, scheme="light")`, which returns the page with its charts drawn.

    After the test: fails when a page logged an error, threw one, or asked for anything but its own file.
    """
    wrong: list[str] = []
    contexts = []

    def opened(file: Path, width: int = WIDE_PX, scheme: Literal["light", "dark"] = "light") -> "Page":
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        own = file.absolute().as_uri()

        def heed(message: "ConsoleMessage") -> None:
            if message.type in ("error", "warning"):
                wrong.append(message.text)

        def check(request: "Request") -> None:
            if request.url.partition("#")[0] != own and not request.url.startswith(("data:", "blob:")):
                wrong.append(f"asked for {request.url}")

        page.on("console", heed)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", check)
        page.goto(own)
        page.wait_for_function(
            "[...document.querySelectorAll('figure.chart')].every((figure) => figure.dataset.drawn === 'yes')"
        )
        return page

    yield opened
    for context in contexts:
        context.close()
    if wrong:
        pytest.fail("; ".join(wrong))


def scrolls_sideways(page: "Page") -> bool:
    """Tell whether the page as a whole is wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))


def violations(page: "Page") -> list[str]:
    """Return what axe-core finds wrong for people who see little, or use a keyboard or a screen reader."""
    source = files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8")
    page.evaluate(source)
    found = page.evaluate("axe.run().then((results) => results.violations)")
    return [
        f"{each['id']}: {node['html'][:200]} ({node['failureSummary']})" for each in found for node in each["nodes"]
    ]
