"""The reports in a real browser."""

from collections.abc import Callable
from pathlib import Path

import playwright.sync_api
import plotly.graph_objects as go
import pytest

from saltray import demo, explore
from saltray.reporting.page import Page

Show = Callable[[Path, int], playwright.sync_api.Page]
WIDTHS = [1280, 390]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explore")
    data = demo.write(folder, demo.files(train=60, test=20, seed=0))
    (data / "train" / "images" / "train000003.png").write_bytes(b"damaged")
    explore.main(str(data), out=str(folder / "explore.html"), seed=0)
    return folder / "explore.html"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_explored_data_are_drawn(report: Path, show: Show, width: int) -> None:
    page = show(report, width)
    titles = [
        *("At a glance", "Coverage", "Depth", "Tiles and their masks", "Odd masks"),
        *("Black and equal images", "The split", "Bad tiles"),
    ]
    assert page.locator("h2").all_inner_texts() == titles
    assert page.locator("nav a").all_inner_texts() == titles
    figures = page.locator(".plotly-graph-div")
    assert figures.count() == 6
    for i in range(6):
        figure = figures.nth(i)
        assert figure.locator("text.xtitle").count() == figure.locator("text.ytitle").count() == 1
        box = figure.bounding_box()
        assert box is not None
        assert 300 < box["width"] <= width
    pictures = page.locator(".pictures img")
    assert pictures.count() > 10
    assert pictures.evaluate_all("(all) => all.every((image) => image.naturalWidth === 303)")
    assert "train000003" in page.locator("section").last.inner_text()


def test_a_figure_follows_the_window(report: Path, show: Show) -> None:
    page = show(report, 1280)
    page.set_viewport_size({"width": 600, "height": 900})
    page.wait_for_function("document.querySelector('.plotly-graph-div .main-svg').clientWidth < 600")
    assert page.evaluate("document.documentElement.scrollWidth") <= 600


@pytest.mark.parametrize("width", WIDTHS)
def test_a_wide_figure_is_scrolled_alone_and_webgl_is_let_in(tmp_path: Path, show: Show, width: int) -> None:
    page = Page("Page", "Lead.")
    page.section("Parallel coordinates")
    lines = go.Parcoords(dimensions=[{"label": name, "values": [1, 2, 3]} for name in "abcdef"])
    page.figure(go.Figure(lines), "Six axes.", min_width=720)
    page.write(tmp_path / "page.html")
    shown = show(tmp_path / "page.html", width)
    assert shown.locator(".plotly-graph-div").evaluate("(figure) => figure.clientWidth") >= 720
    assert shown.locator(".parcoords .axis-title").all_text_contents() == list("abcdef")


def test_hostile_text_stays_text(tmp_path: Path, show: Show) -> None:
    hostile = (
        "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
    )
    page = Page(hostile, hostile)
    page.section(hostile, hostile)
    page.facts({hostile: hostile})
    page.names([hostile], hostile)
    figure = go.Figure(go.Scatter(x=[1, 2], y=[1, 2], name=hostile, showlegend=True, hovertext=hostile))
    page.figure(figure.update_layout(xaxis_title=hostile, yaxis_title=hostile), hostile)
    page.write(tmp_path / "page.html")
    shown = show(tmp_path / "page.html", 1280)
    assert shown.title() == hostile
    assert shown.locator("h1").inner_text() == hostile
    assert shown.locator("img").count() == 0
