"""A search as a session runs one, without a run's other files: for the rows that need one."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from ray import tune

from benchmarks.peers import Arrays
from benchmarks.training import dataset
from saltray import connection
from saltray.config import SearchConfig
from saltray.quiet import quiet
from saltray.records.study import Place, create_study
from saltray.search import search
from saltray.search.plan import Plan, plan
from saltray.search.space import Space
from saltray.training.trial import Tiles, run_trial

Draw = Callable[[optuna.trial.BaseTrial], dict[str, Any]]


class Clock(tune.Callback):
    """Notes when each trial reports and ends, in seconds."""

    def __init__(self) -> None:
        """Begin."""
        self.reported: list[float] = []
        self.ended: list[float] = []

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any
    ) -> None:
        """Note a report."""
        self.reported.append(time.perf_counter())

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note an end."""
        self.ended.append(time.perf_counter())


def share(training: Arrays, validation: Arrays, workers: int = 1) -> Tiles:
    """Put the tiles into the object store, shared for a trial's workers."""
    return Tiles.share(dataset(training), dataset(validation), workers)


def plan_here(trials: int, **asked: Any) -> Plan:
    """Plan as a session does."""
    return plan(connection.nodes(), trials=trials, **asked)


def run_here(
    draw: Draw,
    tiles: Any,
    chosen: Plan,
    config: SearchConfig,
    enqueue: Sequence[dict[str, Any]] = (),
    callbacks: Sequence[tune.Callback] = (),
    trainable: Callable[..., None] = run_trial,
) -> optuna.Study:
    """Search in a folder that goes away; return the study's trials, in memory.

    Raises:
        RuntimeError: not every trial ended well.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, quiet(None):
        folder = Path(name)
        study = create_study(Place(folder))
        for parameters in enqueue:
            study.enqueue_trial(parameters)
        search.run_search(
            Space(draw, (), Path("benchmark")),
            tiles,
            chosen,
            str(folder / "trials"),
            study,
            config,
            callbacks,
            trainable,
        )
        done = study.get_trials(deepcopy=False)
        kept = optuna.create_study(direction="maximize")
        kept.add_trials(done)
    bad = [
        t.user_attrs.get("reason", t.state.name) for t in done if t.state.name not in ("COMPLETE", "PRUNED")
    ]
    if bad or len(done) < config.trials:
        raise RuntimeError(f"{len(bad)} of {len(done)} trials did not end well: {bad[:1]}")
    return kept
