"""The page that tells what the data hold, before any model is trained on them."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from saltray.config import NEIGHBOURS, TILE, Split
from saltray.data import survey
from saltray.data.survey import CLASSES, TINY, Survey
from saltray.reporting.page import BLUE, ORANGE, SKY, Page, Picture, overlay

_PER_CLASS = 6  # pictures of each coverage class
_ODD = 18  # pictures of a kind of odd mask
_DEPTH_STEP = 50
_DEPTH = "depth z (unit as in depths.csv)"
_COVERAGE = "coverage (% of the tile's area)"


def build(data: Survey, uri: str, seed: int, split: Split = "coverage") -> Page:
    """Build the report; `uri`, `seed` and `split` are those that the tiles were read with."""
    page = Page(
        f"Seismic tiles in {uri.rstrip('/').rpartition('/')[2]}",
        f"{len(data.labelled):,} labelled and {len(data.test):,} test tiles of {TILE} × {TILE} pixels: how "
        "much salt they hold and how deep, which of them are odd, and whether the validation tiles are like "
        "the training tiles.",
    )
    _add_facts(page, data, uri, seed)
    _add_coverage(page, data)
    _add_depth(page, data)
    _add_gallery(page, data)
    _add_odd_masks(page, data)
    _add_odd_images(page, data)
    _add_split(page, data, seed, split)
    _add_bad_tiles(page, data)
    return page


def depth_figure(depths: Mapping[str, pd.Series]) -> go.Figure:
    """Draw how each named group of tiles spreads over the depths, in per cent of the group."""
    groups = {name: z for name, z in depths.items() if len(z)}
    steps = pd.concat(groups.values()) // _DEPTH_STEP
    edges = np.arange(steps.min(), steps.max() + 2) * _DEPTH_STEP
    figure = go.Figure()
    for (name, z), colour, dash in zip(groups.items(), (BLUE, ORANGE), ("solid", "dash"), strict=False):
        share = np.histogram(z, bins=edges)[0] * 100 / len(z)
        figure.add_scatter(
            x=edges,
            y=[*share, share[-1]],
            name=f"{name} ({len(z):,} tiles)",
            line={"shape": "hv", "color": colour, "dash": dash},
            hovertemplate="%{y:.1f} % from z %{x}",
            mode="lines",
        )
    return figure.update_layout(
        xaxis_title=_DEPTH, yaxis={"title": {"text": "tiles (%)"}, "rangemode": "tozero"}, showlegend=True
    )


def salt_by_depth(tiles: pd.DataFrame) -> go.Figure:
    """Draw the share of tiles with any salt by depth, with its standard error."""
    bins = survey.depth_bins(tiles)
    figure = go.Figure()
    figure.add_scatter(
        x=bins["z"],
        y=bins["salt"] * 100,
        error_y={"array": bins["error"] * 100, "color": BLUE, "thickness": 1.2},
        customdata=bins["tiles"],
        hovertemplate="z %{x:.0f}: %{y:.1f} % of %{customdata} tiles<extra></extra>",
        mode="lines+markers",
    )
    return figure.update_layout(
        xaxis_title=_DEPTH, yaxis={"title": {"text": "tiles with any salt (%)"}, "rangemode": "tozero"}
    )


def coverage_by_depth(salt: pd.DataFrame) -> go.Figure:
    """Draw the coverage of the tiles with salt against their depth, and its quartiles by depth range."""
    bins = survey.depth_bins(salt)
    figure = go.Figure()
    figure.add_scatter(
        x=salt["z"],
        y=salt["coverage"] * 100,
        customdata=salt["id"],
        hovertemplate="%{customdata}<br>z %{x:.0f}, %{y:.1f} %<extra></extra>",
        mode="markers",
        marker={"size": 3.5, "color": SKY},
        name="tile",
    )
    figure.add_scatter(
        x=[*bins["z"], *bins["z"][::-1]],
        y=[*(bins["low"] * 100), *(bins["high"][::-1] * 100)],
        fill="toself",
        fillcolor="rgba(0, 114, 178, 0.18)",
        hoverinfo="skip",
        line={"color": BLUE, "width": 0.8},
        mode="lines",
        name="middle half",
    )
    figure.add_scatter(
        x=bins["z"],
        y=bins["middle"] * 100,
        hovertemplate="median %{y:.1f} %<extra></extra>",
        line={"color": BLUE, "width": 2.5},
        mode="lines",
        name="median",
    )
    return figure.update_layout(xaxis_title=_DEPTH, yaxis_title=_COVERAGE, showlegend=True, height=460)


def coverage_figure(coverage: pd.Series) -> go.Figure:
    """Draw the histogram of a coverage in [0, 1]."""
    counts, edges = np.histogram(coverage * 100, bins=np.arange(0, 101, 2.5))
    figure = go.Figure()
    figure.add_bar(
        x=(edges[1:] + edges[:-1]) / 2,
        y=counts,
        width=2.35,
        customdata=np.stack([edges[:-1], edges[1:]], axis=1),
        hovertemplate="%{y} tiles of %{customdata[0]:g} to %{customdata[1]:g} %<extra></extra>",
    )
    return figure.update_layout(xaxis={"title": {"text": _COVERAGE}, "range": [0, 100]}, yaxis_title="tiles")


def balance_figure(parts: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Draw how the tiles of each part spread over the classes of coverage, in per cent of the part."""
    figure = go.Figure()
    hatches: list[dict[str, Any]] = [{}, {"shape": "/", "size": 12, "solidity": 0.1}]
    for (name, part), colour, hatch in zip(parts.items(), (BLUE, ORANGE), hatches, strict=True):
        counts = np.bincount(survey.coverage_class(part["pixels"]), minlength=len(CLASSES))
        figure.add_bar(
            x=CLASSES,
            y=counts * 100 / max(len(part), 1),
            customdata=counts,
            hovertemplate="%{customdata} tiles, %{y:.1f} %",
            marker={"color": colour, "pattern": {"bgcolor": colour, "fgcolor": "white"} | hatch},
            name=f"{name} ({len(part):,} tiles)",
        )
    return figure.update_layout(
        # Plotly reads 0–10 as a category only when told so.
        xaxis={"title": {"text": f"class of {_COVERAGE}"}, "type": "category"},
        yaxis_title="tiles (%)",
        barmode="group",
        bargap=0.25,
        showlegend=True,
    )


def _add_facts(page: Page, data: Survey, uri: str, seed: int) -> None:
    tiles, salt = data.labelled, _with_salt(data)
    empty = len(tiles) - len(salt)
    covered = [_percent(value, 2) for value in salt["coverage"].quantile([0.5, 0, 1])] if len(salt) else []
    parts = tiles["part"].value_counts()
    equal = len(survey.equal_tiles(data))
    page.section("At a glance")
    page.facts(
        {
            "Labelled tiles": f"{len(tiles):,}",
            "Test tiles": f"{len(data.test):,}",
            "Empty masks": f"{empty:,} ({_percent(empty / len(tiles))}), so that an all-empty prediction "
            f"scores {empty / len(tiles):.3f}",
            "Coverage of the others": "median {}, from {} to {}".format(*covered) if covered else "–",
            "Depth z": "median {:.0f}, from {:.0f} to {:.0f}".format(*tiles["z"].quantile([0.5, 0, 1])),
            "Vertical-stripe masks": f"{survey.vertical_stripes(data.masks).sum():,}",
            "Tiny masks": f"{survey.tiny(tiles['pixels']).sum():,} of 1 to {TINY} pixels",
            "Black images": f"{survey.black(data.images).sum():,} labelled, "
            f"{survey.black(data.test_images).sum():,} test",
            "Other equal images": f"{equal:,} groups" if equal else "none",
            "Bad tiles": f"{len(data.problems):,}, left out of all that follows" if data.problems else "none",
            "Split": f"{parts.get('training', 0):,} training and {parts.get('validation', 0):,} validation "
            f"tiles (seed {seed})",
            "Folder": uri,
            "Made by": f"saltray {metadata.version('saltray')}, {pd.Timestamp.now():%Y-%m-%d %H:%M}",
        }
    )


def _add_coverage(page: Page, data: Survey) -> None:
    salt = _with_salt(data)
    page.section("Coverage", "Coverage is the share of a tile's pixels that its mask calls salt.")
    page.figure(
        coverage_figure(salt["coverage"]),
        f"Labelled tiles by coverage, in steps of 2.5 %. The {len(data.labelled) - len(salt):,} empty masks "
        "are not drawn: they would dwarf the rest.",
    )


def _add_depth(page: Page, data: Survey) -> None:
    tiles, salt = data.labelled, _with_salt(data)
    page.section("Depth", "Each tile has one depth z. Its file, depths.csv, does not name the unit.")
    page.figure(
        depth_figure({"labelled": tiles["z"], "test": data.test["z"]}),
        f"Share of the labelled and of the test tiles in each depth step of {_DEPTH_STEP}: alike where both "
        "come from the same depths.",
    )
    page.figure(
        salt_by_depth(tiles),
        "Share of the labelled tiles that hold any salt, in ten depth ranges of equally many tiles; the bars "
        "are one standard error.",
    )
    if len(salt) > 2:
        # Spearman's is Pearson's of the ranks.
        rank = salt["z"].rank().corr(salt["coverage"].rank())
        page.figure(
            coverage_by_depth(salt),
            "Each point is a labelled tile with salt; the line is the median coverage in ten depth ranges of "
            "equally many tiles, the band their middle half. Spearman's rank correlation of depth and "
            f"coverage: {rank:+.2f}.",
        )


def _add_gallery(page: Page, data: Survey) -> None:
    page.section(
        "Tiles and their masks",
        f"Salt as it is labelled, tinted and outlined in blue: up to {_PER_CLASS} tiles of each class of "
        "coverage, evenly spread over the class. Below each its id, its coverage and its depth z.",
    )
    classes, unseen = survey.coverage_class(data.labelled["pixels"]), survey.black(data.images)
    for number, name in enumerate(CLASSES):
        members = data.labelled[(classes == number) & ~unseen].sort_values(["coverage", "z"]).index.to_numpy()
        if len(members):
            kind = f"Coverage {name} %" if number else "Empty masks, those of black images apart"
            share = _percent(len(members) / len(data.labelled))
            page.pictures(
                [_picture(data, i) for i in _spread(members, _PER_CLASS)],
                f"{kind}: {len(members):,} tiles, {share} of the labelled.",
            )


def _add_odd_masks(page: Page, data: Survey) -> None:
    page.section(
        "Odd masks",
        "Masks whose shape may owe more to the labelling than to the rock. In the score each counts as much "
        "as any other tile.",
    )
    stripes = np.flatnonzero(survey.vertical_stripes(data.masks))
    tiny = np.flatnonzero(survey.tiny(data.labelled["pixels"]))
    meaning = "every column is salt from top to bottom, or has none"
    _add_odd(page, data, stripes, "vertical-stripe masks", meaning)
    meaning = f"1 to {TINY} pixels of salt, framed in orange; a pixel more or less decides the score"
    _add_odd(page, data, tiny, "tiny masks", meaning)


def _add_odd(page: Page, data: Survey, members: npt.NDArray[np.int64], name: str, meaning: str) -> None:
    if not len(members):
        page.note(f"There are no {name}.")
        return
    shown = _spread(members, _ODD)
    part = f", {len(shown)} of them shown" if len(shown) < len(members) else ""
    page.pictures([_picture(data, i) for i in shown], f"{len(members):,} {name}{part}: {meaning}.")
    page.names(data.labelled["id"].iloc[members].tolist(), f"Ids of all {len(members):,} {name}")


def _add_odd_images(page: Page, data: Survey) -> None:
    page.section(
        "Black and equal images",
        "A black image is zero in every pixel; equal images agree in every pixel. An image that is both "
        "labelled and test gives its label away; one both training and validation flatters the score.",
    )
    labelled, test = survey.black(data.images), survey.black(data.test_images)
    with_salt = int((data.labelled["pixels"][labelled] > 0).sum())
    page.note(
        f"Black: {labelled.sum():,} labelled images, {with_salt:,} of them with salt in the mask, and "
        f"{test.sum():,} test images."
    )
    for part, ids in (("labelled", data.labelled["id"][labelled]), ("test", data.test["id"][test])):
        if len(ids):
            page.names(ids.tolist(), f"Ids of all {len(ids):,} black {part} images")
    equal = survey.equal_tiles(data)
    if len(equal):
        page.table(equal, "Groups of equal images, black ones apart, and whether the masks agree.")
    else:
        page.note("Equal: apart from the black ones no two images, labelled or test.")


def _add_split(page: Page, data: Survey, seed: int, split: Split) -> None:
    page.section(
        "The split",
        f"A search with --seed {seed} --split {split} trains on four of five folds and validates on the "
        f"other one; they are stratified by coverage. {NEIGHBOURS[split]}",
    )
    parts = {name: data.labelled[data.labelled["part"] == name] for name in ("training", "validation")}
    page.figure(
        balance_figure(parts),
        "Share of the training and of the validation tiles in each class of coverage: the two bars of a "
        "class should be alike.",
    )
    page.figure(
        depth_figure({name: part["z"] for name, part in parts.items()}),
        f"Share of the training and of the validation tiles in each depth step of {_DEPTH_STEP}; the split "
        "takes no heed of depth, so that the lines differ by chance.",
    )
    rows = {
        "part": list(parts),
        "tiles": [len(part) for part in parts.values()],
        "empty masks (%)": [(part["pixels"] == 0).mean() * 100 for part in parts.values()],
        "mean coverage (%)": [part["coverage"].mean() * 100 for part in parts.values()],
        "median depth z": [part["z"].median() for part in parts.values()],
    }
    page.table(pd.DataFrame(rows), "The two parts in numbers; empty masks count as coverage 0.")
    _add_neighbours(page, data, split)


def _add_neighbours(page: Page, data: Survey, split: Split) -> None:
    pairs = data.neighbours
    if not len(pairs):
        page.note("Neighbours: no two tiles whose edges fit each other clearly better than any others.")
        return
    trained = (data.labelled["part"] == "training").to_numpy()
    cut = trained[pairs[:, 0]] != trained[pairs[:, 1]]
    other = "" if split == "neighbours" else "; --split neighbours leaves none there"
    shown = [int(i) for pair in pairs[_spread(np.arange(len(pairs)), _PER_CLASS // 2)] for i in pair]
    page.pictures(
        [_picture(data, i) for i in shown],
        f"{len(pairs):,} pairs of tiles seem to lie side by side or one below the other in a mosaic: their "
        "edges fit each other clearly better than any others. The first, a middle and the last pair. "
        f"Of all pairs {cut.sum():,} are on both sides of this split{other}.",
    )


def _add_bad_tiles(page: Page, data: Survey) -> None:
    page.section("Bad tiles")
    if data.problems:
        rows = pd.DataFrame(sorted(data.problems.items()), columns=["id", "what is wrong"])
        page.table(rows, "Left out here; a search does not start with them unless told to --skip-bad.")
    else:
        page.note("None: every image and mask can be read, and every mask agrees with its run-length code.")


def _with_salt(data: Survey) -> pd.DataFrame:
    return data.labelled[data.labelled["pixels"] > 0]


def _picture(data: Survey, i: int) -> Picture:
    """Draw a labelled tile with its mask; a tiny one is framed, or nobody would find it."""
    tile, mask = data.labelled.iloc[i], data.masks[i]
    frame = np.zeros_like(mask)
    if 0 < tile["pixels"] <= TINY:
        rows, columns = np.nonzero(mask)
        frame[_around(rows), _around(columns)] = 1
    share = {0: "empty"} | {n: f"{n} px" for n in range(1, TINY + 1)}
    text = f"{tile['id']}\n{share.get(tile['pixels'], _percent(tile['coverage'], 2))} · z {tile['z']:.0f}"
    return Picture(overlay(data.images[i], mask, frame), text)


def _around(places: npt.NDArray[np.int64]) -> slice:
    return slice(max(int(places.min()) - 5, 1), min(int(places.max()) + 6, TILE - 1))


def _spread(members: npt.NDArray[np.int64], count: int) -> list[int]:
    """Choose up to `count` of the members, evenly over their order."""
    places = np.linspace(0, len(members) - 1, min(count, len(members))).round().astype(int)
    return [int(i) for i in members[places]]


def _percent(share: float, digits: int = 1) -> str:
    return f"{share * 100:.{digits}f} %"
