"""The report of a search in a real browser."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import playwright.sync_api
import pytest
from optuna.trial import TrialState

from saltray import report
from saltray.quiet import quiet
from tests.runs import START, make_run, make_trial

Show = Callable[[Path, int], playwright.sync_api.Page]

FIGURES = {
    "Salt, depth and score": 3, "Threshold": 1, "Training of the best": 1, "History of the best": 1,
    "Learning curves": 1, "Parallel coordinates": 1, "Importance of the parameters": 1,
    "Score by parameter": 3, "Timeline": 1,
}  # fmt: skip
POINTS = {"History of the best": 13, "Score by parameter": 13 + 5 + 13}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    complete = [
        make_trial(
            TrialState.COMPLETE,
            [0.4, 0.5 + i / 50, 0.6 + i / 100],
            rate=10.0 ** (-1 - i % 4),
            blocks=1 + i % 4,
        )
        for i in range(5)
    ]
    stopped = [
        make_trial(
            TrialState.PRUNED, [0.39, 0.4 + i / 100], host="node-b", start=START + timedelta(minutes=i)
        )
        for i in range(8)
    ]
    failed = make_trial(TrialState.FAIL, [], reason="the loss is nan in epoch 1")
    folder = make_run(tmp_path_factory.mktemp("full"), [*complete, *stopped, failed], predicted=True)
    with quiet(None):
        return report.write(folder)


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_is_drawn_and_labelled(full: Path, show: Show, width: int) -> None:
    page = show(full, width)
    assert page.locator("h2").all_inner_texts() == page.locator("nav a").all_inner_texts()
    for title, count in FIGURES.items():
        section = page.locator("section", has=page.locator(f"h2:text-is('{title}')"))
        figures = section.locator(".plotly-graph-div")
        assert figures.count() == count, title
        assert section.locator("figcaption").count() > 0
        for figure in figures.all():
            box = figure.bounding_box()
            assert box is not None
            assert box["height"] > 150
            if title != "Parallel coordinates":  # it names each axis below it, and may be scrolled
                assert box["width"] <= width
                assert figure.locator("text.xtitle, text.x3title").count() == 1, title
                assert figure.locator("text.ytitle").count() == 1, title
        if title in POINTS:
            assert section.locator(".scatterlayer .point").count() == POINTS[title]
    pictures = page.locator(".pictures img")
    assert pictures.count() > 10
    assert pictures.evaluate_all("(all) => all.every((image) => image.naturalWidth === 303)")


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_of_nothing_is_a_page(tmp_path: Path, show: Show, width: int) -> None:
    with quiet(None):
        page = show(report.write(make_run(tmp_path, [])), width)
    assert page.locator(".plotly-graph-div").count() == 0
    assert page.locator("section p", has_text="Nothing yet").count() > 8
