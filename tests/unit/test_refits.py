import shutil
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from saltray.config import DEBUG, OptimConfig, SearchConfig, TrialConfig
from saltray.ensembles import refits
from saltray.ensembles.outoffold import Candidate, Source
from saltray.network.model import build_model
from saltray.records.study import Place, count, create_study, load_study, requeue
from saltray.search.searcher import StudySearch
from saltray.training import checkpoint
from saltray.training.trial import WorkerResources
from tests.runs import make_trial
from tests.unit.studies import result

CYCLES = OptimConfig(schedule="cosine", cycles=2, snapshots=True)
CONFIGS = {0: DEBUG, 2: TrialConfig(optim=CYCLES, batch_size=4, epochs=9, patience=3)}


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = create_study(Place(tmp_path))
    made.add_trials([make_trial(TrialState.COMPLETE, [score]) for score in (0.5, 0.6, 0.7)])
    return made


def searcher(refit_study: optuna.Study) -> StudySearch:
    config = SearchConfig(epochs=9, scheduler="none", searcher="random", seed=5)
    resources = WorkerResources(1, 1, 0)
    return StudySearch(refits.space(CONFIGS), refit_study, config, parallel=True, resources=resources)


def finish(searching: StudySearch, name: str, path: Path) -> None:
    path.mkdir(exist_ok=True)
    checkpoint.save(path, build_model(DEBUG.model).state_dict(), DEBUG, {})
    searching.record_checkpoint(name, str(path))
    searching.on_trial_complete(name, result(9, 0.6, finished=True))


def test_a_refit_has_its_trials_configuration_but_nothing_chosen_on_its_fold(study: optuna.Study) -> None:
    refit_study = refits.beside(study, "folds-2")
    refits.enqueue(refit_study, [2, 0], 2)
    searching = searcher(refit_study)
    specs = [searching.suggest(name) for name in "abcd"]
    assert [(s["parameters"]["trial"], s["parameters"]["fold"]) for s in specs] == [
        *((2, 0), (2, 1), (0, 0), (0, 1))
    ]
    config = TrialConfig.from_dict(specs[0]["config"])
    assert (config.keep, config.patience, config.epochs, config.seed) == ("last", 9, 9, 5)
    assert not config.optim.snapshots
    changed = {"keep": "best", "patience": 3, "seed": 0, "optim": CYCLES}
    assert config.model_copy(update=changed) == CONFIGS[2]


def test_refits_that_are_known_are_not_asked_again_and_others_no_longer(
    study: optuna.Study, tmp_path: Path
) -> None:
    refit_study = refits.beside(study, "folds-2")
    refits.enqueue(refit_study, [2, 0], 2)
    refits.enqueue(refit_study, [2, 0], 2)
    assert count(refit_study).waiting == 4
    searching = searcher(refit_study)
    for name in "abc":
        searching.suggest(name)
    finish(searching, "a", tmp_path / "a")
    searching.record_failure("b", "the loss is nan")
    # Killed; then the search found a better trial, number 1.
    study.enqueue_trial({})
    refits.enqueue(refit_study, [2, 1], 2)
    known = [(t.state, t.user_attrs[refits.REFIT]) for t in refit_study.trials]
    assert known == [
        (TrialState.COMPLETE, [2, 0]),
        (TrialState.FAIL, [2, 1]),
        (TrialState.FAIL, None),
        (TrialState.FAIL, None),
        (TrialState.WAITING, [1, 0]),
        (TrialState.WAITING, [1, 1]),
    ]
    # Wanted again, it is asked again; what failed by itself is not.
    refits.enqueue(refit_study, [2, 0], 2)
    waiting = [t.user_attrs[refits.REFIT] for t in refit_study.trials if t.state == TrialState.WAITING]
    assert waiting == [[0, 0], [0, 1]]
    assert refits.waiting_trials(refit_study) == {0}
    assert refits.failed(refit_study, [0, 2]) == 1
    assert refits.failed(refit_study, [0, 1]) == 0  # the trial is no longer among the best


def test_a_refit_that_was_given_up_by_half_is_given_up(study: optuna.Study) -> None:
    refit_study = refits.beside(study, "folds-2")
    refits.enqueue(refit_study, [2], 2)
    first = refit_study.trials[0]
    refit_study._storage.set_trial_user_attr(first._trial_id, refits.REFIT, None)  # and then it was killed
    assert refits.waiting_trials(refit_study) == {2}
    refits.enqueue(refit_study, [2], 2)
    states = [(t.state, t.user_attrs[refits.REFIT]) for t in refit_study.trials]
    waiting = TrialState.WAITING
    assert states == [(TrialState.FAIL, None), (waiting, [2, 1]), (waiting, [2, 0])]


def test_a_refit_whose_process_died_is_tried_again(study: optuna.Study, tmp_path: Path) -> None:
    refit_study = refits.beside(study, "folds-2")
    refits.enqueue(refit_study, [2], 2)
    searching = searcher(refit_study)
    for name in "ab":
        searching.suggest(name)
    finish(searching, "a", tmp_path / "a")
    searching.record_failure("b", "its process died", crashed=True)
    assert refits.failed(refit_study, [2]) == 1
    refits.enqueue(refit_study, [2], 2)
    assert refits.failed(refit_study, [2]) == 0
    waiting = [t.user_attrs[refits.REFIT] for t in refit_study.trials if t.state == TrialState.WAITING]
    assert waiting == [[2, 1]]


@pytest.mark.parametrize("what", ["damaged", "gone"])
def test_a_refit_without_its_weights_is_done_again(study: optuna.Study, tmp_path: Path, what: str) -> None:
    refit_study = refits.beside(study, "folds-2")
    refits.enqueue(refit_study, [2], 2)
    searching = searcher(refit_study)
    for name in "ab":
        searching.suggest(name)
        finish(searching, name, tmp_path / name)
    file = tmp_path / "b" / checkpoint.WEIGHTS
    if what == "gone":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(file.read_bytes()[:100])
    assert refits.candidates(refit_study, study, 2, 1) == []
    refits.enqueue(refit_study, [2], 2)
    assert refits.waiting_trials(refit_study) == {2} and count(refit_study).waiting == 1
    searching.suggest("again")
    finish(searching, "again", tmp_path / "again")
    assert refits.candidates(refit_study, study, 2, 1) == [whole(tmp_path, 2, "a", "again")]


def test_a_killed_refit_goes_on_from_its_last_epoch(study: optuna.Study, tmp_path: Path) -> None:
    refit_study = refits.beside(study, "folds-2")
    refits.enqueue(refit_study, [0], 2)
    before = searcher(refit_study)
    before.suggest("a")
    cut = before.suggest("b")
    finish(before, "a", tmp_path / "a")
    before.on_trial_result("b", result(1, 0.3))
    before.record_checkpoint("b", str(tmp_path))
    del before
    after = refits.beside(load_study(tmp_path), "folds-2")
    requeue(after)
    refits.enqueue(after, [0], 2)
    assert count(after).waiting == 1
    assert searcher(after).suggest("x") == {**cut, "resume": [str(tmp_path)]}


def test_candidates_are_whole_and_the_searchs_best_come_first(study: optuna.Study, tmp_path: Path) -> None:
    refit_study = refits.beside(study, "folds-2")
    refits.enqueue(refit_study, [0, 2], 2)
    searching = searcher(refit_study)
    for name in ("a", "b", "c", "d"):
        assert refits.candidates(refit_study, study, 2, 5) == (
            [] if name in "ab" else [whole(tmp_path, 0, "a", "b")]
        )
        searching.suggest(name)
        finish(searching, name, tmp_path / name)
    both = [whole(tmp_path, 2, "c", "d"), whole(tmp_path, 0, "a", "b")]
    assert refits.candidates(refit_study, study, 2, 5) == both
    assert refits.candidates(refit_study, study, 2, 1) == both[:1]


def whole(folder: Path, trial: int, *names: str) -> Candidate:
    return Candidate(trial, f"trial {trial}", tuple(Source(str(folder / name)) for name in names))


def test_a_configuration_is_read_from_the_trials_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, build_model(DEBUG.model).state_dict(), DEBUG, {})
    trial = make_trial(TrialState.COMPLETE, [0.5], checkpoint=str(tmp_path))
    with pytest.raises(checkpoint.CheckpointError, match="its checkpoint None is gone"):
        refits.config_of(optuna.create_study(), make_trial(TrialState.COMPLETE, [0.5]))
    assert refits.config_of(optuna.create_study(), trial) == DEBUG
    lost = str(tmp_path / "lost")  # the newest, which is the last that is written
    trial = make_trial(TrialState.COMPLETE, [0.5], checkpoint=lost, checkpoint_before=str(tmp_path))
    assert refits.config_of(optuna.create_study(), trial) == DEBUG
