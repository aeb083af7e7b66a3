from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from saltray.config import SearchConfig, UserError
from saltray.search.engine import REDUCTION, StudyHyperBand, make_sampler, make_scheduler

CONTROLLER: Any = None


def known(number: int, state: TrialState, *values: float) -> FrozenTrial:
    trial = optuna.trial.create_trial(
        state=state,
        value=values[-1] if state == TrialState.COMPLETE else None,
        intermediate_values=dict(enumerate(values, 1)),
    )
    trial.number = number
    return trial


def added(scheduler: Any, number: int) -> Any:
    trial = _Trial(f"t{number}", {"number": number})
    scheduler.on_trial_add(CONTROLLER, trial)
    return trial


class _Trial:
    def __init__(self, trial_id: str, config: dict[str, Any]) -> None:
        self.trial_id, self.config = trial_id, config


def decide(scheduler: Any, trial: Any, epoch: int, value: float, **more: Any) -> str:
    answer: str = scheduler.on_trial_result(CONTROLLER, trial, {"epoch": epoch, "best_map": value, **more})
    return answer


def test_asha_remembers_the_rungs_of_earlier_sessions() -> None:
    before = [known(n, TrialState.PRUNED, 0.1, 0.2, best) for n, best in enumerate((0.5, 0.6, 0.7))]
    for trials, expected in ((before, "STOP"), ([], "CONTINUE")):
        scheduler = make_scheduler("asha", 27, trials)
        trial = added(scheduler, 3)
        assert decide(scheduler, trial, 1, 0.1) == "CONTINUE"
        assert decide(scheduler, trial, 3, 0.2) == expected


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(36, [27, 9, 3]), (30, [9, 3]), (12, [9, 3]), (3, []), (1, [])]
)
def test_no_trial_is_stopped_shortly_before_its_end(epochs: int, rungs: list[int]) -> None:
    scheduler = make_scheduler("asha", epochs, [])
    assert isinstance(scheduler, StudyHyperBand)
    assert [epoch for epoch, _ in scheduler._brackets[0]._rungs] == rungs


def test_the_median_remembers_earlier_sessions() -> None:
    before = [known(n, TrialState.COMPLETE, *np.linspace(0.1, best, 9)) for n, best in enumerate([0.5] * 5)]
    for trials, expected in ((before, "STOP"), ([], "CONTINUE")):
        scheduler = make_scheduler("median", 27, trials)
        trial = added(scheduler, 5)
        assert decide(scheduler, trial, 2, 0.1) == "CONTINUE"  # in the grace period
        assert decide(scheduler, trial, 4, 0.12) == expected


def test_the_median_lets_a_better_trial_go_on_with_its_earlier_epochs() -> None:
    before = [known(n, TrialState.COMPLETE, *np.linspace(0.1, 0.5, 9)) for n in range(5)]
    scheduler = make_scheduler("median", 27, [*before, known(5, TrialState.WAITING, 0.3, 0.6, 0.6)])
    assert decide(scheduler, added(scheduler, 5), 4, 0.2) == "CONTINUE"  # its best is 0.6


@pytest.mark.parametrize("name", ["asha", "hyperband", "median"])
def test_a_trial_that_reports_its_end_is_not_killed(name: Any) -> None:
    before = [known(n, TrialState.COMPLETE, *[0.8] * 9) for n in range(6)]
    scheduler = make_scheduler(name, 9, before)
    assert decide(scheduler, added(scheduler, 7), 9, 0.1, finished=True) == "CONTINUE"


def test_hyperband_spreads_trials_over_brackets_as_a_resumed_one_does() -> None:
    scheduler = make_scheduler("hyperband", 27, [])
    assert isinstance(scheduler, StudyHyperBand)
    brackets = scheduler._brackets
    assert [[epoch for epoch, _ in b._rungs] for b in brackets] == [[9, 3], [9], []]
    chosen = [brackets.index(scheduler.bracket(number)) for number in range(3000)]
    again = make_scheduler("hyperband", 27, [])
    assert isinstance(again, StudyHyperBand)
    assert chosen == [again._brackets.index(again.bracket(number)) for number in range(3000)]
    shares = np.array([REDUCTION**2 / 3, REDUCTION / 2, 1])  # Li et al. 2018: n = R^s / (s + 1)
    np.testing.assert_allclose(np.bincount(chosen) / 3000, shares / shares.sum(), atol=0.03)


def test_no_scheduler_stops_nothing() -> None:
    before = [known(n, TrialState.COMPLETE, *[0.8] * 9) for n in range(6)]
    scheduler: Any = make_scheduler("none", 9, before)
    assert decide(scheduler, SimpleNamespace(trial_id="t", config={"number": 9}), 3, 0.0) == "CONTINUE"


def test_options_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(UserError, match="--scheduler none"):
        SearchConfig.from_dict({"objective": "map+speed"})
    with pytest.raises(UserError, match="one objective"):
        SearchConfig.from_dict({"objective": "map+speed", "scheduler": "none", "searcher": "cmaes"})
    with pytest.raises(UserError, match="blind to speed"):
        SearchConfig.from_dict({"objective": "map+speed", "scheduler": "none", "patience": 3})


@pytest.mark.parametrize("searcher", ["tpe", "gp", "cmaes"])
def test_samplers_learn(searcher: Any) -> None:
    """Each comes nearer to the optimum than random draws with the same budget, in most of the seeds."""

    def best(name: Any, seed: int) -> float:
        study = optuna.create_study(direction="maximize")
        for number in range(20):
            study.sampler = make_sampler(name, seed, number, False)
            trial = study.ask()
            x, y = trial.suggest_float("x", -1, 1), trial.suggest_float("y", -1, 1)
            study.tell(trial, -((x - 0.3) ** 2) - (y + 0.6) ** 2)
        return study.best_value

    wins = sum(best(searcher, seed) > best("random", seed) for seed in range(3))
    assert wins >= 2
