"""The page without a browser: what stands in the file, and the pictures."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from saltray.reporting.page import COLOURS, INK, PREDICTION, SOFT, TRUTH, Page, Picture, overlay
from tests.unit.contrast import LEAST, contrast

HOSTILE = """<script>alert("1")</script>'"><img src=x onerror=alert(1)>&amp;"""


class Reader(HTMLParser):
    """Collects a page's elements and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.code: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        within = self.elements[-1][0] in ("script", "style") if self.elements else False
        (self.code if within else self.texts).append(data.strip())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def full_page(text: str) -> Page:
    page = Page(text, text)
    page.section(text, text)
    page.note(text)
    page.facts({text: text})
    page.command(text)
    page.names([text, text], text)
    page.table(pd.DataFrame({text: [text], "n": [1]}), text)
    page.pictures([Picture(np.zeros((2, 3), np.uint8), text)], text)
    page.figure(go.Figure(go.Scatter(x=[1], y=[1], name=text)).update_layout(xaxis_title=text), text)
    return page


def read(page: Page, folder: Path) -> Reader:
    page.write(folder / "page.html")
    return Reader((folder / "page.html").read_text(encoding="utf-8"))


def test_the_palette_is_seen_on_white() -> None:
    assert (contrast("white"), contrast("black")) == (1, 21)
    assert contrast("#767676") == pytest.approx(4.54, abs=0.005)  # the W3C's own example of enough for text
    assert min(map(contrast, COLOURS)) >= LEAST
    assert min(map(contrast, (INK, SOFT))) >= 4.5  # text


def test_text_from_anywhere_is_escaped(tmp_path: Path) -> None:
    plain, hostile = read(full_page("plain"), tmp_path), read(full_page(HOSTILE), tmp_path)
    assert [name for name, _ in hostile.elements] == [name for name, _ in plain.elements]
    assert hostile.texts.count(HOSTILE) == plain.texts.count("plain")
    (picture,) = (attributes for name, attributes in hostile.elements if name == "img")
    assert picture.keys() == {"src", "alt"}


def test_a_screen_reader_and_the_keyboard_reach_all(tmp_path: Path) -> None:
    page = full_page("plain")
    page.figure(go.Figure(), "wide", min_width=2000)
    written = read(page, tmp_path)
    assert {a["scope"] for name, a in written.elements if name == "th"} == {"col"}
    boxes = [a for _, a in written.elements if a.get("class") == "scroll"]
    regions = [a for a in boxes if "role" in a]
    assert len(boxes) == 3
    assert len(regions) == 2  # a figure as wide as the page is not scrolled
    captions = [a["id"] for name, a in written.elements if name == "figcaption" and "id" in a]
    assert len(set(captions)) == len(captions)
    for region in regions:
        assert (region["role"], region["tabindex"]) == ("region", "0")
        assert region["aria-labelledby"] in captions
    # The text beside a picture says what it shows, and need not be heard twice.
    assert [a["alt"] for name, a in written.elements if name == "img"] == [""]


def test_nothing_is_asked_for_outside_the_file(tmp_path: Path) -> None:
    page = read(full_page("plain"), tmp_path)
    links = [
        (a, v or "") for _, attributes in page.elements for a, v in attributes.items() if a in ("src", "href")
    ]
    assert len(links) == 3
    assert [link for link in links if not link[1].startswith(("data:", "#"))] == []
    style = next(code for code in page.code if "--ink" in code)
    assert not re.search(r"url\(|@import", style)
    policy = next(
        a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_plotly_stands_in_the_page_once_and_only_where_needed(tmp_path: Path) -> None:
    page = Page("Page", "Lead")
    page.section("One")
    page.note("text")
    assert read(page, tmp_path).count("script") == 0
    page.figure(go.Figure(), "first")
    page.figure(go.Figure(), "second")
    written = read(page, tmp_path)
    assert sum(len(code) > 1_000_000 for code in written.code) == 1
    identifiers = [a["id"] for _, a in written.elements if a.get("class") == "plotly-graph-div"]
    assert identifiers == ["figure-1", "figure-2"]


def test_contents_name_the_sections_and_lead_to_them(tmp_path: Path) -> None:
    page = Page("Page", "Lead")
    for title in ("One", "Two", "One"):
        page.section(title)
    elements = read(page, tmp_path).elements
    links = [a["href"] for name, a in elements if name == "a"]
    assert links == [f"#{a['id']}" for name, a in elements if name == "section"]
    assert len(set(links)) == 3


def test_a_figure_is_styled_on_the_page_alone(tmp_path: Path) -> None:
    figure = go.Figure(go.Scatter(x=[1], y=[2])).update_layout(title="Title", width=5000)
    before = figure.to_json()
    page = Page("Page", "Lead")
    page.section("One")
    page.figure(figure, "caption")
    assert figure.to_json() == before
    script = next(code for code in read(page, tmp_path).code if "newPlot" in code and len(code) < 100_000)
    assert "Title" not in script
    assert "5000" not in script


def test_cells(tmp_path: Path) -> None:
    frame = pd.DataFrame({"f": [0.123456, np.nan], "i": [12345, -1], "s": ["0.123456", None]})
    page = Page("Page", "Lead")
    page.section("One")
    page.table(frame, "caption")
    written = read(page, tmp_path)
    cells = written.texts[written.texts.index("f") :]
    assert [text for text in cells if text] == ["f", "i", "s", "0.1235", "12,345", "0.123456", "–", "-1", "–"]
    assert [a.get("class") for name, a in written.elements if name == "th"] == ["number", "number", None]


def test_pictures_are_kept_to_the_pixel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    page = Page("Page", "Lead")
    page.section("One")
    page.pictures([Picture(pixels, "array"), Picture(Image.fromarray(pixels), "image")], "caption")
    sources = [a["src"] or "" for name, a in read(page, tmp_path).elements if name == "img"]
    assert len(sources) == 2
    for source in sources:
        png = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), pixels)


def test_a_page_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    for title in ("First", "Second"):
        page = Page(title, "Lead")
        page.write(tmp_path / "page.html")
        assert f"<h1>{title}</h1>" in (tmp_path / "page.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_content_without_a_section_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"a page's note must stand in a section"):
        Page("Page", "Lead").note("text")


def outline(mask: npt.NDArray[np.bool_], inside: bool) -> npt.NDArray[np.bool_]:
    """Walk over the magnified pixels: those within two of the other side."""
    large = np.kron(mask, np.ones((3, 3), int)).astype(bool)
    height, width = large.shape
    line = np.zeros_like(large)
    for y in range(height):
        for x in range(width):
            around = large[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            line[y, x] = large[y, x] == inside and bool((around != inside).any())
    return line


def test_outlines_lie_on_either_side_of_the_masks_edges() -> None:
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (12, 9), dtype=np.uint8)
    truth, prediction = rng.random((2, 12, 9)) < np.array([0.7, 0.3])[:, None, None]
    picture = overlay(image, truth, prediction)
    assert picture.shape == (36, 27, 3)
    assert picture.dtype == np.uint8
    predicted = outline(prediction, inside=False)
    assert (picture[predicted] == PREDICTION).all()
    assert (picture[outline(truth, inside=True) & ~predicted] == TRUTH).all()
    rest = ~predicted & ~np.kron(truth, np.ones((3, 3), int)).astype(bool)
    wrong = rest & np.kron(prediction, np.ones((3, 3), int)).astype(bool)
    grey = np.kron(image, np.ones((3, 3), np.uint8))[:, :, None]
    tinted = np.round(0.85 * grey + 0.15 * np.array(PREDICTION))
    assert (picture[wrong] == tinted[wrong]).all()  # predicted, but no salt
    assert (picture[rest & ~wrong] == grey[rest & ~wrong]).all()


def test_both_outlines_are_seen_where_the_masks_agree_and_none_at_the_tiles_edge() -> None:
    image = np.full((10, 10), 128, np.uint8)
    mask = np.zeros((10, 10), np.uint8)
    mask[:, 6:] = 1
    picture = overlay(image, mask, mask)
    row = [tuple(int(value) for value in pixel) for pixel in picture[15]]
    assert [i for i, pixel in enumerate(row) if pixel == PREDICTION] == [16, 17]
    assert [i for i, pixel in enumerate(row) if pixel == TRUTH] == [18, 19]
    assert row[29] == row[22]  # tinted, not outlined
    assert (overlay(image, np.zeros_like(mask)) == 128).all()
