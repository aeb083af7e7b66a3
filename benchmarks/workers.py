"""Trials of several workers on a simulated cluster: what an epoch costs beside its tiles, and what DDP gains.

Four machines of one CPU each, all on this one: with two real cores, two workers can gain, four only cost.
"""

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
EPOCHS = 4
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
        epoch, _ = _epoch(trials.space, tiles.part(0, TRIVIAL), validation, workers)
        note = f"a network of a few weights, {TRIVIAL} tiles: nearly all of it is overhead"
        what = f"an epoch's overhead, {workers} worker{'s' * (workers > 1)}"
        rows.append(Row(what, epoch, "s", None, None, note))
    one, two = (_epoch(seeds_unet, tiles.part(0, SEEDS), validation, n) for n in (1, 2))
    note = (
        f"{two[1]:.0f} tiles/s in training against {one[1]:.0f}; one thread a worker; epochs of {SEEDS} "
        f"tiles in {two[0]:.1f} s against {one[0]:.1f}"
    )
    rows.append(Row("the baseline U-Net, CPU: 2 workers over 1", one[0] / two[0], "x", None, None, note))
    connection.disconnect()
    cluster.shutdown()  # type: ignore[no-untyped-call]
    return rows


def _epoch(draw: Any, training: Arrays, validation: Arrays, workers: int) -> tuple[float, float]:
    """Run one trial; return the mean seconds from report to report, and its best tiles a second.

    Not the median: Ray Train asks its workers for reports a few times a second, which short epochs would
    show.
    """
    clock = Clock()
    config = SearchConfig(trials=1, epochs=EPOCHS, scheduler="none")
    chosen = plan_here(1, workers=workers, cpus=1)
    study = run_here(draw, share(training, validation, workers), chosen, config, callbacks=[clock])
    rates = [row["tiles_per_second"] for row in study.trials[0].user_attrs["epochs"]]
    return (clock.reported[-1] - clock.reported[0]) / (len(clock.reported) - 1), max(rates)
