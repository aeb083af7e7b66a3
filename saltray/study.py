"""The lasting Optuna study of a run: the one truth of what was tried, and what came of it."""

from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL

from saltray.config import UserError

STUDY_NAME = "saltray"


class StudyError(UserError):
    """The study cannot be used, or has no answer."""


@dataclass(frozen=True)
class Counts:
    """A study's trials by what became of them."""

    complete: int
    pruned: int
    failed: int
    waiting: int

    @property
    def ended(self) -> int:
        """Trials that will not run again."""
        return self.complete + self.pruned + self.failed


def open_storage(folder: Path) -> RDBStorage:
    """Open the run's study database; it is created when absent.

    Raises:
        StudyError: the file is no database of Optuna's, or of another version.
    """
    file = folder / "study.db"
    try:
        # Made, not written: a path may hold what means something in a URL.
        url = URL.create("sqlite", database=str(file)).render_as_string(hide_password=False)
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    except Exception as error:
        raise StudyError(f"{file}: not a readable Optuna study: {error}") from error


def create_study(folder: Path) -> optuna.Study:
    """Open the run's study; it is created when absent. Raises StudyError."""
    storage = open_storage(folder)
    return optuna.create_study(
        storage=storage, study_name=STUDY_NAME, direction="maximize", load_if_exists=True
    )


def load_study(folder: Path) -> optuna.Study:
    """Open the study of a run; raises StudyError."""
    if not (folder / "study.db").is_file():
        raise StudyError(f"{folder}: no study.db in it; not the folder of a run")
    try:
        return optuna.load_study(study_name=STUDY_NAME, storage=open_storage(folder))
    except KeyError:
        raise StudyError(f"{folder / 'study.db'}: holds no study of saltray's") from None


def count(study: optuna.Study) -> Counts:
    """Count the trials by what became of them."""
    states = [t.state for t in study.get_trials(deepcopy=False)]
    return Counts(
        states.count(TrialState.COMPLETE),
        states.count(TrialState.PRUNED),
        states.count(TrialState.FAIL),
        states.count(TrialState.WAITING) + states.count(TrialState.RUNNING),
    )


def score(trial: FrozenTrial) -> float:
    """Return a trial's best validation mAP so far; -1 where none is known."""
    return max(trial.intermediate_values.values(), default=-1.0)


def checkpoint_of(trial: FrozenTrial | optuna.Trial) -> str | None:
    """Return where a trial's newest checkpoint lies; None where there is none, or no longer."""
    path: str | None = trial.user_attrs.get("checkpoint")
    if path is None or "://" in path:
        return path
    return path if Path(path).is_dir() else None


def best_trial(study: optuna.Study) -> FrozenTrial:
    """Return the trial with the best checkpoint, whatever became of it.

    Raises:
        StudyError: no trial has one.
    """
    usable = [t for t in study.trials if t.intermediate_values and checkpoint_of(t)]
    if not usable:
        reasons = {t.user_attrs["reason"] for t in study.trials if "reason" in t.user_attrs}
        raise StudyError(f"no trial reached the end of an epoch. {'; '.join(sorted(reasons))}".rstrip())
    return max(usable, key=score)


def requeue(storage: RDBStorage, study: optuna.Study) -> None:
    """Let trials that were cut off wait for the next session, with their parameters and checkpoint."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
