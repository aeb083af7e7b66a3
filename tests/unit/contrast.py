"""Whether what is drawn on white can be seen."""

from collections.abc import Iterator

import plotly.graph_objects as go
from PIL import ImageColor

LEAST = 3.0
"""Of graphics, WCAG 2.2, success criterion 1.4.11."""


def contrast(colour: str, opacity: float = 1) -> float:
    """Return a CSS colour's contrast to white, over which it lies: 1 to 21.

    See https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio.
    """
    parts = [1 - opacity + opacity * value / 255 for value in ImageColor.getrgb(colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def contrasts(figure: go.Figure) -> Iterator[float]:
    """Yield the contrast of each line, and of each trace's marks: of what they are filled or edged with."""
    for trace in figure.data:
        kind, opacity = trace.mode if trace.type == "scatter" else "markers", trace.opacity or 1
        if "lines" in kind and trace.line.color:
            yield contrast(trace.line.color, opacity)
        if "markers" in kind:
            marker = trace.marker
            known = [c for c in (marker.color, marker.line.color) if isinstance(c, str)]
            seen = [contrast(colour, opacity * (marker.opacity or 1)) for colour in known]
            if marker.colorscale:
                seen.append(min(contrast(colour) for _, colour in marker.colorscale))
            yield max(seen, default=LEAST)  # without a colour of its own it has one of the page's
    yield from (contrast(shape.line.color) for shape in figure.layout.shapes)
