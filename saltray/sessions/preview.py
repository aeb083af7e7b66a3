"""What `--dry-run` shows: the space, sampled configurations, and the plan with its estimated time."""

import math
from collections.abc import Sequence
from pathlib import Path

import optuna
import ray
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from rich.markup import escape
from rich.table import Table

from saltray import connection
from saltray.config import TrialConfig, counted
from saltray.data import dataset, splitting
from saltray.ensembles import refits
from saltray.network.model import build_model, count_parameters
from saltray.quiet import quiet
from saltray.records import run
from saltray.records.settings import Settings
from saltray.search import space as spaces
from saltray.search.engine import REDUCTION, rungs
from saltray.search.packing import most_side_by_side, tiles_per_second, together
from saltray.sessions import session, summary
from saltray.sessions.view import Terminal, duration, text

SAMPLES = 10


def show(settings: Settings, *, address: str | None, synthetic: bool) -> None:
    """Print the space, ten sampled configurations with their parameter counts, and the plan.

    The networks are timed on noise, on a worker of the cluster as a trial would have. Nothing is written; not
    even the tiles of a run on `synthetic` ones.
    """
    space = spaces.load(Path(settings.space))
    for other in filter(None, [settings.warm_start, *settings.ensemble_with]):
        run.read(run.fetched(other))
    count = session.DEMO_TILES
    if not synthetic:
        count = len(dataset.read_train(dataset.open_folder(settings.data)).rows)
    console = Terminal()
    with console.status("starting Ray"), quiet(None):
        samples = spaces.sample(
            space, SAMPLES, epochs=settings.epochs, seed=settings.seed, workers=settings.workers_per_trial
        )
        connection.connect(address)
    try:
        summary.tell_busy(console)
        chosen = session.plan_for(console, settings, space)
        with console.status("timing the sampled networks"), quiet(None):
            share = chosen.resources
            # Of those that share a GPU, as many as run at once.
            sharing = min(round(1 / share.gpus) if 0 < share.gpus < 1 else 1, chosen.concurrency)
            if sharing > 1:
                sharing = min(sharing, most_side_by_side(connection.nodes(), share.cpus))
            task = ray.remote(tiles_per_second).options(num_cpus=share.training()["CPU"])

            def rate_of(config: TrialConfig) -> float:
                if share.gpus:  # one that is too large is told as such
                    each = together(config.to_dict(), share, sharing) / sharing
                else:
                    each = ray.get(task.remote(config.to_dict(), share))
                return each * share.workers

            rates = [rate_of(config) for _, config in samples]
    finally:
        connection.disconnect()
    training_tiles = count * (splitting.FOLDS - 1) // splitting.FOLDS
    trial_seconds = [settings.epochs * training_tiles / rate if rate else math.inf for rate in rates]
    console.print(f"[bold]{escape(str(space.path))}[/]\n")
    console.print(_parameters([drawn for drawn, _ in samples]))
    console.print()
    console.print(_samples(samples, rates, trial_seconds))
    console.print(
        f"\n[bold]{training_tiles}[/] training tiles of {count}; [bold]{settings.extent}[/], "
        f"{chosen}; searcher {settings.searcher}, scheduler {settings.scheduler}.",
        soft_wrap=True,
    )
    fitting = [seconds for seconds in trial_seconds if seconds < math.inf]
    if not fitting:
        console.print("None of them fits into its share of a GPU's memory.", style="yellow")
        return
    mean = sum(fitting) / len(fitting)
    console.print(_estimate(settings, mean, chosen.concurrency), soft_wrap=True)
    if settings.folds is not None:
        console.print(_refits(settings, count, mean / training_tiles, chosen.concurrency), soft_wrap=True)
    if settings.blends:
        console.print("Then the submission is an ensemble's.")


def _parameters(drawn: Sequence[optuna.trial.FrozenTrial]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("parameter", "values", "drawn in"):
        table.add_column(name)
    distributions = {name: d for trial in drawn for name, d in trial.distributions.items()}
    for name, distribution in distributions.items():
        times = sum(name in trial.params for trial in drawn)
        when = "every sample" if times == len(drawn) else f"{times} of {len(drawn)} samples: conditional"
        table.add_row(escape(name), escape(_values(distribution)), when)
    return table


def _values(distribution: optuna.distributions.BaseDistribution) -> str:
    """Write a distribution in words."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    if isinstance(distribution, FloatDistribution | IntDistribution):
        step = f", steps of {distribution.step:g}" if distribution.step not in (None, 1) else ""
        log = ", logarithmic" if distribution.log else ""
        return f"{distribution.low:g} to {distribution.high:g}{step}{log}"
    return str(distribution)


def _samples(
    samples: Sequence[tuple[optuna.trial.FrozenTrial, TrialConfig]],
    rates: Sequence[float],
    seconds: Sequence[float],
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("weights", "tiles/s", "full trial (h:m:s)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sampled configuration", overflow="fold")
    for (drawn, config), rate, time_ in zip(samples, rates, seconds, strict=True):
        with torch.device("meta"):
            weights = count_parameters(build_model(config.model))
        speed = (f"{rate:.0f}", duration(time_)) if rate else ("too large", "–")
        table.add_row(f"{weights:,}", *speed, text(drawn.params))
    return table


def expected_epochs(epochs: int) -> float:
    """Return the mean epochs of a trial under ASHA where one in `REDUCTION` goes on at each rung."""
    mean, reached, share = 0.0, 0, 1.0
    for rung in rungs(epochs):
        mean += share * (rung - reached)
        reached, share = rung, share / REDUCTION
    return mean + share * (epochs - reached)


def _estimate(settings: Settings, trial_seconds: float, concurrency: int) -> str:
    most = trial_seconds * settings.trials / concurrency
    words = f"Estimated, of training alone: {duration(most)}, if no trial is stopped early"
    if settings.scheduler == "asha":
        share = expected_epochs(settings.epochs) / settings.epochs
        words += f"; about {duration(most * share)} where ASHA stops two of three at each rung"
    bounds = [f"{duration(settings.time_budget)} by --time-budget"] if settings.time_budget else []
    bounds += [f"{settings.gpu_hours:g} GPU-hours"] if settings.gpu_hours else []
    return words + (f"; cut off at {' or '.join(bounds)}" if bounds else "") + "."


def _refits(settings: Settings, tiles: int, tile_seconds: float, concurrency: int) -> str:
    """Write what the refits may take.

    Args:
        settings: with folds.
        tiles: all that are labelled.
        tile_seconds: of a mean trial, for each of its training tiles, over all epochs.
        concurrency: how many run side by side.
    """
    folds = settings.folds or 0
    configurations = min(settings.ensemble or 1, settings.trials)
    number, size = configurations * folds, tiles * (folds - 1) // folds
    seconds = math.ceil(number / concurrency) * tile_seconds * size
    words = (
        f"Then {number} refits: {refits.describe(configurations, folds)}, each of {size} "
        f"training tiles and {counted(settings.epochs, 'epoch')}, none stopped early; "
        f"about {duration(seconds)}"
    )
    if settings.time_budget or settings.gpu_hours:
        words += "; they wait where a budget ends the search first"
    if settings.pseudo_labels:
        words += "; then those of the ensemble's members once more, with pseudo-labelled test tiles too"
    return words + "."
