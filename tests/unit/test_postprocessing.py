import itertools

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit
from scipy.special import logit as scipy_logit

from saltray.contest import metrics
from saltray.prediction import postprocessing
from saltray.prediction.postprocessing import Postprocessing


def test_the_candidate_thresholds() -> None:
    np.testing.assert_allclose(postprocessing.PROBABILITIES, np.linspace(0.2, 0.8, 31))
    assert 0.5 in postprocessing.PROBABILITIES


def test_logit_of_a_probability() -> None:
    assert postprocessing.logit(0.5) == 0
    for p in (*postprocessing.PROBABILITIES, 1e-9):
        assert postprocessing.logit(p) == pytest.approx(scipy_logit(p), rel=1e-12, abs=1e-15)


def test_thresholds_cut_the_probability_not_the_logit() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 1.5, (7, 6, 5)).astype(np.float32)
    truth = rng.random(logits.shape) < 0.5
    intersection, union = postprocessing.overlap_by_threshold(logits, truth)
    assert intersection.shape == union.shape == (7, len(postprocessing.PROBABILITIES))
    for column, p in enumerate(postprocessing.PROBABILITIES):
        salt = expit(logits.astype(np.float64)) > p
        np.testing.assert_array_equal(intersection[:, column], (salt & truth).sum(axis=(1, 2)))
        np.testing.assert_array_equal(union[:, column], (salt | truth).sum(axis=(1, 2)))


def both_views(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.stack([counts, counts], axis=1)


def test_chosen_threshold_is_the_best_one() -> None:
    truth = np.zeros((3, 10, 10), bool)
    truth[:, 2:8, 2:8] = True
    # Salt has probability 0.72 and its surroundings 0.65: only thresholds between them score 1.
    logits = np.where(truth, postprocessing.logit(0.72), postprocessing.logit(0.65)).astype(np.float32)
    intersection, union = postprocessing.overlap_by_threshold(logits, truth)
    chosen, scores = postprocessing.choose(
        both_views(intersection), both_views(union), truth.sum(axis=(1, 2))
    )
    # Mirrored views that change nothing are not worth their time.
    assert chosen == Postprocessing(threshold=0.66, tta=False, min_area=0)
    assert [p for p, score in scores.items() if score == 1] == ["0.66", "0.68", "0.70"]
    assert list(scores) == [f"{p:.2f}" for p in postprocessing.PROBABILITIES]
    assert scores["0.72"] == scores["0.80"] == 0


def test_equally_good_thresholds_fall_to_the_middle() -> None:
    counts = np.full((4, 2, len(postprocessing.PROBABILITIES)), 9)
    chosen, _ = postprocessing.choose(counts, counts, np.full(4, 9))
    assert chosen == Postprocessing(threshold=0.5)


@pytest.mark.parametrize("seed", range(20))
def test_equal_views_stay_equal_whatever_the_order_of_the_tiles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    union = np.full((200, 1, len(postprocessing.PROBABILITIES)), 1000)
    intersection = rng.integers(400, 1001, (200, 1, 1)) + 0 * union
    views = np.concatenate([intersection, intersection[rng.permutation(200)]], axis=1)
    chosen, _ = postprocessing.choose(views, np.repeat(union, 2, axis=1), np.full(200, 1000))
    assert chosen == Postprocessing()


def test_postprocessing_in_words() -> None:
    assert str(Postprocessing.of({"threshold": 0.46, "trial": 3})) == "at probability 0.46"
    assert str(Postprocessing(0.5, True, 40)) == (
        "at probability 0.50, in the mean with the mirrored tile's prediction, masks below 40 pixels emptied"
    )


def test_threshold_is_chosen_by_the_mean_over_tiles() -> None:
    n = len(postprocessing.PROBABILITIES)
    union = np.full((2, 2, n), 1000)
    intersection = np.full((2, 2, n), 400)
    intersection[0, :, 3], intersection[:, :, 20] = 1000, 900  # one perfect tile against two good ones
    chosen, scores = postprocessing.choose(intersection, union, np.full(2, 1000))
    assert chosen.threshold == postprocessing.PROBABILITIES[20]
    assert scores["0.26"] == pytest.approx(0.5)
    assert scores["0.60"] == pytest.approx(0.8)


def test_postprocessing_agrees_with_every_candidate_applied_to_the_masks() -> None:
    rng = np.random.default_rng(8)
    truth = np.zeros((40, 16, 16), bool)
    for i in range(0, 40, 2):
        truth[i, : 4 + i // 4, 3:12] = True
    noise = rng.normal(0, 1.2, truth.shape)
    views = [2.0 * truth - 1.5 + noise, 2.0 * truth - 1.5 + 0.7 * noise]
    counts = [postprocessing.overlap_by_threshold(v.astype(np.float32), truth) for v in views]
    intersection, union = (np.stack([c[i] for c in counts], axis=1) for i in (0, 1))
    salt = truth.sum(axis=(1, 2))
    chosen, scores = postprocessing.choose(intersection, union, salt)
    results = {}
    for tta, p, least in itertools.product(
        (False, True), postprocessing.PROBABILITIES, postprocessing.MIN_AREAS
    ):
        masks = expit(views[tta].astype(np.float32).astype(np.float64)) > p
        masks[masks.sum(axis=(1, 2)) < least] = False
        applied = postprocessing.apply(Postprocessing(p, tta, least), intersection, union, salt)
        np.testing.assert_array_equal(applied, metrics.overlap(masks, truth))
        results[Postprocessing(p, tta, least)] = metrics.mean_precision(masks, truth)
    assert results[chosen] == max(results.values())
    assert chosen.tta and chosen.min_area > 0  # so that the example tells something
    for p in postprocessing.PROBABILITIES:
        same = Postprocessing(p, chosen.tta, chosen.min_area)
        assert scores[f"{p:.2f}"] == pytest.approx(results[same])
