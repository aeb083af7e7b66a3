"""The report's section on folds and the ensemble: who is in it, how it was chosen, what it is worth."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from saltray.ensembles import ensemble
from saltray.prediction.postprocessing import Postprocessing
from saltray.reporting.findings import Findings
from saltray.reporting.page import BLUE, Page
from saltray.reporting.tile_figures import threshold_curve

TITLE = "Folds and ensemble"

CAUTION = (
    " The search itself chose these configurations on one split of the same tiles, and each epoch of it, so "
    "that all scores here are still a little too high."
)


def add(page: Page, found: Findings) -> None:
    """Add the section, where the run was asked for an ensemble."""
    facts = found.ensemble
    if not facts:
        if found.settings.blends:
            page.section(TITLE, "Nothing yet: the refits or the ensemble are still to come.")
        return
    page.section(TITLE, _lead(facts) + CAUTION)
    page.facts(_facts(facts))
    page.table(
        _candidates(facts["candidates"]),
        "Each candidate by itself, in each fold, at probability 0.50; and its weight in the mean.",
    )
    page.figure(
        threshold_curve(facts["scores"], facts["threshold"]),
        "The ensemble's mAP at each threshold, the rest of the postprocessing as chosen. In sample: the "
        "highest was taken.",
    )
    other = facts.get("pseudo_labels", {})
    if "not_taken" in other:
        which = "without" if other["used"] else "with"
        page.table(_candidates(other["not_taken"]), f"The same of the ensemble {which} pseudo-labels.")
    if len(facts["path"]) > 1:
        page.figure(
            _path(facts["path"]),
            "The greedy selection, from the best single candidate on: each step adds the one with which the "
            "mean probability scores best, on the tiles that choose. It ended where no addition helped.",
        )
    elif len(facts["candidates"]) > 1:
        page.note("The greedy selection ended with the best single candidate: no addition helped.")


def _lead(facts: dict[str, Any]) -> str:
    if facts["folds"]:
        judged = (
            f"The best configurations were trained again, {facts['folds']} times each, every time without "
            "one fold of the labelled tiles; each tile is judged by the models that never saw it. The refits "
            "keep their last weights, so that nothing of them is chosen on the held-out fold. What the mean "
            f"over a configuration's {facts['folds']} models is worth beyond one of them, no labelled tile "
            "can tell: each has been seen by all but one."
        )
    else:
        judged = (
            "The candidates are the models that the search kept, judged on its validation tiles, on which "
            "their epochs were chosen as well. Refits on folds (--folds) would be judged more honestly."
        )
    return f"The submission is the mean of the probabilities of {facts['models']} models. {judged}"


def _facts(facts: dict[str, Any]) -> dict[str, str]:
    folds = ", ".join(f"{score:.4f}" for score in facts["by_fold"])
    rows = {
        "cross-fitted mAP": f"{facts['cross_fitted']:.4f} ± {facts['spread']:.4f}: members and "
        f"postprocessing chosen on the other folds; mean and standard deviation over the folds ({folds})",
        **_lone(facts),
        "in sample": f"{facts['in_sample']:.4f}, on the tiles that they were chosen on",
        "postprocessing": str(Postprocessing.of(facts)),
    }
    if "pseudo_labels" in facts:
        rows["pseudo-labels"] = _pseudo_labels_in_full(facts["pseudo_labels"])
    return rows


def _lone(facts: dict[str, Any]) -> dict[str, str]:
    if not (lone := facts.get("lone")):
        return {}
    words = f"{lone['map']:.4f}, likewise, on those {lone['tiles']:,} tiles that have no neighbour, "
    return {"on lone tiles": words + "as far as edges tell, among those that their models trained on"}


def _pseudo_labels_in_full(facts: dict[str, Any]) -> str:
    words = ensemble.pseudo_labels_in_words(facts)
    if any(facts.get("tiles", ())):
        words += f". Test tiles by fold: {', '.join(map(str, facts['tiles']))}"
    if "with" in facts:
        words += (
            ". Only configurations that were chosen without them learnt them, and the better of both "
            "ensembles was taken: its score flatters a little by that"
        )
    return words


def _candidates(candidates: list[dict[str, Any]]) -> pd.DataFrame:
    rows = [
        {"candidate": c["name"], "weight": c["weight"]}
        | {f"fold {fold}": score for fold, score in enumerate(c["by_fold"])}
        | {"mean": sum(c["by_fold"]) / len(c["by_fold"])}
        for c in candidates
    ]
    return pd.DataFrame(rows)


def _path(path: list[dict[str, Any]]) -> go.Figure:
    figure = go.Figure(
        go.Scatter(
            x=list(range(1, len(path) + 1)),
            y=[step["score"] for step in path],
            text=[step["added"] for step in path],
            mode="lines+markers",
            line={"color": BLUE},
            showlegend=False,
            hovertemplate="%{x}: %{text}, mAP %{y:.4f}<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="candidates in the mean", dtick=max(1, len(path) // 10))
    figure.update_yaxes(title_text="mAP where it is chosen")
    return figure
