"""The budgets of a search: time, GPU-hours, and how long it may go on without a gain."""

import math
import time
from typing import Any

import optuna
from optuna.trial import TrialState
from ray import tune

from saltray.config import SearchConfig
from saltray.records.study import REFITS, epochs_of, own_trials, score

SETTLING, LONGEST_SETTLING = 1.0, 10.0
"""Seconds without a result before trials are cut off, and for how long that is waited: a checkpoint that Tune
has not taken over by then is dropped, and the study would name a score whose weights are lost."""


class Limits(tune.Stopper):
    """The search's budgets: time and GPU-hours cut running trials off, patience begins no new ones."""

    def __init__(self, study: optuna.Study, config: SearchConfig) -> None:
        """Start the clock."""
        self._study, self._config = study, config
        self._started = time.monotonic()
        self._elsewhere = 0.0 if config.gpu_hours is None else _gpu_hours_elsewhere(study)
        self._heard, self._over_since = -math.inf, math.inf
        self.reached = ""
        """Which limit ended the search; empty where none did."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the study out of Tune's own snapshot of the search, which is never restored."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Leave single trials to the scheduler."""
        return False

    def hear(self) -> None:
        """Take note that a result has come."""
        self._heard = time.monotonic()

    def stop_all(self) -> bool:
        """Say whether the running trials are to be cut off; they wait in the study for a resumed search."""
        now, seconds, hours = time.monotonic(), self._config.time_budget, self._config.gpu_hours
        if seconds is not None and now - self._started >= seconds:
            reached = "the time budget is used up"
        elif hours is not None and self._elsewhere + gpu_hours(self._study) >= hours:
            reached = f"the {hours:g} GPU-hours are used up"
        else:
            return False
        self._over_since = min(self._over_since, now)
        if now - self._heard < SETTLING and now - self._over_since < LONGEST_SETTLING:
            return False
        self.reached = reached
        return True

    def no_more(self) -> bool:
        """Say whether no new trial is to be begun; one that still runs may bring a better score."""
        patience = self._config.patience
        over = (
            patience is not None
            and ended_without_gain(self._study) >= patience
            # Trials that were cut off, or that a user asked for.
            and not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        )
        self.reached = f"no better score in the last {patience} trials" if over else ""
        return over


def _gpu_hours_elsewhere(study: optuna.Study) -> float:
    """Return the GPU-hours of the run's other studies: its search's, and all of its refits'."""
    run = study.study_name.partition(f" {REFITS}")[0]
    return sum(
        gpu_hours(optuna.load_study(study_name=name, storage=study._storage))
        for name in optuna.get_all_study_names(study._storage)
        if name != study.study_name and (name == run or name.startswith(f"{run} {REFITS}"))
    )


def gpu_hours(study: optuna.Study) -> float:
    """Return the GPU-hours that the study's own trials took, over all sessions."""
    hours: float = sum(row["seconds"] * row["gpus"] / 3600 for t in own_trials(study) for row in epochs_of(t))
    return hours


def ended_without_gain(study: optuna.Study) -> int:
    """Return how many trials have ended since the one with the best score; failed ones are left out."""
    ended = [t for t in own_trials(study) if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    scores = [score(t) for t in sorted(ended, key=lambda t: (t.datetime_complete, t.number))]
    return len(scores) - 1 - scores.index(max(scores)) if scores else 0
