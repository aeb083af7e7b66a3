"""Which models to take the mean of, chosen on what they predict for tiles that they never saw.

Greedy forward selection with replacement (Caruana et al. 2004, "Ensemble selection from libraries of models",
ICML): begin with the best candidate, then add, again and again, the one whose addition lets the mean
probability score best; one that is taken twice weighs twice. It ends where no addition helps.

The chosen ensemble's score on the tiles that it was chosen on flatters. The honest one is cross-fitted: for
each fold the selection and the postprocessing are chosen on all others, and scored on it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from saltray.contest import metrics
from saltray.prediction import postprocessing
from saltray.prediction.postprocessing import Postprocessing

MOST_PICKS = 100
"""Where the selection ends at the latest; the sums of so many probabilities of 255 fit in uint16."""

_TILES_AT_ONCE = 256  # that the cache holds

Picks = tuple[int, ...]
"""How often each candidate was taken; its share of their sum is its weight."""

TileScores = Callable[[Picks], npt.NDArray[np.float64]]


class Step(NamedTuple):
    """One step of the selection."""

    added: int
    """Which candidate."""
    score: float
    """Of the mean with it, at probability 0.5, on the tiles that it was chosen on."""


@dataclass(frozen=True)
class OutOfFold:
    """What every candidate predicts for every labelled tile, by a model that never saw the tile.

    One byte a pixel: 4,000 tiles are 41 MB a candidate and view, so ten candidates take 0.8 GiB, where
    float32 would take 3. The rounding, at most 0.002 of probability, is a tenth of the thresholds' step.
    """

    probability: npt.NDArray[np.uint8]
    """(candidates, 2, tiles, height, width), 255 is 1; without test-time augmentation and with it."""
    truth: npt.NDArray[np.bool_]
    """(tiles, height, width)."""
    fold: npt.NDArray[np.int64]
    """(tiles,): the folds of the cross-fitting."""


@dataclass(frozen=True)
class Selection:
    """The chosen ensemble, and its scores."""

    picks: Picks
    path: list[Step]
    chosen: Postprocessing
    scores: dict[str, float]
    """At every candidate threshold under the rest of the choice, on the tiles that chose it."""
    by_tile: npt.NDArray[np.float64]
    """Cross-fitted, (tiles,): each tile's score by what the other folds chose."""
    by_fold: list[float]
    """The mean of these over each fold."""
    picks_by_fold: list[Picks]
    """What the other folds chose."""
    candidates: list[list[float]]
    """Each candidate's score in each fold, at probability 0.5."""

    @property
    def in_sample(self) -> float:
        """The score on the tiles that everything was chosen on."""
        return self.scores[f"{self.chosen.threshold:.2f}"]

    @property
    def cross_fitted(self) -> float:
        """The honest score: the mean over the folds."""
        return float(np.mean(self.by_fold))

    @property
    def spread(self) -> float:
        """The standard deviation of the score over the folds."""
        return float(np.std(self.by_fold, ddof=1))


def choose(known: OutOfFold) -> Selection:
    """Choose an ensemble and its postprocessing on all tiles, and score the choosing by cross-fitting.

    Args:
        known: of at least one candidate, and at least two folds.
    """
    # Every tile is scored by itself, so what one fold's selection tried is known to the others'.
    scores, counts = cache(partial(tile_scores, known)), cache(partial(overlaps, known))
    number, salt = len(known.probability), known.truth.sum(axis=(1, 2))
    folds = [known.fold == fold for fold in np.unique(known.fold)]
    by_tile, picks_by_fold = np.zeros(len(salt)), []
    for inside in folds:
        picks, _ = select(scores, number, ~inside)
        intersection, union = counts(picks)
        chosen, _ = postprocessing.choose(intersection[~inside], union[~inside], salt[~inside])
        kept = postprocessing.apply(chosen, intersection[inside], union[inside], salt[inside])
        by_tile[inside] = metrics.precision(*kept)
        picks_by_fold.append(picks)
    picks, path = select(scores, number, np.ones(len(salt), bool))
    chosen, by_threshold = postprocessing.choose(*counts(picks), salt)
    alone = [_add((0,) * number, candidate) for candidate in range(number)]
    return Selection(
        picks,
        path,
        chosen,
        by_threshold,
        by_tile,
        [float(by_tile[inside].mean()) for inside in folds],
        picks_by_fold,
        [[float(scores(one)[inside].mean()) for inside in folds] for one in alone],
    )


def select(scores: TileScores, candidates: int, tiles: npt.NDArray[np.bool_]) -> tuple[Picks, list[Step]]:
    """Select greedily, with replacement; of equal candidates the earlier is taken.

    Args:
        scores: picks -> each tile's score, (tiles,), a multiple of a tenth.
        candidates: how many there are.
        tiles: boolean (tiles,), those that choose.

    Returns:
        The picks, and the steps to them.
    """

    def total(picks: Picks) -> int:
        # In whole tenths: sums of floats would tell equals apart by their rounding.
        return int(np.rint(len(metrics.IOU_THRESHOLDS) * scores(picks)[tiles]).sum())

    picks: Picks = (0,) * candidates
    path: list[Step] = []
    best = -1
    while sum(picks) < MOST_PICKS:
        totals = [total(_add(picks, candidate)) for candidate in range(candidates)]
        if max(totals) <= best:
            break
        best = max(totals)
        added = totals.index(best)
        picks = _add(picks, added)
        path.append(Step(added, best / len(metrics.IOU_THRESHOLDS) / int(tiles.sum())))
    return picks, path


def tile_scores(known: OutOfFold, picks: Picks) -> npt.NDArray[np.float64]:
    """Score each tile's mean probability, without test-time augmentation, at 0.5: (tiles,) in [0, 1]."""
    parts = [
        metrics.precision(*metrics.overlap(total > 0.5 * 255 * sum(picks), truth))
        for total, truth in _totals(known, picks, view=0)
    ]
    return np.concatenate(parts)


def overlaps(known: OutOfFold, picks: Picks) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count intersections and unions for `postprocessing.choose`: both (tiles, 2, thresholds)."""
    cuts = 255 * sum(picks) * np.array(postprocessing.PROBABILITIES)
    # A sum's bin is how many of the rising thresholds it exceeds: one histogram serves them all.
    bins = (np.arange(255 * sum(picks) + 1)[:, None] > cuts).sum(axis=1)
    size = len(cuts) + 1
    intersections, unions = [], []
    for view in (0, 1):
        for total, truth in _totals(known, picks, view):
            place = bins[total] + size * (truth + 2 * np.arange(len(total))[:, None, None])
            counts = np.bincount(place.ravel(), minlength=2 * size * len(total)).reshape(-1, 2, size)
            above = counts[:, :, ::-1].cumsum(axis=2)[:, :, ::-1][:, :, 1:]
            intersections.append(above[:, 1])
            unions.append(above[:, 0] + truth.sum(axis=(1, 2))[:, None])
    shape = (2, len(known.truth), len(cuts))
    intersection, union = (np.concatenate(c).reshape(shape).swapaxes(0, 1) for c in (intersections, unions))
    return intersection, union


def _totals(
    known: OutOfFold, picks: Picks, view: int
) -> Iterator[tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]]:
    """Give the summed probabilities of the picks, and the truth, for some tiles at a time."""
    for i in range(0, len(known.truth), _TILES_AT_ONCE):
        part = slice(i, i + _TILES_AT_ONCE)
        total = np.zeros(known.truth[part].shape, np.uint16)
        for candidate, times in enumerate(picks):
            if times:
                total += np.uint16(times) * known.probability[candidate, view, part]
        yield total, known.truth[part]


def _add(picks: Picks, candidate: int) -> Picks:
    return (*picks[:candidate], picks[candidate] + 1, *picks[candidate + 1 :])


def pseudo_labels_in_words(facts: dict[str, Any]) -> str:
    """Write what became of the pseudo-labels, as the ensemble's metrics tell it under `pseudo_labels`."""
    if not facts["finished"]:
        return "not yet: their refits wait for the next session"
    if not any(facts["tiles"]):
        return "none: the models were not sure of any test tile"
    if "with" not in facts:
        return "not used: their refits failed"
    used = "used" if facts["used"] else "not used"
    return f"{used}: cross-fitted {facts['with']:.4f} with them, {facts['without']:.4f} without"
