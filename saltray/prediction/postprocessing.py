"""What makes masks of a network's output, and how it is chosen: on counts of validation tiles' pixels."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from saltray.contest.metrics import IOU_THRESHOLDS, overlap, precision

PROBABILITIES = tuple(round(0.2 + 0.02 * i, 2) for i in range(31))
"""Candidate thresholds on the predicted probability of salt: 0.20, 0.22 .. 0.80."""

MIN_AREAS = (0, 10, 20, 40, 80, 160)
"""Candidate areas, in pixels, below which a predicted mask becomes empty."""


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


def choose(
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


def apply(
    chosen: Postprocessing,
    intersection: npt.NDArray[np.int64],
    union: npt.NDArray[np.int64],
    truth: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each tile's intersection and union under a choice, both int64 (tiles,).

    Args:
        chosen: its threshold is one of `PROBABILITIES`.
        intersection: pixel counts of shape (tiles, 2, thresholds), as `choose` takes them.
        union: the same for the unions.
        truth: pixels of the true masks, of shape (tiles,).

    Raises:
        ValueError: the threshold is no candidate, so nothing was counted at it.
    """
    place = int(chosen.tta), PROBABILITIES.index(chosen.threshold)
    return drop_small(intersection[:, *place], union[:, *place], truth, chosen.min_area)
