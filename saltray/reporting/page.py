"""One self-contained HTML page: headings, facts, tables, interactive figures and pictures; it opens offline.

plotly.js stands in it once and pictures are data URIs; a content security policy has the browser refuse any
other request. Text is escaped wherever it comes from.

Colours are those of Okabe and Ito ("Color Universal Design", 2008) and cividis (Nuñez, Anderton and Renslow,
"Optimizing colormaps with consideration for color vision deficiency", 2018): the colour-blind can read them.
Orange and sky blue are darkened: marks and lines have a contrast of at least 3 to the page's white (WCAG 2.2,
1.4.11). What is told by colour is told by a symbol, a dash or a hatch as well (1.4.1).
"""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.offline import get_plotlyjs

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#BC8200", "#009E73", "#D55E00", "#CC79A7", "#4693BF"
COLOURS = [BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY]
TRUTH, PREDICTION = (0, 150, 255), (255, 150, 0)
"""Of the outlines, RGB: a blue and an orange, brighter than Okabe and Ito's to stand out from any grey."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, SOFT, _GRID = "#1b2733", "#5b6873", "#e6eaed"
_SCALE = 3  # picture pixels to a tile's pixel
_HEIGHT = 400

_AXIS = {
    "automargin": True,
    "gridcolor": _GRID,
    "linecolor": SOFT,
    "ticks": "outside",
    "tickcolor": SOFT,
    "ticklen": 4,
    "zeroline": False,
    "title": {"standoff": 10},
}
TEMPLATE = go.layout.Template(
    layout={
        "autosize": True,
        "bargap": 0.06,
        "colorscale": {"sequential": "Cividis", "sequentialminus": "Cividis", "diverging": "RdBu"},
        "colorway": COLOURS,
        "font": {"family": FONT, "size": 13, "color": INK},
        "hoverlabel": {"font": {"family": FONT, "size": 13}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "margin": {"l": 56, "r": 20, "t": 16, "b": 48},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
)
"""The house style of every figure: light, quiet, the legend above the plot."""


class Picture(NamedTuple):
    """A picture and what is to be read under it."""

    image: Image.Image | npt.NDArray[np.uint8]
    """A Pillow image, or uint8 of shape (height, width) or (height, width, 3)."""
    text: str


class Page:
    """An HTML page, written from top to bottom; what is added goes to the section begun last."""

    def __init__(self, title: str, lead: str) -> None:
        """Begin a page with its title, and a sentence that says what it shows."""
        self._title = title
        self._lead = lead
        self._sections: list[dict[str, Any]] = []
        self._figures = 0

    def section(self, title: str, text: str = "") -> None:
        """Begin a section, which the table of contents names too."""
        self._sections.append({"title": title, "text": text, "blocks": []})

    def note(self, text: str) -> None:
        """Add a paragraph."""
        self._add("note", text=text)

    def command(self, text: str) -> None:
        """Add a command line, to be copied as it is."""
        self._add("command", text=text)

    def names(self, names: Sequence[str], summary: str) -> None:
        """Add a long list of names, such as ids: folded away under its summary."""
        self._add("names", names=list(names), summary=summary)

    def facts(self, rows: Mapping[str, str]) -> None:
        """Add a list of names and values."""
        self._add("facts", rows=dict(rows))

    def table(self, frame: pd.DataFrame, caption: str) -> None:
        """Add a table of a frame's columns; what is missing gets a dash.

        Floats get four digits: of a column in [0, 1], such as of scores, behind the point.
        """
        shares = [_holds_shares(frame[c]) for c in frame.columns]
        columns = [{"name": c, "number": pd.api.types.is_numeric_dtype(frame[c])} for c in frame.columns]
        rows = [
            [_cell(value, share) for value, share in zip(row, shares, strict=True)]
            for row in frame.itertuples(index=False)
        ]
        self._add("table", columns=columns, rows=rows, caption=caption)

    def figure(self, figure: go.Figure, caption: str, min_width: int = 0) -> None:
        """Add an interactive figure in the house style, as wide as the page.

        Args:
            figure: stays as it is; on the page the caption takes the place of its title.
            caption: explains the figure in a line.
            min_width: in CSS pixels; on a narrower page the figure is scrolled in a frame of its own.
        """
        self._add("figure", html=self._html(figure), min_width=min_width, caption=caption)

    def figures(self, figures: Sequence[go.Figure], caption: str) -> None:
        """Add small figures side by side, as many as the page's width holds, with one caption for all."""
        self._add("figures", figures=[self._html(figure) for figure in figures], caption=caption)

    def pictures(self, pictures: Sequence[Picture], caption: str) -> None:
        """Add pictures side by side, as many as the page is wide; their texts keep their line breaks."""
        sources = [{"source": _data_uri(picture.image), "text": picture.text} for picture in pictures]
        self._add("pictures", pictures=sources, caption=caption)

    def write(self, file: Path) -> None:
        """Write the page in one step, in place of a file that is there already."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        template = (
            resources.files("saltray.reporting").joinpath("page.html.jinja").read_text(encoding="utf-8")
        )
        html = environment.from_string(template).render(
            title=self._title,
            lead=self._lead,
            sections=self._sections,
            font=FONT,
            has_figures=self._figures > 0,
            plotly_js=get_plotlyjs() if self._figures else "",
        )
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(html, encoding="utf-8")
        temporary.replace(file)

    def _html(self, figure: go.Figure) -> str:
        styled = go.Figure(figure).update_layout(template=TEMPLATE, title=None, width=None, autosize=True)
        if styled.layout.height is None:
            styled.update_layout(height=_HEIGHT)
        self._figures += 1
        html: str = styled.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{self._figures}",
            config={"responsive": True, "displaylogo": False},
        )
        return html

    def _add(self, kind: str, **content: Any) -> None:
        if not self._sections:
            raise ValueError(f"a page's {kind} must stand in a section: call section() first")
        self._sections[-1]["blocks"].append({"kind": kind, **content})


def overlay(
    image: npt.NDArray[np.uint8],
    truth: npt.NDArray[Any],
    prediction: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw masks over a tile, magnified three times.

    The true salt is tinted and its outline lies inside its edge; the prediction's lies outside of its own,
    so that both are seen where they agree. An edge of the tile is no outline. What is predicted without being
    salt is tinted as well.

    Args:
        image: uint8 (height, width).
        truth: the true mask, (height, width), bool or 0 and 1.
        prediction: likewise, if there is one.

    Returns:
        RGB uint8 of shape (3 height, 3 width, 3).
    """
    picture = np.repeat(_magnify(image)[:, :, None], 3, axis=2).astype(np.float64)
    salt = _magnify(truth.astype(bool))
    picture[salt] += 0.15 * (np.array(TRUTH) - picture[salt])
    picture[salt & _neighbours(~salt)] = TRUTH
    if prediction is not None:
        predicted = _magnify(prediction.astype(bool))
        wrong = predicted & ~salt
        picture[wrong] += 0.15 * (np.array(PREDICTION) - picture[wrong])
        picture[~predicted & _neighbours(predicted)] = PREDICTION
    return np.round(picture).astype(np.uint8)


def _magnify(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return pixels.repeat(_SCALE, axis=0).repeat(_SCALE, axis=1)


def _neighbours(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Tell which pixels have one of the mask at most two pixels away, corners included."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 2, mode="edge"), (5, 5))
    return np.asarray(windows.any(axis=(2, 3)))


def _data_uri(image: Image.Image | npt.NDArray[np.uint8]) -> str:
    """Encode a picture as a PNG data URI."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _holds_shares(column: pd.Series) -> bool:
    return bool(pd.api.types.is_float_dtype(column) and column.dropna().between(0, 1).all())


def _cell(value: Any, share: bool) -> str:
    if not isinstance(value, (list, tuple, dict)) and pd.isna(value):
        return "–"
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4f}" if share else f"{value:.4g}"
    return str(value)
