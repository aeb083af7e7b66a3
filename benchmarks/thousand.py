"""A thousand trials that train nothing: what the search itself costs; and a suggestion, as trials grow.

Every trial sleeps, reports its epochs with a checkpoint of one small file, and ends, so that the CPUs are the
driver's. Ideal: trials x seconds of a trial / trials side by side; everything above it (suggestion, start,
results, study, checkpoint) is overhead. A trial takes a fifth of a second, so that the row takes minutes, and
they keep the driver busier than any real search would. So the overhead of one, as it is here, is counted
against a quarter of a minute: what ASHA lets the weakest trials have on a GPU, three epochs of five seconds.
"""

import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from benchmarks import trivial
from benchmarks.rows import Row, at_most, median, seconds
from benchmarks.searches import run_here
from saltray import connection
from saltray.config import SearchConfig
from saltray.records.study import Place, create_study
from saltray.search.plan import Plan
from saltray.search.searcher import COLUMNS, StudySearch
from saltray.search.space import Space

TRIALS, SIDE_BY_SIDE = 1000, 4
EPOCHS, EPOCH_SECONDS = 1, 0.2
REALISTIC = 15.0
"""Seconds of a short real trial."""
SIZES = (10, 100, 300, 1000)
SUGGESTIONS = 7


def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw five parameters, one of them conditional."""
    architecture = trial.suggest_categorical("architecture", ["unet", "resunet"])
    model: dict[str, Any] = {
        "architecture": architecture,
        "filters": trial.suggest_int("filters", 8, 32),
        "dropout": trial.suggest_float("dropout", 0.0, 0.6),
    }
    if architecture == "resunet":
        model["residual_blocks"] = trial.suggest_int("residual_blocks", 1, 3)
    return {"model": model, "optim": {"learning_rate": trial.suggest_float("rate", 1e-4, 1e-1, log=True)}}


def measure() -> list[Row]:
    """Measure the search, and the suggestions."""
    return [*overhead(TRIALS), *suggestions()]


def overhead(trials: int) -> list[Row]:
    """Run the trials through saltray's own search; tell what was measured, and what it is of real trials."""
    connection.connect(None, cpus=SIDE_BY_SIDE)
    sleeping = functools.partial(trivial.run_trial, epoch_seconds=EPOCH_SECONDS)
    chosen = Plan(SIDE_BY_SIDE, trivial.Resources())  # type: ignore[arg-type]
    config = SearchConfig(trials=trials, epochs=EPOCHS, scheduler="none")
    first = SearchConfig(trials=2 * SIDE_BY_SIDE, epochs=1, scheduler="none")
    start = seconds(lambda: run_here(space, None, chosen, first, trainable=sleeping))
    taken = seconds(lambda: run_here(space, None, chosen, config, trainable=sleeping))
    connection.disconnect()
    length = EPOCHS * EPOCH_SECONDS
    ideal = trials * length / SIDE_BY_SIDE
    each = (taken - ideal) * SIDE_BY_SIDE / trials
    note = (
        f"{each:.2f} s a trial; measured: {taken:.0f} s where {ideal:.0f} are ideal: "
        f"trials of {length:g} s, {SIDE_BY_SIDE} side by side, one report and checkpoint each"
    )
    details = {"seconds": taken, "ideal": ideal, "first searches": start}
    what = f"{trials:,} trials: overhead over the ideal time, were they of {REALISTIC:g} s"
    share, own = 100 * each / REALISTIC, 100 * (taken - ideal) / ideal
    return [
        Row(what, share, "%", at_most(10), None, note, details),
        Row(f"the same over their own {length:g} s", own, "%", None, None, "as measured; none is so short"),
    ]


def suggestions() -> list[Row]:
    """Time `StudySearch.suggest` on studies of growing size."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            study = create_study(Place(Path(folder)))
            _fill(study, size)
            config = SearchConfig(trials=10 * size, epochs=50)
            source = Space(space, (), Path("benchmark"))
            searcher = StudySearch(source, study, config, parallel=True, resources=trivial.Resources())  # type: ignore[arg-type]
            times = []
            for i in range(SUGGESTIONS):
                started = time.perf_counter()
                searcher.suggest(f"t{i}")
                times.append(1e3 * (time.perf_counter() - started))
        rows.append(median(f"one TPE suggestion after {size:,} trials", times[1:], "ms", None))
    return rows


def _fill(study: optuna.Study, size: int) -> None:
    """Add ended trials, with the rows that a search writes of 50 epochs."""
    drawn = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    trials = []
    for _ in range(size):
        trial = drawn.ask()
        space(trial)
        score = trial.params["dropout"]
        epoch: dict[str, Any] = dict.fromkeys(COLUMNS, 1.0)
        epoch |= {"host": "h", "ended": "2026-01-01T00:00:00+00:00"}
        trials.append(
            create_trial(
                state=TrialState.COMPLETE,
                value=score,
                params=trial.params,
                distributions=trial.distributions,
                intermediate_values={50: score},
                user_attrs={"epochs": [epoch | {"epoch": e} for e in range(1, 51)]},
            )
        )
    study.add_trials(trials)
