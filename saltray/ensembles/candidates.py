"""What an ensemble is chosen from: the best configurations of a run, and of others on the same tiles."""

import shlex

import optuna
from optuna.exceptions import StorageInternalError

from saltray.config import UserError
from saltray.ensembles import outoffold, refits
from saltray.ensembles.outoffold import Candidate, Source
from saltray.records import run, storage
from saltray.records.settings import Settings
from saltray.records.study import REFITS, Place, best_trials, checkpoints_of, keep_trials_at, load_study


def kept(study: optuna.Study, most: int) -> list[Candidate]:
    """Return the best trials' kept weights and snapshots, which have not seen the validation tiles."""
    found = []
    for trial in best_trials(study, most):
        place, name = outoffold.readable(checkpoints_of(study, trial)), f"trial {trial.number}"
        if place is None:
            continue
        found.append(Candidate(trial.number, name, (Source(place),)))
        for snapshot in range(outoffold.count_snapshots(place)):
            source = Source(place, snapshot)
            found.append(Candidate(trial.number, f"{name}, snapshot {snapshot + 1}", (source,)))
    return found


def of_runs(settings: Settings, own: storage.Home, tiles: str) -> list[Candidate]:
    """Return what the other runs that `settings` name have for the ensemble: as many configurations of each.

    The others are read, and nothing of them is changed.

    Args:
        settings: of the run whose ensemble it is. With folds, the others' refits on as many are taken.
        own: its home.
        tiles: fingerprint of its labelled tiles and their split.

    Raises:
        RunError: a run cannot be read, is this one, has other tiles, another split or other folds, or nothing
            that is done.
    """
    found = []
    homes = {storage.home(where): where for where in settings.ensemble_with}
    names = [home.folder.name for home in homes]
    for home, where in homes.items():
        name = home.folder.name if names.count(home.folder.name) == 1 else where
        try:
            if home == own:
                raise run.RunError("that is this run itself")
            run.fetched(where)
            found += [c._replace(name=f"{c.name} of {name}") for c in _of_run(home, settings, tiles)]
        except UserError as error:
            again = "To go on without it: --ensemble-with ''"
            raise run.RunError(f"--ensemble-with {where}: {error}. {again}") from None
        except StorageInternalError as error:
            raise run.RunError(f"--ensemble-with {where}: its study cannot be used: {error}") from None
    return found


def _of_run(home: storage.Home, settings: Settings, tiles: str) -> list[Candidate]:
    known = run.read(home.folder)
    other = Settings.model_validate(known["settings"])
    if known["tiles"] != tiles:
        raise run.RunError(
            "it has other labelled tiles than this run, or another split or seed: its models have seen tiles "
            "on which this run's are judged"
        )
    again = f"python -m saltray.tune --resume {shlex.quote(str(home))}"
    if settings.folds is not None and other.folds != settings.folds:
        its = f"{other.folds} folds" if other.folds else "no folds"
        raise run.RunError(
            f"it has {its}, this run {settings.folds}. First: {again} --folds {settings.folds}"
        )
    study = load_study(Place(home.folder, other.study, other.study_name))
    size, trials = settings.ensemble or 1, _copied(study, study.study_name, home.trials)
    if settings.folds is None:
        found = kept(trials, size)
    else:
        found = _refitted(study, trials, home, settings.folds, size)
    if not found:
        raise run.RunError(f"no configuration of it is ready for an ensemble. First: {again}")
    return found


def _copied(study: optuna.Study, name: str, place: str) -> optuna.Study:
    """Return a study beside another in memory, which knows where its trials lie now: it may be read-only.

    A copy of a run without trials, of one behind a URI, still names those there.
    """
    memory = optuna.storages.InMemoryStorage()
    optuna.copy_study(from_study_name=name, from_storage=study._storage, to_storage=memory)
    copied = optuna.load_study(study_name=name, storage=memory)
    if storage.names(place):
        keep_trials_at(copied, place)
    return copied


def _refitted(
    study: optuna.Study, trials: optuna.Study, home: storage.Home, folds: int, most: int
) -> list[Candidate]:
    """Return the refits of the best of a study's `trials`, read from another study beside it."""
    name = f"{REFITS}{folds}"
    try:
        known = _copied(study, f"{study.study_name} {name}", f"{home.trials}/{name}")
    except KeyError:
        return []
    return refits.candidates(known, trials, folds, most)
