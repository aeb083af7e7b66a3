"""The contest's metric: mean precision over ten IoU thresholds, averaged over the tiles.

Per tile: the share of the thresholds 0.50, 0.55 .. 0.95 that the IoU exceeds, strictly. A tile whose truth
and prediction are both empty scores 1; one of them alone empty, 0. Source: the evaluation page of Kaggle's
TGS Salt Identification Challenge. Two counts per tile, intersection and union, carry all of it: they are
whole numbers, so they can be summed over batches, workers and machines without a rounding error.
"""

import numpy as np
import numpy.typing as npt

IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""The literal thresholds; `np.arange(0.5, 1, 0.05)` would give 0.6000000000000001."""

_TILES_AT_ONCE = 256


def overlap(
    predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count the pixels of the intersection and of the union of each pair of masks.

    Args:
        predicted: boolean masks of shape (tiles, height, width).
        truth: boolean masks of the same shape.

    Returns:
        Two int64 arrays of shape (tiles,).

    Raises:
        ValueError: the shapes differ or are not three-dimensional.
    """
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise ValueError(
            f"masks of shapes {predicted.shape} and {truth.shape}: expected two of (tiles, h, w)"
        )
    tiles = len(truth)
    intersection, union = np.empty(tiles, np.int64), np.empty(tiles, np.int64)
    # In chunks that fit the cache; the whole set at once would go through memory several times.
    for i in range(0, tiles, _TILES_AT_ONCE):
        p = predicted[i : i + _TILES_AT_ONCE].reshape(-1, truth[0].size)
        t = truth[i : i + _TILES_AT_ONCE].reshape(-1, truth[0].size)
        intersection[i : i + len(p)] = np.count_nonzero(p & t, axis=1)
        union[i : i + len(p)] = np.count_nonzero(p | t, axis=1)
    return intersection, union


def precision(intersection: npt.ArrayLike, union: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return each tile's mean precision over the ten thresholds, in [0, 1], from its pixel counts.

    The arrays may have any one shape; the result has it too.
    """
    intersection, union = np.asarray(intersection, np.float64), np.asarray(union, np.float64)
    # The quotient of whole numbers is correctly rounded, so an IoU of exactly 0.6 equals the literal 0.6.
    iou = intersection / np.maximum(union, 1)
    passed: npt.NDArray[np.float64] = sum((iou > t).astype(np.float64) for t in IOU_THRESHOLDS)
    return np.where(union == 0, 1.0, passed / len(IOU_THRESHOLDS))


def mean_precision(predicted: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> float:
    """Return the contest's score of boolean masks of shape (tiles, height, width), in [0, 1]."""
    return float(precision(*overlap(predicted, truth)).mean())
