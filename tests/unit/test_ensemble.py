from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from saltray.contest import metrics
from saltray.ensembles import ensemble
from saltray.ensembles.ensemble import MOST_PICKS, OutOfFold
from saltray.prediction import postprocessing
from saltray.prediction.postprocessing import Postprocessing


def make(candidates: int, tiles: int, seed: int = 0, folds: int = 3) -> OutOfFold:
    """Candidates that are each right about other tiles, and noisy; some tiles are empty."""
    rng = np.random.default_rng(seed)
    truth = rng.random((tiles, 1, 1)) * np.ones((6, 5)) > np.linspace(0.1, 1.2, 6)[:, None]
    skill = rng.uniform(-0.2, 0.9, (candidates, 2, tiles, 1, 1))
    noise = rng.uniform(0, 1, (candidates, 2, tiles, 6, 5))
    probability = np.clip(0.5 + skill * (truth - 0.5) + 0.7 * (noise - 0.5), 0, 1)
    return OutOfFold(np.rint(255 * probability).astype(np.uint8), truth, np.arange(tiles) % folds)


def slow_score(known: OutOfFold, picks: list[int], tiles: list[int]) -> float:
    """The contest's score of the mean of the picked candidates, tile by tile."""
    scores = []
    for tile in tiles:
        mean = np.mean([known.probability[c, 0, tile].astype(float) / 255 for c in picks], axis=0)
        predicted, truth = mean > 0.5, known.truth[tile]
        either = int((predicted | truth).sum())
        iou = int((predicted & truth).sum()) / either if either else 1.0
        scores.append(sum(iou > t for t in metrics.IOU_THRESHOLDS) / 10 if either else 1.0)
    return float(np.mean(scores))


def slow_selection(known: OutOfFold, tiles: list[int]) -> list[tuple[int, float]]:
    picks: list[int] = []
    path: list[tuple[int, float]] = []
    while True:
        scores = [round(slow_score(known, [*picks, c], tiles), 9) for c in range(len(known.probability))]
        if path and max(scores) <= path[-1][1]:
            return path
        path.append((scores.index(max(scores)), max(scores)))
        picks.append(path[-1][0])


@pytest.mark.parametrize("seed", range(8))
def test_selection_agrees_with_an_obvious_loop(seed: int) -> None:
    known = make(4, 21, seed)
    slow = slow_selection(known, list(range(21)))
    found = ensemble.choose(known)
    assert [step.added for step in found.path] == [added for added, _ in slow]
    assert [step.score for step in found.path] == pytest.approx([score for _, score in slow])
    assert found.picks == tuple([added for added, _ in slow].count(c) for c in range(4))
    for fold, picks in enumerate(found.picks_by_fold):
        others = [tile for tile in range(21) if tile % 3 != fold]
        added = [candidate for candidate, _ in slow_selection(known, others)]
        assert picks == tuple(added.count(c) for c in range(4))
    for candidate, by_fold in enumerate(found.candidates):
        inside = [[tile for tile in range(21) if tile % 3 == fold] for fold in range(3)]
        assert by_fold == pytest.approx([slow_score(known, [candidate], tiles) for tiles in inside])


def test_some_selections_take_several_and_one_twice() -> None:
    picks = [ensemble.choose(make(4, 21, seed)).picks for seed in range(8)]
    assert max(sum(times > 0 for times in p) for p in picks) > 2
    assert max(max(p) for p in picks) > 1


def test_of_equals_the_earlier_is_taken_and_nothing_that_does_not_help() -> None:
    known = make(1, 12)
    same = OutOfFold(np.repeat(known.probability, 3, axis=0), known.truth, known.fold)
    assert ensemble.choose(same).picks == (1, 0, 0)


def scored(known: OutOfFold, picks: tuple[int, ...], chosen: Postprocessing) -> npt.NDArray[Any]:
    """Each tile's score under a postprocessing, from the mean in floats."""
    view = known.probability[:, int(chosen.tta)].astype(float)
    predicted = np.average(view, axis=0, weights=picks) / 255 > chosen.threshold
    predicted &= predicted.sum(axis=(1, 2), keepdims=True) >= chosen.min_area
    return metrics.precision(*metrics.overlap(predicted, known.truth))


@pytest.mark.parametrize("seed", range(4))
def test_postprocessing_is_that_of_the_mean_and_each_fold_is_scored_by_the_others_choice(seed: int) -> None:
    known = make(3, 30, seed)
    found = ensemble.choose(known)
    assert found.in_sample == pytest.approx(scored(known, found.picks, found.chosen).mean())
    assert found.in_sample == max(found.scores.values())
    for fold, picks in enumerate(found.picks_by_fold):
        others, here = known.fold != fold, known.fold == fold
        rest = OutOfFold(known.probability[:, :, others], known.truth[others], known.fold[others])
        counts = ensemble.overlaps(rest, picks)
        chosen, _ = postprocessing.choose(*counts, rest.truth.sum(axis=(1, 2)))
        assert found.by_tile[here] == pytest.approx(scored(known, picks, chosen)[here])
        assert found.by_fold[fold] == pytest.approx(found.by_tile[here].mean())
    assert found.cross_fitted == pytest.approx(np.mean(found.by_fold))
    assert found.spread == pytest.approx(np.std(found.by_fold, ddof=1))


def test_a_folds_truth_has_no_say_in_what_is_chosen_for_it() -> None:
    known = make(4, 30)
    changed = known.truth.copy()
    changed[known.fold == 1] = ~changed[known.fold == 1]
    found = ensemble.choose(OutOfFold(known.probability, changed, known.fold))
    before = ensemble.choose(known)
    assert found.picks_by_fold[1] == before.picks_by_fold[1]
    assert found.by_fold[1] != before.by_fold[1]


def test_the_selection_ends_and_its_sums_do_not_overflow() -> None:
    def ever_better(picks: tuple[int, ...]) -> npt.NDArray[np.float64]:
        return np.full(10_000, 1.0) * (np.arange(10_000) < 10 * sum(picks))

    picks, path = ensemble.select(ever_better, 2, np.ones(10_000, bool))
    assert picks == (MOST_PICKS, 0) and len(path) == MOST_PICKS
    assert all(later.score > earlier.score for earlier, later in pairwise(path))
    full = OutOfFold(np.full((1, 2, 2, 6, 5), 255, np.uint8), np.ones((2, 6, 5), bool), np.arange(2))
    assert ensemble.tile_scores(full, (MOST_PICKS,)).tolist() == [1, 1]
