"""What proposes the next trial (Optuna's samplers), and what stops one early (Ray Tune's schedulers).

Every option that matters is set here: Optuna changes its defaults between major releases. Nothing keeps
state of its own. A sampler is made anew for each suggestion, seeded by the trial's number, and reads the
study; a scheduler begins with what the study knows. So a search that was interrupted goes on as it would
have.
"""

import math
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from saltray.config import Scheduler, Searcher

METRIC = "best_map"
"""What a trial reports and a scheduler compares: its best validation mAP so far."""

GRACE_EPOCHS = 3
REDUCTION = 3
"""At 3, 9, 27 .. epochs the best third goes on."""

LAST_RUNG = 0.8
"""Share of a full trial's epochs. To stop a trial later saves next to nothing, and costs what the
falling rate brings at the end."""

STARTUP_TRIALS = 10
"""Random ones, before a sampler learns."""

MEDIAN_OF = 5
"""Other trials that must have come as far before the median stops one."""


def rungs(epochs: int) -> list[int]:
    """Return the epochs at which trials of so many are compared with each other, and may be stopped."""
    found, rung = [], GRACE_EPOCHS
    while rung <= LAST_RUNG * epochs:
        found.append(rung)
        rung *= REDUCTION
    return found


def make_sampler(searcher: Searcher, seed: int, number: int, parallel: bool) -> BaseSampler:
    """Return the sampler of one suggestion.

    tpe: Bergstra et al. 2011; multivariate, Falkner et al. 2018 (arXiv:1807.01774), with constant liar
    where trials run side by side. It learns from trials that were stopped early as well. gp: Optuna's
    Gaussian process with log EI; it learns from complete trials alone. cmaes: Hansen 2016
    (arXiv:1604.00772); categorical parameters, which it does not know, are drawn by TPE, and so are the
    conditional ones.

    Args:
        searcher: its name.
        seed: the search's.
        number: the trial's.
        parallel: whether trials run side by side.
    """
    own = (seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        tpe = TPESampler(
            seed=own,
            n_startup_trials=STARTUP_TRIALS,
            multivariate=True,
            group=True,
            constant_liar=parallel,
        )
        if searcher == "random":
            return RandomSampler(seed=own)
        if searcher == "gp":
            return GPSampler(
                seed=own,
                n_startup_trials=STARTUP_TRIALS,
                deterministic_objective=False,
                independent_sampler=tpe,
                warn_independent_sampling=False,
            )
        if searcher == "cmaes":
            return CmaEsSampler(
                seed=own,
                n_startup_trials=1,
                consider_pruned_trials=False,
                independent_sampler=tpe,
                warn_independent_sampling=False,
            )
        return tpe


def make_scheduler(scheduler: Scheduler, epochs: int, known: Sequence[FrozenTrial]) -> TrialScheduler:
    """Return the scheduler of a search, which knows the study's trials.

    asha: Li et al. 2020, arXiv:1810.05934. hyperband: the same in several brackets, that differ in when
    they first stop a trial (Li et al. 2018, arXiv:1603.06560). median: Golovin et al. 2017, "Google Vizier".
    """
    if scheduler == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]
    if scheduler == "median":
        return StudyMedian(epochs, known)
    return StudyHyperBand(epochs, known, brackets=1 if scheduler == "asha" else None)


class _LetsTrialsEnd(FIFOScheduler):
    """Lets a trial that has reported its end end by itself; the scheduler beside it decides on the others."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on; one that reports its end is let end by itself."""
        if result.get("finished"):
            return self.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


class StudyHyperBand(_LetsTrialsEnd, AsyncHyperBandScheduler):
    """Asynchronous HyperBand on the epoch; its rungs begin with what the study knows. ASHA is one bracket."""

    def __init__(self, epochs: int, known: Sequence[FrozenTrial], brackets: int | None) -> None:
        """Make the scheduler and replay the known trials' intermediate values.

        Args:
            epochs: of a full trial.
            known: the study's trials so far.
            brackets: how many; None for as many as the epochs allow.
        """
        grace = min(GRACE_EPOCHS, epochs)
        most = math.floor(math.log(epochs / grace, REDUCTION) + 1e-9) + 1
        super().__init__(
            time_attr="epoch", metric=METRIC, mode="max", max_t=epochs,
            grace_period=grace, reduction_factor=REDUCTION, brackets=brackets or most,
        )  # fmt: skip
        for bracket in self._brackets:
            bracket._rungs = [rung for rung in bracket._rungs if rung[0] in rungs(epochs)]
        self._known = {t.number: t.intermediate_values for t in known}
        for number in [t.number for t in known if t.state.is_finished()]:
            self._replay(number, f"study-{number}")

    def bracket(self, number: int) -> Any:
        """Return a trial's bracket: by its number, so that a resumed search agrees; shares as HyperBand's."""
        last = len(self._brackets) - 1
        shares = np.array([REDUCTION ** (last - i) / (last - i + 1) for i in range(last + 1)])
        draw = np.random.default_rng([REDUCTION, number]).choice(last + 1, p=shares / shares.sum())
        return self._brackets[draw]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in; one that goes on brings its earlier epochs along."""
        number = trial.config["number"]
        self._trial_info[trial.trial_id] = self.bracket(number)
        self._replay(number, trial.trial_id)

    def _replay(self, number: int, trial_id: str) -> None:
        for epoch, value in sorted(self._known.get(number, {}).items()):
            # A bracket knows a trial by its id alone.
            self.bracket(number).on_result(cast(Any, SimpleNamespace(trial_id=trial_id)), epoch, value)


class StudyMedian(_LetsTrialsEnd, MedianStoppingRule):
    """The median stopping rule on the epoch, which begins with what the study knows."""

    def __init__(self, epochs: int, known: Sequence[FrozenTrial]) -> None:
        """Make the scheduler and take in the known trials' intermediate values."""
        super().__init__(
            time_attr="epoch", metric=METRIC, mode="max",
            grace_period=min(GRACE_EPOCHS, epochs), min_samples_required=MEDIAN_OF,
        )  # fmt: skip
        self._known = {t.number: t.intermediate_values for t in known}
        for trial in known:
            if trial.state.is_finished() and trial.intermediate_values:
                self._results[cast(Any, f"study-{trial.number}")] = self._rows(trial.number)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in; one that goes on brings its earlier epochs along."""
        super().on_trial_add(tune_controller, trial)
        rows = self._rows(trial.config["number"])
        if rows:
            self._results[trial] = rows

    def _rows(self, number: int) -> list[dict[str, Any]]:
        values = self._known.get(number, {})
        return [{"epoch": epoch, METRIC: value} for epoch, value in sorted(values.items())]

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        """Go on; Ray's own would pause the trial for others that wait."""
        return self.CONTINUE
