"""The report's sections: what a search tried, what it found, and what that is worth.

Everything is read from the run's folder, so a report can be written anew at any time, also while it is
still under way. What is not there (yet) is said in a sentence in its section's place.
"""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from saltray.config import NEIGHBOURS
from saltray.prediction import validation
from saltray.prediction.postprocessing import Postprocessing
from saltray.records.study import epochs_of, objective_of, score
from saltray.reporting import ensemble_section, environment_section, tile_figures, trial_figures
from saltray.reporting.findings import Findings
from saltray.reporting.page import Page

SCORES = (
    "Scores are the contest's mean average precision (mAP): of each tile, the share of the ten thresholds "
    "0.50, 0.55 .. 0.95 that the overlap of truth and prediction (intersection over union, IoU) exceeds; "
    "then the mean over the tiles. 1 is perfect. "
)
CAUTION = (
    "Take it with care. {neighbours} The same validation tiles chose the best trial and its threshold. "
    "Expect less on new ground."
)

COVERAGES = [-1, 0, *range(10, 101, 10)]  # the contest's own classes: no salt, then tenths
_DEPTH_STEP = 100
_LISTED = 200  # trials in the table
_NOT_PREDICTED = "Nothing yet: this is known when the search has ended and its best model has predicted."
_NO_EPOCH = "Nothing yet: no trial has ended an epoch."


def build(found: Findings) -> Page:
    """Put the page together."""
    counts = Counter(map(trial_figures.outcome, found.trials))
    trials = ", ".join(f"{n} {name}" for name, n in counts.items()) or "none was started"
    page = Page(f"Search {found.folder.name}", f"What saltray tried, and what it found. Trials: {trials}.")
    for add in (
        _result, ensemble_section.add, _configuration, _gallery, _salt, _threshold, _training, _history,
        _curves, _front, _parallel, _importance, _slices, _timeline, _trials, environment_section.add,
    ):  # fmt: skip
        add(page, found)
    return page


def _result(page: Page, found: Findings) -> None:
    page.section("Result", SCORES + CAUTION.format(neighbours=NEIGHBOURS[found.settings.split]))
    best, model, facts = found.best, found.model, {"best trial": "none: no trial has ended an epoch"}
    if best:
        reached = max(best.intermediate_values, default=len(trial_figures.epochs(best)))
        facts["best trial"] = f"trial {best.number}, {trial_figures.outcome(best)} after {reached} epochs"
        facts["validation mAP"] = f"{score(best):.4f}, where a pixel is salt above probability 0.50"
    if "threshold" in model:
        facts["postprocessed"] = (
            f"{model['validation_map']:.4f} {Postprocessing.of(model)}; chosen on these same tiles"
        )
        if best and model["trial"] != best.number:
            facts["postprocessed"] += f". It is trial {model['trial']}, the best when it was last predicted"
    if lone := model.get("lone"):
        facts["on lone tiles"] = (
            f"{lone['map']:.4f}, likewise, on those {lone['tiles']} validation tiles that have no neighbour, "
            "as far as edges tell, among the training tiles"
        )
    if found.ensemble:
        facts["ensemble"] = (
            f"{found.ensemble['cross_fitted']:.4f} ± {found.ensemble['spread']:.4f}, cross-fitted. The "
            "submission is the ensemble's, not the best trial's"
        )
        if found.ensemble["folds"]:
            facts["ensemble"] += (
                ". The two do not compare: the ensemble is judged on all labelled tiles, by models that "
                "never saw them, the best trial on those that chose it"
            )
    if found.adopted:
        facts["warm start"] = f"trials taken over from another run, and not shown here: {found.adopted}"
    if found.table is not None:
        empty = (found.table["coverage"] == 0).mean()
        facts["for comparison"] = f"{empty:.4f} for no salt anywhere; a model near that has learnt nothing"
        facts["validation tiles"] = f"{len(found.table)}, of which {empty:.0%} hold no salt"
    page.facts(facts)


def _whose(found: Findings) -> str:
    """Say whose results a section shows, where they are not the submission's."""
    return " Shown is the best single model, in best/; the submission is the ensemble's." * bool(
        found.ensemble
    )


def _configuration(page: Page, found: Findings) -> None:
    if found.best is None:
        page.section("Best configuration", _NO_EPOCH)
        return
    stored = found.model.get("trial", found.best.number)
    other = f" The model in best/ is still that of trial {stored}." * (stored != found.best.number)
    page.section(
        "Best configuration", "What the search chose, and the whole configuration of the model." + other
    )
    facts = {f"trial {found.best.number}": trial_figures.describe(found.best.params) or "has no parameters"}
    if "parameters" in found.best.user_attrs:
        facts["network"] = f"{found.best.user_attrs['parameters']:,} trainable parameters"
    rest = {name: value for name, value in found.config.items() if not isinstance(value, dict)}
    if found.config:
        groups = {name: value for name, value in found.config.items() if isinstance(value, dict)}
        facts |= {
            name: trial_figures.describe(group) for name, group in (groups | {"training": rest}).items()
        }
    page.facts(facts)


def _gallery(page: Page, found: Findings) -> None:
    if found.gallery is None or found.table is None:
        page.section("Validation tiles", _NOT_PREDICTED)
        return
    if not len(found.gallery["id"]):
        page.section("Validation tiles", "No validation tile holds salt, and none was predicted to.")
        return
    page.section(
        "Validation tiles",
        "From top to bottom: the seismic tile, up towards the surface; the same with the true salt tinted "
        "and outlined in blue, and the prediction outlined in orange and tinted where there is no salt; the "
        "predicted probability of salt, from dark blue (0) to yellow (1). IoU is the overlap of truth and "
        "prediction: 1 where both agree, 0 where they have no pixel in common." + _whose(found),
    )
    facts = found.table.set_index("id")
    for group, rule in validation.GROUPS.items():
        chosen = np.flatnonzero(found.gallery["group"] == group)
        if len(chosen):
            pictures = [tile_figures.picture(found.gallery, int(i), facts) for i in chosen]
            page.pictures(pictures, f"{group.capitalize()}: {rule}.")


def _salt(page: Page, found: Findings) -> None:
    if found.table is None:
        page.section("Salt, depth and score", _NOT_PREDICTED)
        return
    page.section(
        "Salt, depth and score",
        "Where the model is right and where it is not, tile by tile, after postprocessing. Tiles with "
        "little salt are the hard ones: a few wrong pixels cost them all of their score." + _whose(found),
    )
    table = found.table
    page.figure(
        tile_figures.score_by(
            100 * table["coverage"], table["precision"], COVERAGES, "true salt (% of the tile)"
        ),
        "Mean score of the validation tiles by the share of salt in them; above each bar, how many tiles.",
    )
    page.figure(
        tile_figures.coverages(table),
        "Each point is a validation tile. Below the dotted line the model predicts too little salt, above "
        "it too much; dark points overlap badly with the truth, yellow ones well.",
    )
    deep = table[np.isfinite(table["z"])]
    if len(deep):
        low, high = int(deep["z"].min() // _DEPTH_STEP), int(deep["z"].max() // _DEPTH_STEP) + 1
        edges = [float(_DEPTH_STEP * i) for i in range(low, high + 1)]
        page.figure(
            tile_figures.score_by(deep["z"], deep["precision"], edges, "depth z (the contest names no unit)"),
            "Mean score by the depth of the tile; above each bar, how many tiles. Depth and the amount of "
            "salt go together, so this alone does not show an effect of depth.",
        )


def _threshold(page: Page, found: Findings) -> None:
    if "scores" not in found.model:
        page.section("Threshold", _NOT_PREDICTED)
        return
    page.section(
        "Threshold",
        "The network gives each pixel a probability of salt; the threshold makes a mask of it."
        + _whose(found),
    )
    page.figure(
        tile_figures.threshold_curve(found.model["scores"], found.model["threshold"]),
        "Validation mAP of the best model at each threshold, the rest of the postprocessing as chosen. The "
        "highest was taken, on the tiles that it is scored on here, so its last thousandths are luck. A "
        "broad top is a good sign.",
    )


def _training(page: Page, found: Findings) -> None:
    title = "Training of the best"
    if found.best is None:
        page.section(title, _NO_EPOCH)
        return
    rows = trial_figures.epochs(found.best)
    if not rows:
        page.section(title, "Nothing yet: the best trial has no record of its epochs.")
        return
    page.section(title, f"How trial {found.best.number} learnt, epoch by epoch.")
    loss = found.config["loss"] if found.model.get("trial") == found.best.number else {}
    change = (
        f" The loss leaps where {loss['then']} takes the place of {loss['name']}, after "
        f"{loss['switch_at']:.0%} of the epochs."
        if loss.get("then")
        else ""
    )
    page.figure(
        trial_figures.training_curves(rows),
        "Loss (mean over the augmented training tiles, with dropout), validation mAP at probability 0.50, "
        "and learning rate. A loss that falls while the mAP does not rise is overfitting." + change,
    )


def _history(page: Page, found: Findings) -> None:
    if found.best is None:
        page.section("History of the best", _NO_EPOCH)
        return
    page.section("History of the best", "Whether the search was still finding better models when it ended.")
    page.figure(
        trial_figures.history(found.trials),
        "Each point is a trial's best validation mAP, at whatever epoch; the line is the best so far. "
        "Trials that were stopped early (open circles) had fewer epochs to reach theirs.",
    )


def _curves(page: Page, found: Findings) -> None:
    if found.best is None:
        page.section("Learning curves", _NO_EPOCH)
        return
    page.section(
        "Learning curves", "All trials by epoch. Short curves were stopped early in favour of better ones."
    )
    page.figure(
        trial_figures.learning_curves(found.trials, found.best.number),
        "Validation mAP after each epoch, at probability 0.50. Point at a curve to see its trial.",
    )


def _front(page: Page, found: Findings) -> None:
    if objective_of(found.study) == "map":
        return
    if not any(t.state == TrialState.COMPLETE for t in found.trials):
        page.section("Score and speed", "Nothing yet: only complete trials have both objectives.")
        return
    page.section(
        "Score and speed", "This search had two objectives: a high validation mAP and a fast network."
    )
    page.figure(
        trial_figures.pareto_front(found.study, found.trials),
        "Each point is a complete trial. Those of the Pareto front are the choices worth having: no other "
        "trial is both more accurate and faster. Speeds compare only between like machines.",
    )


def _has_enough(page: Page, found: Findings, title: str, least: int) -> bool:
    """Tell whether there are trials to compare; where not, the section is one sentence."""
    known = sum(bool(t.params) for t in trial_figures.scored(found.trials))
    if known < least:
        have = "1 has" if known == 1 else f"{known} have"
        page.section(title, f"This needs {least} trials with parameters that ended an epoch; {have}.")
    return known >= least


def _parallel(page: Page, found: Findings) -> None:
    if _has_enough(page, found, "Parallel coordinates", 2):
        page.section("Parallel coordinates", "Which combinations of parameters did well.")
        page.figure(
            trial_figures.parallel_coordinates(found.trials),
            "Each line is a trial: its best validation mAP at the left, then its parameters; the darker, the "
            "better. A line through None belongs to a trial that does not have that parameter.",
            min_width=140 + 90 * len({name for t in found.trials for name in t.params}),
        )


def _importance(page: Page, found: Findings) -> None:
    if _has_enough(page, found, "Importance of the parameters", trial_figures.IMPORTANCE_TRIALS):
        if not trial_figures.varied(found.trials):
            page.section("Importance of the parameters", "No parameter was varied.")
            return
        known = len(trial_figures.scored(found.trials))
        best = f"{trial_figures.target_share(known):.0%} of the {known} trials"
        page.section("Importance of the parameters", "Which parameters decide whether a trial is a good one.")
        page.figure(
            trial_figures.importance(found.trials),
            f"How much the best {best} differ from all in "
            "each parameter (PED-ANOVA). Trials that were stopped early count with what they had reached. "
            "From few trials this is a hint, not a finding.",
        )


def _slices(page: Page, found: Findings) -> None:
    if _has_enough(page, found, "Score by parameter", 2):
        page.section("Score by parameter", "Each parameter by itself; what the others were is not seen here.")
        page.figures(
            list(trial_figures.slices(found.trials).values()),
            "Each point is a trial's best validation mAP: filled circles are complete, open ones were "
            "stopped early, diamonds are unfinished, crosses failed.",
        )


def _timeline(page: Page, found: Findings) -> None:
    stretches = trial_figures.stretches(found.trials)
    if not stretches:
        page.section("Timeline", "Nothing yet: no trial has a record of when it ran.")
        return
    gaps = "; the refits are not shown" if found.settings.folds else ""
    page.section("Timeline", f"When each trial ran on which machine. In the gaps no trial ran{gaps}.")
    page.figure(
        trial_figures.timeline(stretches),
        "A bar is a stretch of epochs without a pause, and the trial's number; each machine has as many "
        "lanes as it ran trials side by side. Seconds are by the wall clock: a trial alone would take fewer.",
    )


def _trials(page: Page, found: Findings) -> None:
    if not found.trials:
        page.section("Trials", "Nothing yet: no trial was started.")
        return
    page.section("Trials", "Every trial, the best first; and why those that failed did.")
    order = sorted(found.trials, key=lambda t: (-score(t), t.number))
    caption = "Seconds are by the wall clock, with whatever ran beside."
    if len(order) > _LISTED:
        caption += f" The best {_LISTED} of {len(order)} are listed."
    rows = pd.DataFrame([_row(t) for t in order[:_LISTED]]).astype({"seconds": "Int64"})
    page.table(rows, caption)
    failed = [t for t in found.trials if t.state == TrialState.FAIL]
    if failed:
        reasons = {
            "trial": [t.number for t in failed],
            "reason": [t.user_attrs.get("reason", "not known") for t in failed],
            "parameters": [trial_figures.describe(t.params) for t in failed],
        }
        page.table(pd.DataFrame(reasons), "Trials that failed, and why.")


def _row(trial: FrozenTrial) -> dict[str, Any]:
    rows = epochs_of(trial)
    hosts = dict.fromkeys(str(row["host"]) for row in rows)
    return {
        "trial": trial.number,
        "state": trial_figures.outcome(trial),
        "best mAP": score(trial) if score(trial) >= 0 else np.nan,
        "epochs": max(trial.intermediate_values, default=len(trial_figures.epochs(trial))),
        "seconds": round(sum(row["seconds"] for row in rows)) if rows else pd.NA,
        "machine": ", ".join(hosts) or "–",
        **{name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in trial.params.items()},
    }
