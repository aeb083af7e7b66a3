"""The lasting Optuna study of a run: the one truth of what was tried, and what came of it.

By default it is `study.db` (SQLite) in the run's folder; a team may keep its studies in one PostgreSQL
server. Trials carry user attributes: `epochs` (a row for each epoch that was done, redone ones twice),
`checkpoint` and `checkpoint_before`, `parameters` (of the network), `hardware`, `host`, for failed ones
`reason` and, where the process did, `crashed`, where the space did, `undrawn`; and for who looks in
optuna-dashboard `seconds` and `outcome`.
A trial taken over from another run carries `adopted`, and counts neither as this run's nor as its best.
"""

import sqlite3
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import BaseModel
from optuna.trial import FrozenTrial, TrialState

from saltray.config import Objective, UserError

STUDY_NAME = "saltray"
"""Of the one study in a run's own `study.db`."""

REFITS = "folds-"
"""How the name of a study of refits begins, behind the search's own."""

FORMAT = 1
"""Of the study's attributes; a newer one is refused."""

METRICS: dict[Objective, list[str]] = {
    "map": ["validation mAP"],
    "map+speed": ["validation mAP", "tiles per second"],
}
"""What each objective maximizes."""


class StudyError(UserError):
    """The study cannot be used, or has no answer."""


class NoStudyError(StudyError):
    """There is no such study."""


@dataclass(frozen=True)
class Counts:
    """A study's own trials by what became of them."""

    complete: int
    pruned: int
    failed: int
    waiting: int
    undrawn: int = 0
    """Of the failed: draws that the space failed at, which were no trials yet."""

    @property
    def ended(self) -> int:
        """Trials that will not run again."""
        return self.complete + self.pruned + self.failed - self.undrawn


@dataclass(frozen=True)
class Place:
    """Where a study lies: in a run's folder, or under a name in a database server."""

    folder: Path
    url: str | None = None
    name: str = STUDY_NAME

    def __str__(self) -> str:
        """Return the file, or the server and the study's name; never a password."""
        return (
            f"{without_password(self.url)}, study {self.name}" if self.url else str(self.folder / "study.db")
        )


def without_password(url: str) -> str:
    """Return a database's URL without its password, which must not reach a file or a log.

    Raises:
        StudyError: it is no URL of a database server that Optuna knows.
    """
    try:
        parts = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise StudyError(f"--study {url}: not a URL such as postgresql://user@host/database") from None
    if parts.get_backend_name() != "postgresql":
        raise StudyError(
            f"--study {parts.get_backend_name()}://...: a PostgreSQL server is meant "
            "(postgresql://user@host/database); without --study it is an SQLite file in the run's folder"
        )
    query = {name: value for name, value in parts.query.items() if name not in ("password", "sslpassword")}
    open_part = (parts.drivername, parts.username, None, parts.host, parts.port, parts.database)
    return sqlalchemy.URL.create(*open_part, query=query).render_as_string()


def open_storage(place: Place, create: bool = True) -> RDBStorage:
    """Open the database.

    Args:
        place: where it lies.
        create: make SQLite's file where it is absent, and the tables that it lacks.

    Raises:
        NoStudyError: nothing is to be created, and the file is absent or not finished.
        StudyError: it cannot be reached, or is no database of Optuna's, or of another version of it.
    """
    if place.url is None:
        file = place.folder / "study.db"
        if not create and not file.is_file():
            raise NoStudyError(f"{place.folder}: no study.db in it; not the folder of a run")
        tables = _check_file(file) if file.exists() else set()
        if not create and _LAST_TABLE not in tables:
            # To make the rest of its tables here would take them from the search that is at it.
            raise NoStudyError(f"{file}: no study in it; its search has just begun or was cut off")
        # Made, not written: a path may hold what means something in a URL.
        url = sqlalchemy.URL.create("sqlite", database=str(file)).render_as_string()
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:
        without_password(place.url)
        url, options = place.url, {"pool_pre_ping": True}
    try:
        return RDBStorage(url, engine_kwargs=options)
    except ModuleNotFoundError as error:
        raise StudyError(f"{place}: needs the package {error.name}: pip install -e '.[postgresql]'") from None
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"{place}: no Optuna database that can be used: {reason}") from None


_LAST_TABLE = "alembic_version"
"""The table that Optuna makes last."""


def _check_file(file: Path) -> set[str]:
    """Return the tables of a file; refuse one that Optuna would fail at, or write its tables into."""
    try:
        with closing(
            # To be written: a session that was killed in a commit left what SQLite has to take back first.
            sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True, timeout=60)
        ) as database:
            answer = database.execute("PRAGMA quick_check").fetchone()[0]
            tables = {
                row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
    except sqlite3.Error as error:
        raise StudyError(f"{file}: damaged, or no SQLite database: {error}") from None
    if answer != "ok":
        raise StudyError(f"{file}: damaged: {answer}. Mend it from a copy, or start a new run")
    optunas = {*BaseModel.metadata.tables, _LAST_TABLE}
    # All that belong together, or some of Optuna's: whoever made them was cut off.
    if tables and not {"studies", "trials", "version_info"} <= tables and not tables <= optunas:
        raise StudyError(f"{file}: a database, but not of Optuna's; not the study of a run")
    return tables


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


def refuse_taken_name(place: Place) -> None:
    """Raise a StudyError where a server holds a study of that name already, or cannot be reached."""
    if place.url is None:
        return
    storage = open_storage(place)
    names = optuna.get_all_study_names(storage)
    _close(storage)
    if place.name in names:
        raise StudyError(
            f"{place}: there is such a study already. To go on with it: --resume and its run's folder; "
            "to start a new one: another --out, whose last part names the study"
        )


def create_study(place: Place, objective: Objective = "map", space: str = "") -> optuna.Study:
    """Create the study of a new run.

    Args:
        place: where; a server must not hold a study of that name yet.
        objective: what is maximized.
        space: the search space's source, kept to show what changed if it ever does.

    Raises:
        StudyError: the database cannot be used, or the name is taken there.
    """
    refuse_taken_name(place)
    study = optuna.create_study(
        storage=open_storage(place),
        study_name=place.name,
        directions=["maximize"] * len(METRICS[objective]),
    )
    for name, value in {"format": FORMAT, "space": space}.items():
        study.set_user_attr(name, value)
    name_metrics(study)
    return study


def name_metrics(study: optuna.Study) -> None:
    """Tell a study's database what its values are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(METRICS[objective_of(study)])


def load_study(place: Place | Path) -> optuna.Study:
    """Open the study of a run; a folder means its own `study.db`.

    Raises:
        StudyError: there is none, it is damaged, of a newer saltray, or of another metric.
    """
    place = place if isinstance(place, Place) else Place(place)
    storage = open_storage(place, create=False)
    try:
        return _load(place, storage)
    except StudyError:
        _close(storage)
        raise


def _load(place: Place, storage: RDBStorage) -> optuna.Study:
    try:
        study = optuna.load_study(study_name=place.name, storage=storage)
    except KeyError:
        names = ", ".join(optuna.get_all_study_names(storage)) or "none"
        raise NoStudyError(f"{place}: no such study in it; there are: {names}") from None
    version = study.user_attrs.get("format", FORMAT)
    if version > FORMAT:
        raise StudyError(f"{place}: written by a newer saltray (format {version}); update saltray")
    if study.metric_names is None and not study.get_trials(deepcopy=False):
        name_metrics(study)  # its maker was cut off
    if study.metric_names not in METRICS.values():
        held = ", ".join(study.metric_names or ["an unnamed one"])
        raise StudyError(f"{place}: a study of another metric ({held}); saltray's is {METRICS['map'][0]}")
    return study


def objective_of(study: optuna.Study) -> Objective:
    """Return what a study maximizes."""
    return "map" if len(study.directions) == 1 else "map+speed"


def own_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials of this run, without those it took over from another; not to be changed."""
    return [t for t in study.get_trials(deepcopy=False) if "adopted" not in t.user_attrs]


def nondominated(study: optuna.Study) -> list[FrozenTrial]:
    """Return the Pareto front: the run's own complete trials that no other of them dominates.

    Not Optuna's `best_trials`: a warm start's speeds are of another machine, or of other trials beside it.
    """
    complete = [t for t in own_trials(study) if t.state == TrialState.COMPLETE]

    def beats(a: FrozenTrial, b: FrozenTrial) -> bool:
        return a.values != b.values and all(x >= y for x, y in zip(a.values, b.values, strict=True))

    return [t for t in complete if not any(beats(other, t) for other in complete)]


def count(study: optuna.Study) -> Counts:
    """Count a study's own trials by what became of them; a running one waits for the next session."""
    own = own_trials(study)
    states = [t.state for t in own]
    return Counts(
        states.count(TrialState.COMPLETE),
        states.count(TrialState.PRUNED),
        states.count(TrialState.FAIL),
        states.count(TrialState.WAITING) + states.count(TrialState.RUNNING),
        sum("undrawn" in t.user_attrs for t in own),
    )


def score(trial: FrozenTrial) -> float:
    """Return the validation mAP of the weights that a trial has kept; -1 where none is known.

    What an epoch reports is the best so far, or its own where the last weights are kept.
    """
    values = trial.intermediate_values
    return values[max(values)] if values else -1.0


def epochs_of(trial: FrozenTrial | optuna.Trial) -> list[dict[str, Any]]:
    """Return a row for each epoch that a trial did, in the order they were done; a redone one is there twice.

    A row has `epoch` (from 1), `loss`, `map`, `learning_rate`, `seconds`, `tiles_per_second` (in training),
    `validation_tiles_per_second`, `workers` (how many), `gpus` (of all workers), `host` (its address) and
    `ended` (ISO 8601, UTC).
    """
    rows: list[dict[str, Any]] = trial.user_attrs.get("epochs", [])
    return rows


def keep_trials_at(study: optuna.Study, place: str) -> None:
    """Note the path or URI below which the trials' files lie now; a run's folder may be moved, or copied."""
    if study.user_attrs.get("trials") != place:
        study.set_user_attr("trials", place)


def checkpoints_of(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> list[str]:
    """Return where a trial's checkpoints lie that are still there, the newest first."""
    return _located(trial, study.user_attrs)


def _located(trial: FrozenTrial | optuna.Trial, facts: dict[str, Any]) -> list[str]:
    """Return where checkpoints that are still there lie; `facts` are the study's attributes, read once."""
    found = []
    for path in (trial.user_attrs.get(name) for name in ("checkpoint", "checkpoint_before")):
        if path is None:
            continue
        before, session, below = path.rpartition("/session-")
        place = f"{facts.get('trials', before)}{session}{below}" if session else path
        if _is_there(place):
            found.append(place)
    return found


def _is_there(path: str) -> bool:
    """Tell whether a checkpoint is still there; of a URI that is not asked."""
    return "://" in path or Path(path).is_dir()


def best_trial(study: optuna.Study) -> FrozenTrial:
    """Return the trial with the best checkpoint, whatever became of it.

    Raises:
        StudyError: no trial has one.
    """
    return best_trials(study, 1)[0]


def best_trials(study: optuna.Study, most: int) -> list[FrozenTrial]:
    """Return the trials with the best checkpoints, the best first; raises as `best_trial` does."""
    own, facts = own_trials(study), study.user_attrs
    usable = [t for t in own if t.intermediate_values and _located(t, facts)]
    if not usable:
        lost = [t.user_attrs["checkpoint"] for t in own if "checkpoint" in t.user_attrs]
        if lost:
            raise StudyError(
                f"no trial has a checkpoint: {lost[0]} is not there, nor any other that the study names. Put "
                "the run's trials/ back"
            )
        reasons = {t.user_attrs["reason"] for t in own if "reason" in t.user_attrs}
        if count(study).waiting:
            reasons.add("Trials wait: go on with --resume, and a larger budget if it was used up")
        raise StudyError(f"no trial reached the end of an epoch. {'; '.join(sorted(reasons))}".rstrip())
    return sorted(usable, key=score, reverse=True)[:most]


def lost_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the trial with the best score of all where it had a checkpoint that is gone; else None."""
    known = [t for t in own_trials(study) if t.intermediate_values and "checkpoint" in t.user_attrs]
    best = max(known, key=score, default=None)
    return None if best is None or checkpoints_of(study, best) else best


def requeue(study: optuna.Study) -> None:
    """Let trials that were cut off wait for the next session, with their parameters and checkpoint."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
