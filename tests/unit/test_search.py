import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from saltray.config import SearchConfig
from saltray.records.study import (
    Counts,
    Place,
    StudyError,
    best_trial,
    count,
    create_study,
    epochs_of,
    load_study,
    requeue,
)
from saltray.search import search
from saltray.search.limits import Limits, gpu_hours
from saltray.search.searcher import SearchError, StudySearch
from saltray.search.space import Space
from saltray.training.trial import WorkerResources
from tests.unit.studies import result


def draw(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
    return {
        "model": {"filters": trial.suggest_int("filters", 2, 8)},
        "optim": {"learning_rate": rate},
    }


SPACE = Space(draw, [{"filters": 4, "learning_rate": 1e-3}], Path("space.py"))


ALONE = WorkerResources(1, 2, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return tmp_path


def open_search(
    folder: Path, resources: WorkerResources = ALONE, space: Space = SPACE, **options: Any
) -> StudySearch:
    config = SearchConfig(**{"epochs": 9, **options})
    there = (folder / "study.db").exists()
    study = load_study(folder) if there else create_study(Place(folder), config.objective)
    for first in () if there else space.first:
        study.enqueue_trial(first)
    limits = Limits(study, config)
    return StudySearch(space, study, config, parallel=False, resources=resources, limits=limits)


def test_each_end_is_told_as_what_it_was(folder: Path) -> None:
    searcher = open_search(folder)
    for name in "abcde":
        searcher.suggest(name)
    searcher.on_trial_result("a", result(1, 0.4))
    searcher.on_trial_complete("a", result(9, 0.7, finished=True))
    searcher.on_trial_result("b", result(1, 0.1))
    searcher.on_trial_complete("b", result(3, 0.2, finished=False))
    searcher.on_trial_complete("c", result(2, 0.0, finished=True, failed="the loss is nan in epoch 2"))
    searcher.on_trial_complete("d", error=True)
    searcher.record_failure("d", "OSError: disk full")
    trials = searcher.study.trials
    states = [t.state for t in trials]
    assert states == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.RUNNING,
    ]
    assert trials[0].value == 0.7
    assert trials[1].intermediate_values == {1: 0.1, 3: 0.2}
    assert trials[2].user_attrs["reason"] == "the loss is nan in epoch 2"
    assert trials[3].user_attrs["reason"] == "OSError: disk full"
    told = [t.user_attrs.get("outcome") for t in trials]
    assert told == ["ran to its end, epoch 9", "stopped early after epoch 3", "failed", "failed", None]
    assert count(searcher.study) == Counts(1, 1, 2, 1)


def test_results_after_the_end_are_left_out(folder: Path) -> None:
    searcher = open_search(folder)
    searcher.suggest("a")
    searcher.on_trial_complete("a", result(3, 0.2, finished=False))
    searcher.on_trial_result("a", result(4, 0.9))
    searcher.record_checkpoint("a", "somewhere")
    searcher.on_trial_complete("a", result(4, 0.9, finished=True))
    assert searcher.study.trials[0].intermediate_values == {3: 0.2}


def test_an_epoch_done_twice_after_a_crash_is_told_once(folder: Path) -> None:
    searcher = open_search(folder)
    searcher.suggest("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for epoch, value in ((1, 0.1), (2, 0.2), (2, 0.2), (3, 0.3)):
            searcher.on_trial_result("a", result(epoch, value))
    assert searcher.study.trials[0].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}


def test_a_trial_cut_off_goes_on_with_its_parameters_and_checkpoint(folder: Path) -> None:
    before = open_search(folder)
    first = before.suggest("a")
    before.on_trial_result("a", result(1, 0.3))
    for name in ("gone", "one", "two", "two"):  # Tune tells of a checkpoint twice
        if name != "gone":
            (folder / name).mkdir(exist_ok=True)
        before.record_checkpoint("a", str(folder / name))
    del before
    after = open_search(folder)
    requeue(after.study)
    again = after.suggest("x")
    assert again == {**first, "resume": [str(folder / "two"), str(folder / "one")]}
    assert after.suggest("y")["number"] == 1
    after.on_trial_result("x", result(2, 0.5))
    assert after.study.trials[0].intermediate_values == {1: 0.3, 2: 0.5}


def test_interrupted_study_proposes_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    def value(spec: dict[str, Any]) -> Any:
        return (
            1 / (1 + abs(spec["config"]["model"]["filters"] - 5)) - spec["config"]["optim"]["learning_rate"]
        )

    def go_on(folder: Path, numbers: range) -> list[dict[str, Any]]:
        searcher = open_search(folder, seed=7)
        requeue(searcher.study)
        specs = []
        for number in numbers:
            spec = searcher.suggest(f"{number}")
            searcher.on_trial_complete(f"{number}", result(9, value(spec), finished=True))
            specs.append(spec["config"])
        return specs

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = go_on(tmp_path / "whole", range(16))
    cut = go_on(tmp_path / "cut", range(12))
    # The thirteenth was under way when the process died.
    open_search(tmp_path / "cut", seed=7).suggest("dead")
    assert cut + go_on(tmp_path / "cut", range(12, 16)) == whole


def test_best_trial_needs_a_checkpoint(folder: Path) -> None:
    searcher = open_search(folder)
    for name, best in (("a", 0.5), ("b", 0.9), ("c", 0.6)):
        searcher.suggest(name)
        if name != "b":
            searcher.record_checkpoint(name, str(folder))
        searcher.on_trial_complete(name, result(3, best, finished=name == "a"))
    assert best_trial(searcher.study).number == 2


def test_a_checkpoint_that_is_gone_is_not_named(folder: Path) -> None:
    searcher = open_search(folder)
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 0.3))
    searcher.record_checkpoint("a", str(folder / "gone"))
    with pytest.raises(StudyError, match="no trial"):
        best_trial(searcher.study)
    requeue(searcher.study)
    assert open_search(folder).suggest("x")["resume"] == []


def test_a_bad_draw_fails_its_trial_and_the_next_is_asked(folder: Path) -> None:
    def sometimes(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        return {"batch_size": 0 if trial.number < bad else 8}

    bad = 1
    searcher = open_search(folder, space=Space(sometimes, (), Path("space.py")), epochs=1)
    assert searcher.suggest("a")["number"] == 1
    assert searcher.study.trials[0].state == TrialState.FAIL
    assert "batch_size" in searcher.study.trials[0].user_attrs["reason"]
    known = count(searcher.study)
    assert (known.failed, known.ended) == (1, 0)  # it takes no trial's place
    bad = 1000
    with pytest.raises(SearchError, match="20 draws in a row"):
        searcher.suggest("b")


def test_no_usable_trial_is_told_with_the_reasons(folder: Path) -> None:
    searcher = open_search(folder)
    searcher.suggest("a")
    searcher.record_failure("a", "OSError: disk full")
    with pytest.raises(StudyError, match="disk full"):
        best_trial(searcher.study)


@pytest.mark.parametrize("searcher", ["random", "gp", "cmaes"])
def test_every_sampler_goes_on_as_if_uninterrupted(tmp_path: Path, searcher: str) -> None:
    def go_on(folder: Path, numbers: range) -> list[dict[str, Any]]:
        folder.mkdir(exist_ok=True)
        search = open_search(folder, seed=3, searcher=searcher)
        requeue(search.study)
        specs = []
        for number in numbers:
            spec = search.suggest(f"{number}")
            rate = spec["config"]["optim"]["learning_rate"]
            search.on_trial_complete(f"{number}", result(9, 0.5 - rate, finished=True))
            specs.append(spec["config"])
        return specs

    cut = [*go_on(tmp_path / "cut", range(13)), *go_on(tmp_path / "cut", range(13, 17))]
    assert cut == go_on(tmp_path / "whole", range(17))
    assert len({str(config) for config in cut}) == 17


def test_every_epoch_done_has_its_row(folder: Path) -> None:
    searcher = open_search(folder, resources=WorkerResources(2, 4, 0.5))
    searcher.suggest("a")
    # The second was done again after a crash, with the worker that was left.
    for epoch, seconds, workers in ((1, 10.0, 2), (2, 20.0, 2), (2, 30.0, 1)):
        searcher.on_trial_result("a", result(epoch, 0.1 * epoch, seconds=seconds, workers=workers))
    # Tune tells the last again.
    searcher.on_trial_complete("a", result(2, 0.2, seconds=30.0, workers=1, finished=True))
    trial = searcher.study.trials[0]
    assert [(row["epoch"], row["seconds"]) for row in epochs_of(trial)] == [(1, 10), (2, 20), (2, 30)]
    assert trial.user_attrs["hardware"] == {"device": "a CPU", "workers": 2, "cpus": 8, "gpus": 1.0}
    assert trial.user_attrs["seconds"] == 60
    assert gpu_hours(searcher.study) == pytest.approx((30 * 1.0 + 30 * 0.5) / 3600)


def test_two_objectives_are_told_as_two_values(folder: Path) -> None:
    searcher = open_search(folder, objective="map+speed", scheduler="none")
    for name, value, speed in (("a", 0.5, 100.0), ("b", 0.6, 50.0), ("c", 0.4, 80.0)):
        searcher.suggest(name)
        searcher.on_trial_result(name, result(8, value - 0.1, validation_tiles_per_second=speed))
        searcher.on_trial_complete(name, result(9, value, validation_tiles_per_second=10.0, finished=True))
    assert [t.values for t in searcher.study.trials] == [[0.5, 100], [0.6, 50], [0.4, 80]]
    assert sorted(t.number for t in searcher.study.best_trials) == [0, 1]
    assert searcher.study.trials[0].intermediate_values == {8: 0.4, 9: 0.5}


def test_patience_begins_no_new_trial(folder: Path) -> None:
    searcher = open_search(folder, patience=2)
    for name, value in (("a", 0.5), ("b", 0.6), ("c", 0.6), ("d", 0.1)):
        assert isinstance(searcher.suggest(name), dict)
        searcher.on_trial_complete(name, result(3, value, finished=name == "a"))
    # The third equalled the best, the fourth is worse: two without a gain.
    asked = searcher.suggest("e")
    assert asked == Searcher.FINISHED
    assert len(searcher.study.trials) == 4


def test_patience_still_runs_what_waits(folder: Path) -> None:
    searcher = open_search(folder, patience=1)
    for name, value in (("a", 0.5), ("b", 0.1)):
        searcher.suggest(name)
        searcher.on_trial_complete(name, result(3, value))
    searcher.study.enqueue_trial({})  # as one that was cut off does
    assert isinstance(searcher.suggest("c"), dict)
    # It still runs, and may bring a better score: the search then goes on.
    assert searcher.suggest("d") is None
    searcher.on_trial_complete("c", result(3, 0.9))
    assert isinstance(searcher.suggest("d"), dict)
    searcher.on_trial_complete("d", result(3, 0.2))
    asked = searcher.suggest("e")
    assert asked == Searcher.FINISHED


def test_gpu_hours_are_counted_by_what_each_session_had(folder: Path) -> None:
    whole = open_search(folder, resources=WorkerResources(1, 1, 1))
    whole.suggest("a")
    whole.on_trial_result("a", result(1, 0.1, seconds=3600))
    requeue(whole.study)
    quarter = StudySearch(
        whole._space, whole.study, whole._config, parallel=False, resources=WorkerResources(1, 1, 0.25)
    )
    quarter.suggest("b")
    quarter.on_trial_result("b", result(2, 0.1, seconds=3600))
    assert gpu_hours(whole.study) == pytest.approx(1.25)


def test_what_is_raised_at_a_trials_end_is_raised_at_the_steps_end() -> None:
    class Listener:
        def on_trial_complete(self, *names: str) -> None:
            heard.extend(names)
            raise ValueError(names)

        on_checkpoint = on_trial_complete

    heard: list[str] = []
    listener = Listener()
    ends = search.Ends(listener)
    ends.on_step_end(0, [])
    listener.on_checkpoint("a")
    listener.on_trial_complete("b")
    assert heard == ["a", "b"]
    with pytest.raises(ValueError, match="a"):
        ends.on_step_end(1, [])


def test_one_crash_after_the_other_ends_the_search(folder: Path) -> None:
    searcher = open_search(folder)
    recorder = search.Recorder(searcher)

    def crash(name: str) -> None:
        spec = searcher.suggest(name)
        trial = SimpleNamespace(trial_id=name, config=spec, error_file=None)
        recorder.on_trial_error(0, [], trial)

    for i in range(search.CRASHES - 1):
        crash(f"a{i}")
    recorder.on_trial_result(0, [], None, {})  # another one gets on
    for i in range(search.CRASHES - 1):
        crash(f"b{i}")
    with pytest.raises(SearchError, match=r"5 trials in a row crashed.*its process died.*--resume"):
        crash("c")
    assert count(searcher.study).failed == 2 * (search.CRASHES - 1)
    assert count(searcher.study).waiting == 1


def test_networks_too_large_for_the_gpu_end_the_search_where_none_fits(folder: Path) -> None:
    searcher = open_search(folder)
    recorder = search.Recorder(searcher)

    def fail(name: str) -> None:
        searcher.suggest(name)
        told = {"epoch": 1, "best_map": 0.0, "finished": True, "failed": "out of memory", "crashed": True}
        recorder.on_trial_result(0, [], None, told)
        searcher.on_trial_complete(name, {**told, "hostname": "h"})

    for i in range(search.CRASHES - 1):
        fail(f"a{i}")
    with pytest.raises(SearchError, match=r"5 trials in a row crashed.*out of memory"):
        fail("b")
    trials = searcher.study.get_trials(deepcopy=False)
    assert [t.user_attrs.get("crashed") for t in trials] == [True] * (search.CRASHES - 1) + [None]
    assert count(searcher.study).waiting == 1


def test_trials_are_cut_off_once_their_results_have_settled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = open_search(folder, time_budget=100)
    limits, now = searcher._limits, time.monotonic()
    assert limits is not None

    def at(seconds: float) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: now + seconds)

    searcher.suggest("a")
    at(101)
    searcher.on_trial_result("a", result(1, 0.1))
    assert not limits.stop_all(), "its checkpoint is not yet taken over"
    at(102.5)
    assert limits.stop_all()
    for later in (103, 105, 107, 109, 111):
        at(later)
        searcher.on_trial_result("a", result(later, 0.1))
    assert limits.stop_all(), "trials that report without a pause are not waited for longer than ten seconds"


def test_limits_cut_off_and_say_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = open_search(folder, resources=WorkerResources(1, 1, 1))
    limits = Limits(searcher.study, SearchConfig(gpu_hours=0.01, time_budget=100))
    assert not limits.stop_all()
    searcher.suggest("a")
    searcher.on_trial_result("a", result(1, 0.1, seconds=36.1))
    assert limits.stop_all()
    assert limits.reached == "the 0.01 GPU-hours are used up"
    limits = Limits(searcher.study, SearchConfig(time_budget=100))
    assert not limits.stop_all()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 101)
    assert limits.stop_all()
    assert "time budget" in limits.reached
