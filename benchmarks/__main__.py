"""`python -m benchmarks`: measures, each against its peer in the same run, and prints a table.

Results go to `benchmarks/results/NAME.json` with date, hardware and versions; commit what you want to keep.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from saltray import demo, metrics, run
from saltray.cli import run_program
from saltray.config import UserError

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def metric() -> Row:
    """Score 18,000 pairs of masks at all ten thresholds, against a loop over tiles and thresholds."""
    rng = np.random.default_rng(0)
    some = np.stack([demo.tile(rng)[1] for _ in range(300)])
    truth, predicted = some[rng.integers(0, 300, 18_000)], some[rng.integers(0, 300, 18_000)]

    def slow(count: int) -> float:
        scores = []
        for p, t in zip(predicted[:count], truth[:count], strict=True):
            union = np.logical_or(p, t).sum()
            iou = np.logical_and(p, t).sum() / union if union else 1.0
            scores.append(np.mean([iou > t for t in metrics.IOU_THRESHOLDS]) if union else 1.0)
        return float(np.mean(scores))

    seconds, value = timed(lambda: metrics.mean_precision(predicted, truth))
    peer, slow_value = timed(lambda: slow(18_000))
    assert abs(value - slow_value) < 1e-12
    return {"seconds": seconds, "peer_seconds": peer, "ratio": peer / seconds, "goal": "about 1 s"}


def timed(function: Callable[[], float], runs: int = 5) -> tuple[float, float]:
    """Return the median time of several calls, and the last call's value."""
    times, value = [], 0.0
    for _ in range(runs):
        started = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - started)
    return statistics.median(times), value


BENCHMARKS: dict[str, Callable[[], Row]] = {"metric": metric}


def main(only: Annotated[list[str] | None, typer.Option(help="Run just these.")] = None) -> None:
    """Measure, print, and write the results."""
    unknown = set(only or ()) - BENCHMARKS.keys()
    if unknown:
        raise UserError(f"--only {min(unknown)}: there are {', '.join(BENCHMARKS)}")
    for name in only or BENCHMARKS:
        row = BENCHMARKS[name]()
        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        typer.echo(f"{name:<12}" + "  ".join(cells))
        RESULTS.mkdir(exist_ok=True)
        content = json.dumps({"result": row, "environment": run.environment()}, indent=2)
        (RESULTS / f"{name}.json").write_text(content + "\n")


if __name__ == "__main__":
    run_program(main)
