"""The report's figures of validation tiles: pictures of some, scores of all."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.colors
import plotly.graph_objects as go

from saltray.prediction import validation
from saltray.reporting.page import BLUE, GREEN, SOFT, Picture, overlay
from saltray.reporting.trial_figures import BUTTONS, MAP


def picture(gallery: validation.Gallery, i: int, facts: pd.DataFrame) -> Picture:
    """Draw a tile of the gallery three times, from top to bottom: as it is, with both masks, its probability.

    Args:
        gallery: of the run.
        i: the tile's place in it.
        facts: of all validation tiles, by id.
    """
    name, image, truth = str(gallery["id"][i]), gallery["image"][i], gallery["truth"][i]
    panels = [
        overlay(image, np.zeros_like(truth)),
        overlay(image, truth, gallery["prediction"][i]),
        _colour(gallery["probability"][i]),
    ]
    gap = np.full((6, panels[0].shape[1], 3), 255, np.uint8)
    tile = facts.loc[name]
    lines = [
        name,
        f"IoU {tile['iou']:.3f}, score {tile['precision']:.1f}",
        f"salt {tile['coverage']:.1%}, predicted {tile['predicted_coverage']:.1%}",
        *([f"depth {tile['z']:g}"] if np.isfinite(tile["z"]) else []),
    ]
    return Picture(np.concatenate([panels[0], gap, panels[1], gap, panels[2]]), "\n".join(lines))


def _colour(probability: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Colour probabilities, 255 for 1, in cividis, magnified like the overlay."""
    scale = plotly.colors.sample_colorscale("Cividis", 256, colortype="tuple")
    colours = np.round(255 * np.array(scale)).astype(np.uint8)
    return np.asarray(colours[probability]).repeat(3, axis=0).repeat(3, axis=1)


def threshold_curve(scores: Mapping[str, float], chosen: float) -> go.Figure:
    """Draw the validation score at every candidate threshold; keys are the thresholds as text."""
    x = [float(threshold) for threshold in scores]
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=list(scores.values()),
            mode="lines+markers",
            line={"color": BLUE},
            showlegend=False,
            hovertemplate="above %{x:.2f}: %{y:.4f}<extra></extra>",
        )
    )
    figure.add_vline(
        x=chosen, line={"color": GREEN, "width": 2}, annotation_text=f"chosen: {chosen:.2f}",
        annotation_position="bottom right" if chosen < 0.65 else "bottom left",
    )  # fmt: skip
    figure.update_xaxes(title="threshold on the probability (0 to 1)")
    return figure.update_yaxes(title=MAP).update_layout(margin=BUTTONS)


def score_by(values: npt.ArrayLike, precision: npt.ArrayLike, edges: Sequence[float], unit: str) -> go.Figure:
    """Draw the mean score of the tiles whose value lies in each class (above one edge, up to the next).

    Args:
        values: one a tile.
        precision: the contest's score of each tile.
        edges: of the classes, rising.
        unit: the axis' title.
    """
    table = pd.DataFrame({"value": np.asarray(values), "precision": np.asarray(precision)})
    classes = pd.cut(table["value"], list(edges))
    means = table.groupby(classes, observed=False)["precision"].agg(["mean", "size"])
    labels = [
        "none" if interval.right == 0 else f"{max(interval.left, 0):g}–{interval.right:g}"
        for interval in means.index
    ]
    figure = go.Figure(
        go.Bar(
            x=labels,
            y=means["mean"],
            text=means["size"],
            texttemplate="%{text}",
            textposition="outside",
            hovertemplate="%{x}: %{text} tiles, mean score %{y:.3f}<extra></extra>",
            marker={"color": BLUE},
            cliponaxis=False,
        )
    )
    figure.update_xaxes(title=unit, type="category")
    figure.update_yaxes(title="mean score of a tile (0 to 1)", range=[0, 1.08])
    return figure.update_layout(margin=BUTTONS)


def coverages(table: pd.DataFrame) -> go.Figure:
    """Draw predicted against true coverage of each validation tile, coloured by IoU."""
    figure = go.Figure()
    figure.add_scatter(
        x=[0, 100], y=[0, 100], mode="lines", line={"color": SOFT, "dash": "dot"}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        x=100 * table["coverage"], y=100 * table["predicted_coverage"], mode="markers", showlegend=False,
        marker={
            "color": table["iou"], "colorscale": "Cividis", "cmin": 0, "cmax": 1, "size": 7,
            "line": {"color": SOFT, "width": 1},
            "colorbar": {"title": {"text": "IoU"}, "thickness": 12},
        },
        text=table["id"], customdata=table["iou"],
        hovertemplate="%{text}: true %{x:.1f} %, predicted %{y:.1f} %, IoU %{customdata:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="true salt (% of the tile)", range=[-2, 102])
    figure.update_yaxes(title="predicted salt (% of the tile)", range=[-2, 102])
    return figure.update_layout(margin=BUTTONS)
