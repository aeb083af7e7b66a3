"""Trials of several workers on a simulated cluster: what an epoch costs beside its tiles, and what DDP gains.

Four machines of one CPU each, all on this one: with two real cores, two workers can gain, four only cost.
"""

from itertools import pairwise
from statistics import mean
from typing import Any

import optuna
from ray.cluster_utils import Cluster

from benchmarks import trials
from benchmarks.peers import Arrays, synthetic
from benchmarks.rows import Row
from benchmarks.searches import Clock, plan_here, run_here, share
from saltray import connection
from saltray.config import SearchConfig

MACHINES = 4
EPOCHS, SETTLE = 4, 1
"""Of the baseline U-Net; those that are left out."""
SHORT_EPOCHS, ALL_WARM = 12, 6
"""Of the trivial network. Where an epoch's task is the first on its machine, it waits for a new process: that
comes once, and is told apart."""
VALIDATION = 32
TRIVIAL, SEEDS = 128, 192
"""Training tiles for the trivial network, and for the baseline U-Net."""


def seeds_unet(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw the baseline U-Net."""
    return {"optim": {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-3)}, "batch_size": 32}


def measure() -> list[Row]:
    """Measure epochs of 1, 2 and 4 workers."""
    tiles = synthetic(SEEDS + VALIDATION)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    for _ in range(MACHINES - 1):
        cluster.add_node(num_cpus=1)
    connection.connect(cluster.address)
    validation = tiles.part(SEEDS, len(tiles))
    rows = []
    for workers in (1, 2, 4):
        gaps, _ = _epochs(trials.space, tiles.part(0, TRIVIAL), validation, workers, SHORT_EPOCHS)
        epoch, first = mean(gaps[ALL_WARM:]), sum(gaps[:ALL_WARM])
        note = (
            f"a network of a few weights, {TRIVIAL} tiles: nearly all of it is overhead; epochs "
            f"{ALL_WARM + 2} to {SHORT_EPOCHS}. Epochs 2 to {ALL_WARM + 1}, with new processes on the "
            f"machines, took {first - ALL_WARM * epoch:.1f} s more in all"
        )
        what = f"an epoch's overhead, {workers} worker{'s' * (workers > 1)}"
        rows.append(Row(what, epoch, "s", None, None, note))
    cluster.add_node(num_cpus=2)  # for the worker of two threads alone: what a user with two cores has
    training = tiles.part(0, SEEDS)
    (two, rate), *others = (
        _epochs(seeds_unet, training, validation, workers, EPOCHS, cpus)
        for workers, cpus in ((2, 1), (1, 1), (1, 2))
    )
    for (gaps, other), threads in zip(others, ("one", "two"), strict=True):
        mine, its = mean(two[SETTLE:]), mean(gaps[SETTLE:])
        note = (
            f"{rate:.0f} tiles/s in training against {other:.0f}; epochs of {SEEDS} tiles in {mine:.1f} s "
            f"against {its:.1f}"
        )
        what = f"the baseline U-Net, CPU: 2 workers of one thread over 1 of {threads}"
        rows.append(Row(what, its / mine, "x", None, None, note))
    connection.disconnect()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    return rows


def _epochs(
    draw: Any, training: Arrays, validation: Arrays, workers: int, epochs: int, cpus: int = 1
) -> tuple[list[float], float]:
    """Run one trial; return the seconds from report to report, and its best tiles a second.

    Their mean is to be taken, not the median: Ray Train asks its workers for reports a few times a second,
    which short epochs would show.
    """
    clock = Clock()
    config = SearchConfig(trials=1, epochs=epochs, scheduler="none")
    chosen = plan_here(1, workers=workers, cpus=cpus)
    study = run_here(draw, share(training, validation, workers), chosen, config, callbacks=[clock])
    rates = [row["tiles_per_second"] for row in study.trials[0].user_attrs["epochs"]]
    return [later - earlier for earlier, later in pairwise(clock.reported)], max(rates)
