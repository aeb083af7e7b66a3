"""`python -m benchmarks.simulation`: which engine finds the best trial at equal budget, on simulated curves.

Learning curves are drawn from formulas, an epoch costs one unit, and the searchers and schedulers are the
real ones, driven as Ray Tune drives them. So hundreds of searches take minutes, and the true quality of what
each found is known. Two surfaces: on `aligned`, who leads early leads late; on `crossing`, low learning rates
and strong dropout start slowly and win in the end, which is where early stopping misleads.
"""

import json
import logging
import math
import statistics
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import typer
from optuna.samplers import TPESampler
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from scipy import stats

from saltray.cli import run_program
from saltray.config import SearchConfig
from saltray.records import environment
from saltray.search.engine import GRACE_EPOCHS, METRIC, REDUCTION, make_scheduler
from saltray.search.searcher import StudySearch
from saltray.search.space import Space
from saltray.training.trial import WorkerResources

EPOCHS = 50
BUDGET = 20 * EPOCHS
"""Epochs of a whole search: `python -m saltray.tune`'s default, twenty full trials."""
SIDE_BY_SIDE = 2
NOISE = 0.02
"""Standard deviation of an epoch's mAP, about what small validation sets show."""
DIVERGES = 0.05
"""Half of the trials above this learning rate become NaN in their second epoch."""


def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw a trial; the residual blocks are conditional."""
    architecture = trial.suggest_categorical("architecture", ["unet", "resunet"])
    model = {
        "architecture": architecture,
        "filters": trial.suggest_categorical("filters", [8, 16, 24, 32]),
        "dropout": trial.suggest_float("dropout", 0.0, 0.6),
    }
    if architecture == "resunet":
        model["residual_blocks"] = trial.suggest_int("residual_blocks", 1, 3)
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
    return {"model": model, "optim": {"learning_rate": rate}}


def curve(config: dict[str, Any], surface: str) -> np.ndarray[Any, Any]:
    """Return the noise-free mAP of every epoch: `final - (final - start) exp(-epoch / slowness)`."""
    model, rate = config["model"], math.log10(config["optim"]["learning_rate"])
    final = 0.82 - 0.05 * (rate + 2.7) ** 2 - 0.03 * math.log2(32 / model["filters"])
    final -= 0.3 * (model["dropout"] - 0.25) ** 2
    if model["architecture"] == "resunet":
        final += 0.02 - 0.015 * (model["residual_blocks"] - 2) ** 2
    slowness = 5.0
    if surface == "crossing":
        slowness = 5.0 * 10 ** max(0.0, (-2.0 - rate) / 2) * (1 + 2 * model["dropout"])
    epochs = np.arange(1, EPOCHS + 1)
    start = 0.39  # what the all-empty submission scores
    return np.asarray(np.maximum(final - (final - start) * np.exp(-epochs / slowness), 0.0))


@dataclass(frozen=True)
class Handle:
    """What a scheduler knows a trial by."""

    trial_id: str
    number: int

    @property
    def config(self) -> dict[str, int]:
        """Return the spec's part that a scheduler reads."""
        return {"number": self.number}


@dataclass
class Running:
    """A trial under way: its true curve, and what was seen of it so far."""

    name: str
    true: np.ndarray[Any, Any]
    rng: np.random.Generator
    diverges: bool
    handle: Handle
    epoch: int = 0
    best: float = -1.0
    best_epoch: int = 0


def simulate(make: Callable[[int, Any], tuple[Any, Any]], surface: str, seed: int) -> float:
    """Spend the budget; return the true mAP of the weights that the search would hand over."""
    study = optuna.create_study(direction="maximize", storage=optuna.storages.InMemoryStorage())
    searcher, scheduler = make(seed, study)
    running: list[Running] = []
    spent, number, found = 0, 0, (-1.0, 0.0)
    while spent < BUDGET:
        while len(running) < SIDE_BY_SIDE:
            spec = searcher.suggest(f"t{number}")
            config = spec.get("config", spec)
            rng = np.random.default_rng([seed, number])
            diverges = config["optim"]["learning_rate"] > DIVERGES and rng.random() < 0.5
            handle = Handle(f"t{number}", number)
            scheduler.on_trial_add(None, handle)
            running.append(Running(f"t{number}", curve(config, surface), rng, diverges, handle))
            number += 1
        for trial in list(running):
            spent += 1
            trial.epoch += 1
            if trial.diverges and trial.epoch == 2:
                running.remove(trial)
                value = math.nan if isinstance(searcher, OptunaSearch) else 0.0
                result = _result(trial.epoch, value, finished=True) | {"failed": "the loss is nan"}
                searcher.on_trial_complete(trial.name, result)
                continue
            seen = float(trial.true[trial.epoch - 1] + NOISE * trial.rng.standard_normal())
            if seen > trial.best:
                trial.best, trial.best_epoch = seen, trial.epoch
            found = max(found, (trial.best, float(trial.true[trial.best_epoch - 1])))
            finished = trial.epoch == EPOCHS
            result = _result(trial.epoch, trial.best, finished=finished)
            stop = scheduler.on_trial_result(None, trial.handle, result) == "STOP"
            if finished or stop:
                running.remove(trial)
                searcher.on_trial_complete(trial.name, result)
                scheduler.on_trial_complete(None, trial.handle, result)
            else:
                searcher.on_trial_result(trial.name, result)
    return found[1]


def _result(epoch: int, best: float, *, finished: bool) -> dict[str, Any]:
    row = {"epoch": epoch, METRIC: best, "finished": finished}
    return row | {"training_iteration": epoch, "hostname": "simulated"}


def ours(searcher: Any, scheduler: Any) -> Callable[[int, Any], tuple[Any, Any]]:
    """Make saltray's searcher and scheduler."""

    def make(seed: int, study: Any) -> tuple[Any, Any]:
        config = SearchConfig(epochs=EPOCHS, seed=seed, searcher=searcher, scheduler=scheduler)
        resources = WorkerResources(1, 1, 0)
        search = StudySearch(
            Space(space, (), Path("simulation")), study, config, parallel=True, resources=resources
        )
        return search, make_scheduler(scheduler, EPOCHS, [])

    return make


def plain(seed: int, study: Any) -> tuple[Any, Any]:
    """Make Ray's own OptunaSearch, with the same sampler, and ASHA: stopped trials are told as COMPLETE."""
    sampler = TPESampler(seed=seed, n_startup_trials=10, multivariate=True, group=True, constant_liar=True)
    search = OptunaSearch(space=space, metric=METRIC, mode="max", sampler=sampler)
    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch", metric=METRIC, mode="max", max_t=EPOCHS,
        grace_period=GRACE_EPOCHS, reduction_factor=REDUCTION,
    )  # fmt: skip
    return search, scheduler


ENGINES: dict[str, Callable[[int, Any], tuple[Any, Any]]] = {
    "tpe, asha (saltray's default)": ours("tpe", "asha"),
    "OptunaSearch, ASHA (plain Ray Tune)": plain,
    "random, asha": ours("random", "asha"),
    "random, none": ours("random", "none"),
    "tpe, none": ours("tpe", "none"),
    "tpe, hyperband": ours("tpe", "hyperband"),
    "tpe, median": ours("tpe", "median"),
    "cmaes, asha": ours("cmaes", "asha"),
}
SURFACES = ("aligned", "crossing")


def _one(task: tuple[str, str, int]) -> float:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # of each NaN that OptunaSearch cannot tell
    warnings.simplefilter("ignore")
    engine, surface, seed = task
    return simulate(ENGINES[engine], surface, seed)


def main(
    seeds: Annotated[int, typer.Option(help="Searches of each engine on each surface.")] = 40,
    processes: Annotated[int, typer.Option(help="Searches side by side.")] = 2,
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("benchmarks/results/simulation.json"),
) -> None:
    """Simulate, print a table, and write every single result."""
    tasks = [(e, s, seed) for e in ENGINES for s in SURFACES for seed in range(seeds)]
    with ProcessPoolExecutor(processes) as pool:
        values = dict(zip(tasks, pool.map(_one, tasks, chunksize=4), strict=True))
    first = next(iter(ENGINES))
    rows = []
    for surface in SURFACES:
        default = [values[first, surface, seed] for seed in range(seeds)]
        for engine in ENGINES:
            found = [values[engine, surface, seed] for seed in range(seeds)]
            gain = np.subtract(default, found)
            rows.append(
                {
                    "surface": surface,
                    "engine": engine,
                    "median": statistics.median(found),
                    "mean": statistics.mean(found),
                    "worst": min(found),
                    "default_wins": int((gain > 0).sum()),
                    # The same seeds: a paired test of whether the default's mean is another.
                    "p": float(stats.wilcoxon(gain).pvalue) if engine != first else None,
                    "values": [round(v, 5) for v in found],
                }
            )
            typer.echo(
                f"{surface:<9} {engine:<36} mean {rows[-1]['mean']:.4f}  median {rows[-1]['median']:.4f}  "
                f"worst {rows[-1]['worst']:.4f}  default better in {rows[-1]['default_wins']} of {seeds}"
                + (f", p {rows[-1]['p']:.2g}" if rows[-1]["p"] is not None else "")
            )
    settings = {
        "seeds": seeds,
        "budget": BUDGET,
        "epochs": EPOCHS,
        "side_by_side": SIDE_BY_SIDE,
        "noise": NOISE,
    }
    content = {"settings": settings, "rows": rows, "environment": environment.describe()}
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
