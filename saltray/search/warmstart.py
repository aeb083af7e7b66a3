"""A search that begins with what another one found (`--warm-start`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import RandomSampler
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from saltray.records.study import own_trials, score

ADOPTED = "warm start"
"""Study attribute, set once all is taken over: the run that it came from."""

PROPOSALS = 5
"""How many of another run's best parameters are tried first where its scores do not compare."""


class Adopted(NamedTuple):
    """How many trials of another search a study begins with."""

    results: int
    """From which the sampler learns."""
    proposed: int
    """Whose parameters are tried first."""


def adopt(
    study: optuna.Study, other: optuna.Study, draw: Callable[[BaseTrial], Any], origin: str, *, compares: bool
) -> Adopted:
    """Start a study from the results of another, of which the spaces may only overlap.

    Of each trial, the parameters that the new space draws as well, with a value it allows, are kept.
    Where the scores compare, ended trials are taken over as results, from which the sampler learns, and those
    that were cut off are proposed first: the best may be one of them. Else the best `PROPOSALS` of all are
    only proposed first.

    Args:
        study: the new one.
        other: its trials are read.
        draw: the new space.
        origin: what `other` is called, for the record.
        compares: whether a score means the same in both: the same tiles, split, epochs and objective.

    Returns:
        What it did, counting what it had done before: where it was cut off, it may be done again.
    """
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    scored = [
        t
        for t in other.get_trials(deepcopy=False)
        if t.state in ended or (t.state != TrialState.FAIL and t.intermediate_values)
    ]
    if not compares:
        scored = sorted(scored, key=score, reverse=True)[:PROPOSALS]
    known = [(trial, drawn) for trial in scored if (drawn := _overlap(trial, draw)) is not None]
    there = {t.user_attrs.get("adopted") for t in study.get_trials(deepcopy=False)}
    results = [(trial, drawn) for trial, drawn in known if compares and trial.state in ended]
    proposals = [drawn for trial, drawn in known if not (compares and trial.state in ended)]
    for trial, drawn in results:
        name = f"{origin} trial {trial.number}"
        if name in there:
            continue
        study.add_trial(
            optuna.trial.create_trial(
                state=trial.state,
                values=trial.values,
                params=drawn.params,
                distributions=drawn.distributions,
                intermediate_values=trial.intermediate_values,
                user_attrs={"adopted": name},
            )
        )
    for drawn in proposals:
        study.enqueue_trial(drawn.params, skip_if_exists=True)
    study.set_user_attr(ADOPTED, origin)
    return Adopted(len(results), len(proposals))


def is_adopted(study: optuna.Study) -> bool:
    """Tell whether nothing of another search is left to be taken over; a search that has begun is past it."""
    begun = any(t.state != TrialState.WAITING for t in own_trials(study))
    return ADOPTED in study.user_attrs or begun


def _overlap(trial: FrozenTrial, draw: Callable[[BaseTrial], Any]) -> FrozenTrial | None:
    """Return a trial with those parameters alone that the new space draws, with the new distributions.

    None where it draws none of them, or fails: not every point of a space need be one that it can build.
    """
    scratch = optuna.create_study(sampler=_Follow(trial.params))
    try:
        draw(scratch.ask())
    except Exception:
        return None
    drawn = scratch.trials[0]
    kept = {k: v for k, v in drawn.params.items() if k in trial.params and trial.params[k] == v}
    if not kept:
        return None
    return optuna.trial.create_trial(
        value=0.0, params=kept, distributions={k: drawn.distributions[k] for k in kept}
    )


class _Follow(RandomSampler):
    """Draws another trial's values where the distributions allow them."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(seed=0)
        self._values = values

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        try:
            if distribution._contains(distribution.to_internal_repr(self._values[name])):
                return self._values[name]
        except (KeyError, TypeError, ValueError):
            pass  # unknown there, or of another kind
        return super().sample_independent(study, trial, name, distribution)
