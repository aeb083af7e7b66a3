"""The contest's metric: mean precision over ten IoU thresholds, averaged over the tiles.

Per tile: the share of the thresholds 0.50, 0.55 .. 0.95 that the IoU exceeds, strictly. A tile whose truth
and prediction are both empty scores 1; one of them alone empty, 0. Source: the evaluation page of Kaggle's
TGS Salt Identification Challenge. Two counts per tile, intersection and union, carry all of it: they are
whole numbers, so they can be summed over batches, workers and machines without a rounding error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

IOU_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""The literal thresholds; `np.arange(0.5, 1, 0.05)` would give 0.6000000000000001."""

PROBABILITIES = tuple(round(0.2 + 0.02 * i, 2) for i in range(31))
"""Candidate thresholds on the predicted probability of salt: 0.20, 0.22 .. 0.80."""

MIN_AREAS = (0, 10, 20, 40, 80, 160)
"""Candidate areas, in pixels, below which a predicted mask becomes empty."""

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


def logit(probability: float) -> float:
    """Return the logit that a network's output must exceed for this probability."""
    return float(np.log(probability) - np.log1p(-probability))


def overlap_by_threshold(
    logits: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count intersections and unions at each of `PROBABILITIES`.

    Args:
        logits: float32 of shape (tiles, height, width).
        truth: boolean masks of the same shape.

    Returns:
        Two int64 arrays of shape (tiles, thresholds).
    """
    columns = [overlap(logits > np.float32(logit(p)), truth) for p in PROBABILITIES]
    return np.stack([c[0] for c in columns], axis=1), np.stack([c[1] for c in columns], axis=1)


@dataclass(frozen=True)
class Postprocessing:
    """What makes masks of a network's output; chosen on validation tiles, and stored with the model."""

    threshold: float = 0.5
    """On the probability of salt."""
    tta: bool = False
    """Test-time augmentation: the mean with the mirrored tile's prediction, mirrored back."""
    min_area: int = 0
    """Pixels below which a mask becomes empty."""

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Self:
        """Take it from a model's metrics; what is not among them is the default."""
        return cls(**{f.name: known[f.name] for f in fields(cls) if f.name in known})

    def __str__(self) -> str:
        """Write it in words."""
        return (
            f"at probability {self.threshold:.2f}"
            + ", in the mean with the mirrored tile's prediction" * self.tta
            + f", masks below {self.min_area} pixels emptied" * bool(self.min_area)
        )


def drop_small(
    intersection: npt.NDArray[np.int64],
    union: npt.NDArray[np.int64],
    truth: npt.NDArray[np.int64],
    min_area: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the counts as they are once predicted masks below an area have become empty.

    Args:
        intersection: pixel counts of any shape.
        union: of the same shape.
        truth: pixels of the true masks; broadcast against these.
        min_area: pixels.
    """
    small = union - truth + intersection < min_area
    return np.where(small, 0, intersection), np.where(small, truth, union)


def choose_postprocessing(
    intersection: npt.NDArray[np.int64], union: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]
) -> tuple[Postprocessing, dict[str, float]]:
    """Choose what scores best; of equals, first no test-time augmentation, the least area, nearest to 0.5.

    Args:
        intersection: pixel counts of shape (tiles, 2, thresholds), as `overlap_by_threshold` returns them,
            without test-time augmentation and with it.
        union: the same for the unions.
        truth: pixels of the true masks, of shape (tiles,).

    Returns:
        The choice, and the score at every candidate threshold under the rest of it, keyed as text.
    """
    candidates = []
    for tta in (False, True):
        counts = intersection[:, int(tta)], union[:, int(tta)]
        for min_area in MIN_AREAS:
            scores = precision(*drop_small(*counts, truth[:, None], min_area))
            # Whole numbers: equals stay equal, whatever the order of the tiles.
            passed = np.rint(scores * len(IOU_THRESHOLDS)).astype(np.int64).sum(axis=0)
            candidates += [
                ((hits, -tta, -min_area, -abs(p - 0.5)), Postprocessing(p, tta, min_area), scores)
                for p, hits in zip(PROBABILITIES, passed.tolist(), strict=True)
            ]
    _, chosen, scores = max(candidates, key=lambda candidate: candidate[0])
    means = scores.mean(axis=0)
    return chosen, {f"{p:.2f}": float(s) for p, s in zip(PROBABILITIES, means, strict=True)}


def apply_postprocessing(
    chosen: Postprocessing,
    intersection: npt.NDArray[np.int64],
    union: npt.NDArray[np.int64],
    truth: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each tile's intersection and union under a choice, both int64 (tiles,).

    Args:
        chosen: its threshold is one of `PROBABILITIES`.
        intersection: pixel counts of shape (tiles, 2, thresholds), as `choose_postprocessing` takes them.
        union: the same for the unions.
        truth: pixels of the true masks, of shape (tiles,).

    Raises:
        ValueError: the threshold is no candidate, so nothing was counted at it.
    """
    place = int(chosen.tta), PROBABILITIES.index(chosen.threshold)
    return drop_small(intersection[:, *place], union[:, *place], truth, chosen.min_area)
