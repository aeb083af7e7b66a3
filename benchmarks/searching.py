"""A search of twenty trials, against the plain sequential Optuna loop over the same configurations."""

import time
from typing import Any

import optuna
import torch

from benchmarks.peers import Arrays, PlainLoop, synthetic
from benchmarks.rows import Row, at_most, interleaved, median
from benchmarks.searches import plan_here, run_here, share
from saltray import connection
from saltray.config import SearchConfig, TrialConfig

TRIALS, EPOCHS, CPUS = 20, 2, 2
TRAINING, VALIDATION = 192, 64
RUNS = 1


def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw a small U-Net, as `search_spaces/demo.py` does."""
    return {
        "model": {
            "filters": trial.suggest_categorical("filters", [4, 8]),
            "levels": 3,
            "dropout": trial.suggest_float("dropout", 0.0, 0.2, step=0.05),
        },
        "optim": {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True)},
        "batch_size": trial.suggest_categorical("batch_size", [8, 16]),
    }


def configurations() -> list[dict[str, Any]]:
    """Return the parameters of the twenty trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [_drawn(study) for _ in range(TRIALS)]


def _drawn(study: optuna.Study) -> dict[str, Any]:
    trial = study.ask()
    space(trial)
    return trial.params


def search_plainly(queue: list[dict[str, Any]], training: Arrays, validation: Arrays) -> float:
    """Run the trials one after another, with two threads; return the seconds."""
    torch.set_num_threads(CPUS)
    started = time.perf_counter()
    study = optuna.create_study(direction="maximize")
    for parameters in queue:
        study.enqueue_trial(parameters)

    def objective(trial: optuna.Trial) -> float:
        loop = PlainLoop(TrialConfig.from_dict(space(trial)), training, validation)
        return max(loop.epoch() for _ in range(EPOCHS))

    study.optimize(objective, n_trials=TRIALS)
    return time.perf_counter() - started


def search_on_ray(
    queue: list[dict[str, Any]], training: Arrays, validation: Arrays, starts: list[float]
) -> float:
    """Run the same trials as a session does, Ray's start and the tiles' way into its store included.

    Args:
        queue: the trials' parameters.
        training: tiles.
        validation: tiles.
        starts: gets the seconds of Ray's start.
    """
    started = time.perf_counter()
    connection.connect(None, cpus=CPUS)
    starts.append(time.perf_counter() - started)
    config = SearchConfig(trials=TRIALS, epochs=EPOCHS, scheduler="none")
    run_here(space, share(training, validation), plan_here(TRIALS), config, enqueue=queue)
    taken = time.perf_counter() - started
    connection.disconnect()
    return taken


def measure() -> list[Row]:
    """Measure both."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tiles = synthetic(TRAINING + VALIDATION)
    training, validation = tiles.part(0, TRAINING), tiles.part(TRAINING, len(tiles))
    queue, starts = configurations(), list[float]()
    ours, peer = interleaved(
        lambda: search_on_ray(queue, training, validation, starts),
        lambda: search_plainly(queue, training, validation),
        RUNS,
    )
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    note = (
        f"{ours[0]:.0f} s, of which Ray's start {starts[0]:.0f} s, against {peer[0]:.0f}: here less is better"
    )
    name = f"a {TRIALS}-trial search of {EPOCHS} epochs of {TRAINING} tiles, wall time"
    return [median(name, ratios, "x", at_most(1.0), note, ours=ours, peer=peer)]
