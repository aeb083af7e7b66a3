import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from saltray import search
from saltray.engine import StudyASHA
from saltray.plan import PlanError, plan
from saltray.space import Space
from saltray.study import Counts, StudyError, best_trial, count, load_study, open_storage, requeue


class TestPlan:
    def test_two_trials_of_one_thread_on_two_cores(self) -> None:
        chosen = plan([{"CPU": 2}], trials=20)
        assert (chosen.concurrency, chosen.resources.cpus) == (2, 1)
        # Ray Data's tasks need what the trials leave.
        assert 2 * chosen.resources.training()["CPU"] <= 2 - 0.2 + 1e-9

    def test_few_trials_get_more_threads(self) -> None:
        assert plan([{"CPU": 8}], trials=2).resources.cpus == 4
        assert plan([{"CPU": 8}], trials=1).resources.cpus == 8
        assert plan([{"CPU": 8}], trials=3).resources.cpus == 2
        assert plan([{"CPU": 4}, {"CPU": 4}], trials=1).resources.cpus == 4

    def test_shares_of_gpus(self) -> None:
        nodes = [{"CPU": 16, "GPU": 1}, {"CPU": 16, "GPU": 2}]
        assert plan(nodes, trials=99, gpus=0.25).concurrency == 12
        assert plan(nodes, trials=99, gpus=1).concurrency == 3
        assert plan(nodes, trials=99, gpus=2).concurrency == 1
        assert plan([{"CPU": 2, "GPU": 1}], trials=99, gpus=0.25).concurrency == 2  # the CPUs bound it

    def test_gpus_are_taken_where_there_are_any(self) -> None:
        assert plan([{"CPU": 4, "GPU": 2}], trials=9).resources.gpus == 1
        assert plan([{"CPU": 4, "GPU": 2}], trials=9, gpus=0).resources.gpus == 0
        assert plan([{"CPU": 4}], trials=9).resources.gpus == 0

    def test_workers_may_lie_on_several_machines(self) -> None:
        assert plan([{"CPU": 2}, {"CPU": 1}], trials=9, workers=3, cpus=1).concurrency == 1
        assert plan([{"CPU": 2}, {"CPU": 2}], trials=9, workers=2, cpus=1).concurrency == 2

    def test_never_more_than_fit_by_brute_force(self) -> None:
        for cpu, cpus, gpu, gpus in itertools.product((1, 2, 3, 5), (0.5, 1, 2), (0, 1, 2), (0, 0.5, 1)):
            try:
                chosen = plan([{"CPU": cpu, "GPU": gpu}], trials=50, cpus=cpus, gpus=gpus)
            except PlanError:
                assert cpus > cpu or gpus > gpu
                continue
            assert chosen.concurrency * cpus <= cpu + 1e-9
            assert chosen.concurrency * gpus <= gpu + 1e-9
            assert (chosen.concurrency + 1) * cpus > cpu or (chosen.concurrency + 1) * gpus > gpu

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"gpus": 1.0}, "1 x (1 CPUs and 1 GPUs); the cluster has: 2 CPUs and 0 GPUs"),
            ({"workers": 3, "cpus": 1}, "3 x (1 CPUs and 0 GPUs)"),
            ({"cpus": 4.0}, "4 CPUs"),
            ({"gpus": 0.3}, "one share of n"),
            ({"gpus": 1.5}, "whole number"),
            ({"workers": 0}, "must be positive"),
            ({"trials": 0}, "must be positive"),
        ],
    )
    def test_refuses_with_the_numbers(self, asked: dict[str, Any], words: str) -> None:
        with pytest.raises(PlanError) as error:
            plan([{"CPU": 2}], **{"trials": 5, **asked})
        assert words in str(error.value)


def draw(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    rate = trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)
    return {
        "model": {"filters": trial.suggest_int("filters", 2, 8)},
        "optim": {"learning_rate": rate},
    }


SPACE = Space(draw, {"filters": 4, "learning_rate": 1e-3}, Path("space.py"))


def result(epoch: int, value: float, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "best_map": value, "time_total_s": 1.0, "hostname": "h", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield tmp_path


def open_search(folder: Path, seed: int = 0, parallel: bool = False) -> search.StudySearch:
    return search.StudySearch(SPACE, open_storage(folder), epochs=9, seed=seed, parallel=parallel)


class TestStudySearch:
    def test_each_end_is_told_as_what_it_was(self, folder: Path) -> None:
        searcher = open_search(folder)
        for name in "abcde":
            searcher.suggest(name)
        searcher.on_trial_result("a", result(1, 0.4))
        searcher.on_trial_complete("a", result(9, 0.7, finished=True))
        searcher.on_trial_result("b", result(1, 0.1))
        searcher.on_trial_complete("b", result(3, 0.2, finished=False))
        searcher.on_trial_complete("c", result(2, 0.0, finished=True, diverged="the loss is nan in epoch 2"))
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
        assert count(searcher.study) == Counts(1, 1, 2, 1)

    def test_results_after_the_end_are_left_out(self, folder: Path) -> None:
        searcher = open_search(folder)
        searcher.suggest("a")
        searcher.on_trial_complete("a", result(3, 0.2, finished=False))
        searcher.on_trial_result("a", result(4, 0.9))
        searcher.record_checkpoint("a", "somewhere")
        searcher.on_trial_complete("a", result(4, 0.9, finished=True))
        assert searcher.study.trials[0].intermediate_values == {3: 0.2}

    def test_an_epoch_done_twice_after_a_crash_is_told_once(self, folder: Path) -> None:
        searcher = open_search(folder)
        searcher.suggest("a")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for epoch, value in ((1, 0.1), (2, 0.2), (2, 0.2), (3, 0.3)):
                searcher.on_trial_result("a", result(epoch, value))
        assert searcher.study.trials[0].intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}

    def test_a_trial_cut_off_goes_on_with_its_parameters_and_checkpoint(self, folder: Path) -> None:
        before = open_search(folder)
        first = before.suggest("a")
        before.on_trial_result("a", result(1, 0.3))
        before.record_checkpoint("a", str(folder))
        del before
        after = open_search(folder)
        requeue(open_storage(folder), after.study)
        again = after.suggest("x")
        assert again == {**first, "resume": str(folder)}
        assert after.suggest("y")["number"] == 1
        after.on_trial_result("x", result(2, 0.5))
        assert after.study.trials[0].intermediate_values == {1: 0.3, 2: 0.5}

    def test_interrupted_study_proposes_what_an_uninterrupted_one_does(self, tmp_path: Path) -> None:
        def value(spec: dict[str, Any]) -> Any:
            return (
                1 / (1 + abs(spec["config"]["model"]["filters"] - 5))
                - spec["config"]["optim"]["learning_rate"]
            )

        def go_on(folder: Path, numbers: range) -> list[dict[str, Any]]:
            searcher = open_search(folder, seed=7)
            requeue(open_storage(folder), searcher.study)
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

    def test_best_trial_needs_a_checkpoint(self, folder: Path) -> None:
        searcher = open_search(folder)
        for name, best in (("a", 0.5), ("b", 0.9), ("c", 0.6)):
            searcher.suggest(name)
            if name != "b":
                searcher.record_checkpoint(name, str(folder))
            searcher.on_trial_complete(name, result(3, best, finished=name == "a"))
        assert best_trial(searcher.study).number == 2

    def test_a_checkpoint_that_is_gone_is_not_named(self, folder: Path) -> None:
        searcher = open_search(folder)
        searcher.suggest("a")
        searcher.on_trial_result("a", result(1, 0.3))
        searcher.record_checkpoint("a", str(folder / "gone"))
        with pytest.raises(StudyError, match="no trial"):
            best_trial(searcher.study)
        requeue(open_storage(folder), searcher.study)
        assert open_search(folder).suggest("x")["resume"] is None

    def test_a_bad_draw_fails_its_trial_and_the_next_is_asked(self, folder: Path) -> None:
        def sometimes(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
            return {"batch_size": 0 if trial.number < bad else 8}

        bad = 1
        storage = open_storage(folder)
        space = Space(sometimes, None, Path("space.py"))
        searcher = search.StudySearch(space, storage, epochs=1, seed=0, parallel=False)
        assert searcher.suggest("a")["number"] == 1
        assert searcher.study.trials[0].state == TrialState.FAIL
        assert "batch_size" in searcher.study.trials[0].user_attrs["reason"]
        bad = 1000
        with pytest.raises(search.SearchError, match="20 draws in a row"):
            searcher.suggest("b")

    def test_no_usable_trial_is_told_with_the_reasons(self, folder: Path) -> None:
        searcher = open_search(folder)
        searcher.suggest("a")
        searcher.record_failure("a", "OSError: disk full")
        with pytest.raises(StudyError, match="disk full"):
            best_trial(searcher.study)


class TestStorage:
    def test_a_file_that_is_no_study_is_refused_and_left(self, tmp_path: Path) -> None:
        (tmp_path / "study.db").write_bytes(b"not a database at all, by any means" * 50)
        with pytest.raises(StudyError, match=r"study\.db"):
            load_study(tmp_path)
        assert (tmp_path / "study.db").read_bytes().startswith(b"not a database")

    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError, match="not the folder of a run"):
            load_study(tmp_path)


class TestASHA:
    def trial(self, number: int) -> Any:
        return SimpleNamespace(trial_id=f"t{number}", config={"number": number})

    def report(self, scheduler: StudyASHA, number: int, epoch: int, value: float) -> str:
        controller: Any = None
        return scheduler.on_trial_result(controller, self.trial(number), {"epoch": epoch, "best_map": value})

    def test_a_new_session_remembers_the_rungs(self, folder: Path) -> None:
        searcher = open_search(folder)
        for number, best in enumerate((0.5, 0.6, 0.7)):
            searcher.suggest(str(number))
            searcher.on_trial_complete(str(number), result(3, best, finished=False))
        controller: Any = None
        for known, expected in ((searcher.study.trials, "STOP"), ([], "CONTINUE")):
            scheduler = StudyASHA(27, known)
            scheduler.on_trial_add(controller, self.trial(3))
            assert self.report(scheduler, 3, 1, 0.1) == "CONTINUE"
            assert self.report(scheduler, 3, 3, 0.2) == expected

    def test_a_trial_that_reports_its_end_is_not_killed(self) -> None:
        scheduler = StudyASHA(2, [])
        controller: Any = None
        scheduler.on_trial_add(controller, self.trial(0))
        last = {"epoch": 2, "best_map": 0.9, "finished": True}
        assert scheduler.on_trial_result(controller, self.trial(0), last) == "CONTINUE"
