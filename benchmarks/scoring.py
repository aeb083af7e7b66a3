"""The metric, against a loop over tiles and thresholds."""

import statistics

import numpy as np

from benchmarks.rows import Row, at_least, interleaved, median, seconds
from saltray import demo
from saltray.contest import metrics

TILES = 18_000


def measure() -> list[Row]:
    """Score 18,000 pairs of masks at all ten thresholds."""
    rng = np.random.default_rng(0)
    some = np.stack([demo.tile(rng)[1] for _ in range(300)])
    truth, predicted = some[rng.integers(0, 300, TILES)], some[rng.integers(0, 300, TILES)]

    def plain() -> float:
        scores = []
        for p, t in zip(predicted, truth, strict=True):
            union = np.logical_or(p, t).sum()
            iou = np.logical_and(p, t).sum() / union if union else 1.0
            scores.append(np.mean([iou > t for t in metrics.IOU_THRESHOLDS]) if union else 1.0)
        return float(np.mean(scores))

    assert abs(metrics.mean_precision(predicted, truth) - plain()) < 1e-12
    ours, peer = interleaved(
        lambda: seconds(lambda: metrics.mean_precision(predicted, truth)), lambda: seconds(plain), 5
    )
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    note = f"{statistics.median(ours):.2f} s for {TILES:,} pairs of masks, against a loop over the tiles"
    return [median("scoring a submission", ratios, "x", at_least(1.0), note, ours=ours, peer=peer)]
