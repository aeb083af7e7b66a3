"""A real browser for the tests of the pages that saltray writes."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


# Not for the whole session: Playwright's event loop runs in this thread for as long as it lives.
@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Start the system's Chromium, without a window."""
    from playwright.sync_api import sync_playwright

    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    executable = next((path for path in found if path), None)
    if executable is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with sync_playwright() as playwright:
        # Chromium's sandbox wants privileges that a container seldom has; these pages are our own.
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])


@pytest.fixture
def show(browser: "Browser") -> Iterator[Callable[[Path, int], "Page"]]:
    """Give a function that opens a file at a width in CSS pixels and waits until its figures are drawn.

    The test fails where the page says anything on the console, throws, asks for anything outside the file, or
    has to be scrolled sideways.
    """
    complaints: list[str] = []
    # How fast Chromium draws without a GPU, and what a page carries within.
    harmless = ["console: [.WebGL", "request: data:", "request: blob:"]
    pages: list[Page] = []

    def open_page(file: Path, width: int) -> "Page":
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(200_000)
        pages.append(page)
        harmless.append(f"request: {file.as_uri()}")
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("request", lambda request: complaints.append(f"request: {request.url}"))
        page.goto(file.as_uri())
        page.wait_for_function(
            "[...document.querySelectorAll('.plotly-graph-div')].every((f) => f.querySelector('.main-svg'))"
        )
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{wide} pixels wide in a window of {width}"
        return page

    yield open_page
    for page in pages:
        page.close()
    assert [complaint for complaint in complaints if not complaint.startswith(tuple(harmless))] == []
