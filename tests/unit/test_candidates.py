import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from saltray.config import DEBUG
from saltray.ensembles import candidates, refits
from saltray.network.model import build_model
from saltray.records import run
from saltray.records.settings import Settings, as_options
from saltray.records.storage import Home
from saltray.records.study import REFITS, Place, create_study, keep_trials_at, load_study
from saltray.training import checkpoint
from tests.runs import make_trial

TILES = "0123456789abcdef"


def settings(**values: Any) -> Settings:
    return Settings(**{"data": "DIR", "space": "space.py", "trials": 2, "epochs": 1, **values})


def save(place: Path) -> str:
    place.mkdir(parents=True)
    checkpoint.save(place, build_model(DEBUG.model).state_dict(), DEBUG, {})
    return str(place)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A run of two trials, of which the second and better one was refitted on two folds."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = tmp_path / "other"
    folder.mkdir()
    run.write_settings(folder, settings(folds=2), TILES)
    study, trials = create_study(Place(folder)), folder / "trials"
    for number, value in enumerate((0.5, 0.6)):
        place = save(trials / "session-01" / f"{number:04d}" / "checkpoint_000000")
        study.add_trial(make_trial(TrialState.COMPLETE, [value], checkpoint=place))
    refitted = refits.beside(study, f"{REFITS}2")
    for fold in (0, 1):
        place = save(trials / f"{REFITS}2" / "session-01" / f"{fold:04d}" / "checkpoint_000000")
        refitted.add_trial(make_trial(TrialState.COMPLETE, [0.6], checkpoint=place, refit=[1, fold]))
    return folder


@pytest.mark.parametrize("name", ["other", "moved"])
def test_other_runs_give_what_is_judged_as_the_runs_own(other: Path, tmp_path: Path, name: str) -> None:
    place = str(other.rename(tmp_path / name))
    (found,) = candidates.of_runs(
        settings(folds=2, ensemble=3, ensemble_with=[place]), Home(tmp_path / "own"), TILES
    )
    assert (found.trial, found.name) == (1, f"trial 1 of {name}")
    at = Path(place) / "trials" / f"{REFITS}2" / "session-01"
    assert [source.path for source in found.sources] == [
        str(at / f"{fold:04d}" / "checkpoint_000000") for fold in (0, 1)
    ]
    kept = candidates.of_runs(settings(ensemble=1, ensemble_with=[place]), Home(tmp_path / "own"), TILES)
    assert [(c.name, len(c.sources)) for c in kept] == [(f"trial 1 of {name}", 1)]


@pytest.mark.parametrize(
    ("values", "tiles", "words"),
    [
        ({"ensemble": 2}, "another", "it has other labelled tiles than this run, or another split or seed"),
        ({"folds": 3}, TILES, "it has 2 folds, this run 3. First: .*--resume .*other --folds 3"),
    ],
)
def test_models_that_saw_what_others_are_judged_on_are_refused(
    other: Path, tmp_path: Path, values: dict[str, Any], tiles: str, words: str
) -> None:
    asked = settings(**values, ensemble_with=[str(other)])
    with pytest.raises(run.RunError, match=f"--ensemble-with {other}: {words}"):
        candidates.of_runs(asked, Home(tmp_path / "own"), tiles)


def test_a_run_that_has_nothing_is_told_before_the_search(other: Path, tmp_path: Path) -> None:
    shutil.rmtree(other / "trials" / f"{REFITS}2" / "session-01" / "0001")
    asked = settings(folds=2, ensemble_with=[str(other)])
    with pytest.raises(run.RunError, match=r"no configuration of it is ready .* First: .*--resume"):
        candidates.of_runs(asked, Home(tmp_path / "own"), TILES)
    with pytest.raises(run.RunError, match="this run itself"):
        candidates.of_runs(asked, Home(other), TILES)
    with pytest.raises(run.RunError, match=r"--ensemble-with .*absent: .*not the folder of a run"):
        candidates.of_runs(settings(ensemble=1, ensemble_with=[str(tmp_path / "absent")]), Home(other), TILES)


@pytest.mark.parametrize(
    ("values", "words"),
    [({}, "needs --ensemble, or --folds"), ({"folds": 2, "pseudo_labels": True}, "--pseudo-labels")],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        settings(ensemble_with=["runs/other"], **values)


def test_a_copy_without_trials_still_finds_those_at_the_runs_uri(other: Path, tmp_path: Path) -> None:
    there = (other / "trials").rename(tmp_path / "there")
    study = load_study(other)
    keep_trials_at(study, str(there))
    keep_trials_at(refits.beside(study, f"{REFITS}2"), f"{there}/{REFITS}2")
    (found,) = candidates.of_runs(
        settings(folds=2, ensemble_with=[str(other)]), Home(tmp_path / "own"), TILES
    )
    assert all(source.path.startswith(str(there)) for source in found.sources)


def test_a_moved_run_is_read_and_nothing_of_it_changed(other: Path, tmp_path: Path) -> None:
    moved = other.rename(tmp_path / "moved")
    before = (moved / "study.db").read_bytes()
    for asked in ({"folds": 2}, {"ensemble": 1}):
        (found,) = candidates.of_runs(
            settings(**asked, ensemble_with=[str(moved)]), Home(tmp_path / "own"), TILES
        )
        assert all(source.path.startswith(str(moved)) for source in found.sources)
    assert (moved / "study.db").read_bytes() == before


def test_the_command_names_every_run() -> None:
    words = as_options(settings(ensemble=2, ensemble_with=["runs/a", "runs/b c"]), Path("space.py"))
    assert "--ensemble-with runs/a --ensemble-with 'runs/b c'" in words
