from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from saltray.contest import metrics

EXACT_THRESHOLDS = [Fraction(k, 20) for k in range(10, 20)]


def slow_precision(intersection: int, union: int) -> float:
    if union == 0:
        return 1.0
    return sum(Fraction(intersection, union) > t for t in EXACT_THRESHOLDS) / 10


def random_masks(shape: tuple[int, int, int], share: float, seed: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(seed).random(shape) < share


def test_thresholds_are_the_literals() -> None:
    assert metrics.IOU_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


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
