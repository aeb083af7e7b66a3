import itertools
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from scipy.special import logit as scipy_logit
from sklearn.metrics import jaccard_score

from saltray.contest import metrics
from saltray.contest.metrics import Postprocessing

EXACT_THRESHOLDS = [Fraction(k, 20) for k in range(10, 20)]


def slow_precision(intersection: int, union: int) -> float:
    if union == 0:
        return 1.0
    return sum(Fraction(intersection, union) > t for t in EXACT_THRESHOLDS) / 10


def random_masks(shape: tuple[int, int, int], share: float, seed: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(shape) < share


def test_thresholds_are_the_literals() -> None:
    assert metrics.IOU_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    np.testing.assert_allclose(metrics.PROBABILITIES, np.linspace(0.2, 0.8, 31))
    assert 0.5 in metrics.PROBABILITIES


@given(st.data())
def test_precision_agrees_with_exact_fractions(data: st.DataObject) -> None:
    unions = data.draw(st.lists(st.integers(0, 101 * 101), min_size=1, max_size=6))
    intersections = [data.draw(st.integers(0, union)) for union in unions]
    expected = [slow_precision(i, u) for i, u in zip(intersections, unions, strict=True)]
    np.testing.assert_array_equal(metrics.precision(intersections, unions), expected)


@pytest.mark.parametrize("k", range(10, 21))
@pytest.mark.parametrize("scale", [1, 3, 7, 510])
def test_iou_equal_to_a_threshold_does_not_pass_it(k: int, scale: int) -> None:
    # k / 20 is 0.50, 0.55 .. 1.00; at 12 / 20 the literal 0.6 is not passed: 0.2, not 0.3.
    assert metrics.precision(k * scale, 20 * scale) == (k - 10) / 10


def test_one_pixel_more_than_six_tenths_passes() -> None:
    np.testing.assert_array_equal(metrics.precision([600, 601], [1000, 1000]), [0.2, 0.3])


def test_precision_keeps_the_shape_of_its_counts() -> None:
    union = np.arange(12).reshape(3, 4)
    assert metrics.precision(union, union).shape == (3, 4)


def test_constant_masks() -> None:
    empty, full = np.zeros((101, 101), bool), np.ones((101, 101), bool)
    predicted, truth = np.stack([empty, empty, full, full]), np.stack([empty, full, empty, full])
    np.testing.assert_array_equal(metrics.precision(*metrics.overlap(predicted, truth)), [1, 0, 0, 1])
    assert metrics.mean_precision(predicted, truth) == 0.5


def test_one_pixel_against_an_empty_mask_scores_zero() -> None:
    truth = np.zeros((1, 101, 101), bool)
    predicted = truth.copy()
    predicted[0, 100, 100] = True
    assert metrics.mean_precision(predicted, truth) == 0
    assert metrics.mean_precision(truth, predicted) == 0


@pytest.mark.parametrize("tiles", [1, 255, 256, 257, 600])
def test_overlap_counts_every_tile_whatever_their_number(tiles: int) -> None:
    predicted, truth = random_masks((tiles, 4, 5), 0.6, 1), random_masks((tiles, 4, 5), 0.4, 2)
    intersection, union = metrics.overlap(predicted, truth)
    assert intersection.shape == union.shape == (tiles,)
    for i in range(tiles):
        p, t = set(np.flatnonzero(predicted[i])), set(np.flatnonzero(truth[i]))
        assert (intersection[i], union[i]) == (len(p & t), len(p | t))


def test_mean_precision_agrees_with_scikit_learn() -> None:
    truth = random_masks((40, 12, 11), 0.5, 3)
    noise = np.random.default_rng(4).random((40, 1, 1)) * 0.4
    predicted = truth ^ (np.random.default_rng(5).random(truth.shape) < noise)
    ious = [jaccard_score(t.ravel(), p.ravel()) for t, p in zip(truth, predicted, strict=True)]
    expected = np.mean([[iou > t for t in metrics.IOU_THRESHOLDS] for iou in ious])
    assert 0.2 < expected < 0.8
    assert metrics.mean_precision(predicted, truth) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("a", "b"), [((2, 3, 3), (1, 3, 3)), ((2, 3, 3), (2, 3, 4)), ((3, 3), (3, 3))])
def test_wrong_shapes_are_refused(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected two of \(tiles, h, w\)"):
        metrics.overlap(np.zeros(a, bool), np.zeros(b, bool))


def test_logit_of_a_probability() -> None:
    assert metrics.logit(0.5) == 0
    for p in (*metrics.PROBABILITIES, 1e-9):
        assert metrics.logit(p) == pytest.approx(scipy_logit(p), rel=1e-12, abs=1e-15)


def test_thresholds_cut_the_probability_not_the_logit() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 1.5, (7, 6, 5)).astype(np.float32)
    truth = rng.random(logits.shape) < 0.5
    intersection, union = metrics.overlap_by_threshold(logits, truth)
    assert intersection.shape == union.shape == (7, len(metrics.PROBABILITIES))
    for column, p in enumerate(metrics.PROBABILITIES):
        salt = expit(logits.astype(np.float64)) > p
        np.testing.assert_array_equal(intersection[:, column], (salt & truth).sum(axis=(1, 2)))
        np.testing.assert_array_equal(union[:, column], (salt | truth).sum(axis=(1, 2)))


def both_views(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.stack([counts, counts], axis=1)


def test_chosen_threshold_is_the_best_one() -> None:
    truth = np.zeros((3, 10, 10), bool)
    truth[:, 2:8, 2:8] = True
    # Salt has probability 0.72 and its surroundings 0.65: only thresholds between them score 1.
    logits = np.where(truth, metrics.logit(0.72), metrics.logit(0.65)).astype(np.float32)
    intersection, union = metrics.overlap_by_threshold(logits, truth)
    chosen, scores = metrics.choose_postprocessing(
        both_views(intersection), both_views(union), truth.sum(axis=(1, 2))
    )
    # Mirrored views that change nothing are not worth their time.
    assert chosen == Postprocessing(threshold=0.66, tta=False, min_area=0)
    assert [p for p, score in scores.items() if score == 1] == ["0.66", "0.68", "0.70"]
    assert list(scores) == [f"{p:.2f}" for p in metrics.PROBABILITIES]
    assert scores["0.72"] == scores["0.80"] == 0


def test_equally_good_thresholds_fall_to_the_middle() -> None:
    counts = np.full((4, 2, len(metrics.PROBABILITIES)), 9)
    chosen, _ = metrics.choose_postprocessing(counts, counts, np.full(4, 9))
    assert chosen == Postprocessing(threshold=0.5)


@pytest.mark.parametrize("seed", range(20))
def test_equal_views_stay_equal_whatever_the_order_of_the_tiles(seed: int) -> None:
    rng = np.random.default_rng(seed)
    union = np.full((200, 1, len(metrics.PROBABILITIES)), 1000)
    intersection = rng.integers(400, 1001, (200, 1, 1)) + 0 * union
    views = np.concatenate([intersection, intersection[rng.permutation(200)]], axis=1)
    chosen, _ = metrics.choose_postprocessing(views, np.repeat(union, 2, axis=1), np.full(200, 1000))
    assert chosen == Postprocessing()


def test_postprocessing_in_words() -> None:
    assert str(Postprocessing.of({"threshold": 0.46, "trial": 3})) == "at probability 0.46"
    assert str(Postprocessing(0.5, True, 40)) == (
        "at probability 0.50, in the mean with the mirrored tile's prediction, masks below 40 pixels emptied"
    )


def test_threshold_is_chosen_by_the_mean_over_tiles() -> None:
    n = len(metrics.PROBABILITIES)
    union = np.full((2, 2, n), 1000)
    intersection = np.full((2, 2, n), 400)
    intersection[0, :, 3], intersection[:, :, 20] = 1000, 900  # one perfect tile against two good ones
    chosen, scores = metrics.choose_postprocessing(intersection, union, np.full(2, 1000))
    assert chosen.threshold == metrics.PROBABILITIES[20]
    assert scores["0.26"] == pytest.approx(0.5)
    assert scores["0.60"] == pytest.approx(0.8)


def test_postprocessing_agrees_with_every_candidate_applied_to_the_masks() -> None:
    rng = np.random.default_rng(8)
    truth = np.zeros((40, 16, 16), bool)
    for i in range(0, 40, 2):
        truth[i, : 4 + i // 4, 3:12] = True
    noise = rng.normal(0, 1.2, truth.shape)
    views = [2.0 * truth - 1.5 + noise, 2.0 * truth - 1.5 + 0.7 * noise]
    counts = [metrics.overlap_by_threshold(v.astype(np.float32), truth) for v in views]
    intersection, union = (np.stack([c[i] for c in counts], axis=1) for i in (0, 1))
    salt = truth.sum(axis=(1, 2))
    chosen, scores = metrics.choose_postprocessing(intersection, union, salt)
    results = {}
    for tta, p, least in itertools.product((False, True), metrics.PROBABILITIES, metrics.MIN_AREAS):
        masks = expit(views[tta].astype(np.float32).astype(np.float64)) > p
        masks[masks.sum(axis=(1, 2)) < least] = False
        applied = metrics.apply_postprocessing(Postprocessing(p, tta, least), intersection, union, salt)
        np.testing.assert_array_equal(applied, metrics.overlap(masks, truth))
        results[Postprocessing(p, tta, least)] = metrics.mean_precision(masks, truth)
    assert results[chosen] == max(results.values())
    assert chosen.tta and chosen.min_area > 0  # so that the example tells something
    for p in metrics.PROBABILITIES:
        same = Postprocessing(p, chosen.tta, chosen.min_area)
        assert scores[f"{p:.2f}"] == pytest.approx(results[same])
