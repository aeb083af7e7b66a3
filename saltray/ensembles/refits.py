"""The best configurations trained again: model (trial t, fold k) learns from all labelled tiles but fold k.

The refits are the trials of a study of their own, beside the search's, so that all of the search's machinery
serves them: they run side by side, and a session that is cut off loses at most an epoch of each.

Nothing of a refit is chosen on its held-out fold: it keeps its last weights, not those of its best epoch, and
no patience ends it. Else its out-of-fold predictions would be of tiles that had a say in the model, and every
score on them would flatter. The one exception is in the search's own choice: a plateau schedule lowers the
learning rate when the held-out fold's mAP no longer rises. Cosine and one-cycle schedules do not look at it.
"""

import contextlib
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.train import Checkpoint

from saltray.config import TrialConfig
from saltray.ensembles.outoffold import Candidate, Source, readable
from saltray.records.study import checkpoints_of, name_metrics, score
from saltray.search.space import Space
from saltray.training import checkpoint
from saltray.training.trial import Tiles, WorkerResources, run_trial

REFIT = "refit"
"""User attribute of a refit: the number of the search's trial, and the fold."""


def beside(study: optuna.Study, name: str) -> optuna.Study:
    """Open a study of refits in the database of a search's, or create it.

    Args:
        study: of the search.
        name: is put behind the search's own.
    """
    other = optuna.create_study(
        storage=study._storage,
        study_name=f"{study.study_name} {name}",
        directions=["maximize"],
        load_if_exists=True,
    )
    name_metrics(other)
    return other


def config_of(study: optuna.Study, trial: FrozenTrial) -> TrialConfig:
    """Read the configuration that a trial was trained with; raises CheckpointError."""
    for place in checkpoints_of(study, trial):
        with (
            contextlib.suppress(checkpoint.CheckpointError, OSError),
            Checkpoint(place).as_directory() as folder,
        ):
            return checkpoint.load_config(Path(folder))
    raise checkpoint.CheckpointError(
        f"trial {trial.number}: its checkpoint {trial.user_attrs.get('checkpoint')} is gone or damaged; "
        "refits need its configuration. Put the run's trials/ back"
    )


def space(configs: Mapping[int, TrialConfig]) -> Space:
    """Return the space whose points are the refits: a trial's number and a fold.

    Args:
        configs: by the trial's number.
    """

    def draw(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        config = configs[trial.suggest_int("trial", 0, 10**9)]
        trial.suggest_int("fold", 0, 9)
        values = config.to_dict() | {"keep": "last", "patience": config.epochs}
        values["optim"] = {**values["optim"], "snapshots": False}  # nobody would use them
        return {name: value for name, value in values.items() if name not in ("epochs", "seed")}

    return Space(draw, (), Path("the best configurations"))


def run_refit(
    spec: dict[str, Any], *, tiles: Sequence[Tiles], resources: WorkerResources, storage: str
) -> None:
    """Run one refit to its end; Tune's function trainable, as `trial.run_trial`.

    Args:
        spec: as there, with `parameters`: the `fold` is among them.
        tiles: of each fold.
        resources: of each worker.
        storage: as there.
    """
    run_trial(spec, tiles=tiles[spec["parameters"]["fold"]], resources=resources, storage=storage)


def describe(configurations: int, folds: int) -> str:
    """Write in words what is refitted: `the best 3 configurations on 5 folds`."""
    best = f"the best {configurations} configurations" if configurations > 1 else "the best configuration"
    return f"{best} on {folds} folds"


def enqueue(refits: optuna.Study, trials: Sequence[int], folds: int) -> None:
    """Let the refits of some trials wait that are missing; those of others wait no longer."""
    for known in refits.get_trials(deepcopy=False):
        waits = known.state in (TrialState.WAITING, TrialState.RUNNING)
        if waits and (not _of(known) or _of(known)[0] not in trials):
            # Without its mark, a session was cut off in here. By the storage: `tell` refuses a trial that was
            # never asked for.
            refits._storage.set_trial_user_attr(known._trial_id, "reason", "no longer among the best")
            refits._storage.set_trial_user_attr(known._trial_id, REFIT, None)
            refits._storage.set_trial_state_values(known._trial_id, TrialState.FAIL)
    for trial, fold in missing(refits, trials, folds):
        refits.enqueue_trial({"trial": trial, "fold": fold}, user_attrs={REFIT: [trial, fold]})


def missing(refits: optuna.Study, trials: Sequence[int], folds: int) -> list[list[int]]:
    """Return the refits of some trials that are not known yet, as trial and fold.

    One that crashed is among them: this session may have another disk, machine or version. So is one whose
    weights are gone or damaged.
    """
    known = [
        _of(t)
        for t in refits.get_trials(deepcopy=False)
        if not (t.state == TrialState.FAIL and "crashed" in t.user_attrs)
        and (t.state != TrialState.COMPLETE or readable(checkpoints_of(refits, t)) is not None)
    ]
    wanted = [[trial, fold] for trial in trials for fold in range(folds)]
    return [refit for refit in wanted if refit not in known]


def waiting_trials(refits: optuna.Study) -> set[int]:
    """Return the numbers of the search's trials of which refits wait."""
    waiting = refits.get_trials(deepcopy=False, states=(TrialState.WAITING, TrialState.RUNNING))
    return {of[0] for refit in waiting if (of := _of(refit))}


def failed(refits: optuna.Study, trials: Container[int]) -> int:
    """Return how many refits of some trials failed; of their configurations no ensemble can be made."""
    known = [
        (tuple(of), t.state == TrialState.FAIL)
        for t in refits.get_trials(deepcopy=False)
        if (of := _of(t)) and of[0] in trials
    ]
    tried_again = {refit for refit, fails in known if not fails}
    return len({refit for refit, fails in known if fails} - tried_again)


def candidates(refits: optuna.Study, study: optuna.Study, folds: int, most: int) -> list[Candidate]:
    """Return the configurations of which every fold is done, the search's best first.

    Args:
        refits: the study of refits.
        study: the search's.
        folds: how many there are.
        most: how many to return at most.
    """
    done = refits.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    paths = {tuple(_of(t)): place for t in done if (place := readable(checkpoints_of(refits, t))) is not None}
    known = sorted({trial for trial, _ in paths})
    trials = study.get_trials(deepcopy=False)
    found = []
    for trial in sorted(known, key=lambda number: -score(trials[number])):
        places = [path for fold in range(folds) if (path := paths.get((trial, fold)))]
        if len(places) == folds:
            found.append(Candidate(trial, f"trial {trial}", tuple(map(Source, places))))
    return found[:most]


def _of(refit: FrozenTrial) -> list[int]:
    """Return a refit's trial and fold; an empty list where it was given up."""
    return refit.user_attrs.get(REFIT) or []
