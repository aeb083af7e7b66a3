"""The fixed cost of a one-worker trial: start, stream, checkpoint, result."""

from itertools import pairwise
from typing import Any

import optuna

from benchmarks.peers import synthetic
from benchmarks.rows import Row, at_most, median
from benchmarks.searches import Clock, plan_here, run_here, share
from saltray import connection
from saltray.config import SearchConfig

TRAINING, VALIDATION = 64, 32
TRIALS = 12
SETTLE = 2
"""Trials before the counted ones: the first starts the actor."""


def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw a network of a few weights."""
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    model = {"filters": 1, "levels": 1, "dropout": 0.0}
    return {"model": model, "optim": {"learning_rate": rate}, "batch_size": 32}


def measure() -> list[Row]:
    """Run trials one after another; the whole of one bounds what it costs beside its training."""
    tiles = synthetic(TRAINING + VALIDATION)
    training, validation = tiles.part(0, TRAINING), tiles.part(TRAINING, len(tiles))
    connection.connect(None, cpus=2)
    clock = Clock()
    config = SearchConfig(trials=TRIALS, epochs=1, scheduler="none")
    # One at a time. One thread: on networks this small a second one only waits.
    run_here(space, share(training, validation), plan_here(1, cpus=1), config, callbacks=[clock])
    connection.disconnect()
    whole = [later - earlier for earlier, later in pairwise(clock.ended)][SETTLE:]
    note = f"a whole trial: one epoch of {TRAINING} tiles, a network of a few weights, its training included"
    return [median("fixed cost of a one-worker trial", whole, "s", at_most(1.0), note)]
