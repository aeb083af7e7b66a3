"""What proposes the next trial (Optuna's samplers), and what stops one early (Ray Tune's schedulers)."""

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial
from ray.tune.schedulers import AsyncHyperBandScheduler

METRIC = "best_map"

GRACE_EPOCHS = 3
REDUCTION = 3
"""ASHA (Li et al. 2020, arXiv:1810.05934): at 3, 9, 27 .. epochs the best third goes on."""


def make_sampler(seed: int, number: int, parallel: bool) -> BaseSampler:
    """Return TPE (Bergstra et al. 2011; multivariate, Falkner et al. 2018) for one suggestion.

    Every option that matters is set: Optuna changes its defaults between major releases.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            seed=(seed * 1_000_003 + number) % 2**32,
            n_startup_trials=10,
            multivariate=True,
            group=True,
            constant_liar=parallel,
        )


class StudyASHA(AsyncHyperBandScheduler):
    """ASHA on the epoch, whose rungs begin with what the study already knows."""

    def __init__(self, epochs: int, known: Sequence[FrozenTrial]) -> None:
        """Make the scheduler and replay the known trials' intermediate values."""
        super().__init__(
            time_attr="epoch", metric=METRIC, mode="max", max_t=epochs,
            grace_period=min(GRACE_EPOCHS, epochs), reduction_factor=REDUCTION,
        )  # fmt: skip
        self._known = {t.number: t.intermediate_values for t in known}
        for number in [t.number for t in known if t.state.is_finished()]:
            self._replay(number, f"study-{number}")

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Take a trial in; one that goes on brings its earlier epochs along."""
        super().on_trial_add(tune_controller, trial)
        self._replay(trial.config["number"], trial.trial_id)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on; one that reports its end is let end by itself."""
        if result.get("finished"):
            return self.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)

    def _replay(self, number: int, trial_id: str) -> None:
        for epoch, value in sorted(self._known.get(number, {}).items()):
            # A bracket knows a trial by its id alone.
            self._brackets[0].on_result(cast(Any, SimpleNamespace(trial_id=trial_id)), epoch, value)
