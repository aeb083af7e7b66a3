import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState
from rich.console import Console

from saltray.config import SearchConfig
from saltray.records.study import Place, create_study, load_study
from saltray.search.searcher import StudySearch
from saltray.search.space import Space
from saltray.sessions.view import LiveView, Terminal, duration, text
from saltray.training.trial import WorkerResources
from tests.unit.studies import result

NOTHING: Any = None


@pytest.fixture
def study_folder(tmp_path: Path) -> Path:
    """A study with a trial in every state, and names that rich could take for markup."""

    def draw(trial: Any) -> dict[str, Any]:
        trial.suggest_categorical("kind", ["[/]", "[red]"])
        return {"model": {"filters": trial.suggest_int("filters", 2, 4)}}

    space = Space(draw, (), Path("space.py"))
    study = create_study(Place(tmp_path))
    resources = WorkerResources(1, 1, 0)
    searcher = StudySearch(space, study, SearchConfig(epochs=9), parallel=False, resources=resources)
    for name in "abcde":
        searcher.suggest(name)
        searcher.on_trial_result(name, result(1, 0.25))
    searcher.on_trial_complete("a", result(9, 0.75, finished=True))
    searcher.on_trial_complete("b", result(3, 0.5, finished=False))
    searcher.record_failure("c", "OSError: [Errno 28] no space left [/]")
    study._storage.set_trial_state_values(study.trials[3]._trial_id, TrialState.WAITING)
    return tmp_path


def make(folder: Path, terminal: bool) -> tuple[LiveView, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, width=140, force_terminal=terminal, color_system=None, legacy_windows=False)
    return LiveView(console, load_study(folder), trials=6, epochs=9, time_budget=60.0), file


def test_the_table_shows_every_state_and_the_best(study_folder: Path) -> None:
    view, file = make(study_folder, terminal=True)
    view._console.print(view._draw())
    drawn = file.getvalue()
    for words in (
        "3 of 6 trials",
        "best mAP 0.7500",
        "complete",
        "stopped early",
        "failed",
        "waiting",
        "running",
        "9/9",
    ):
        assert words in drawn
    assert "OSError: [Errno 28] no space left [/]" in drawn
    assert "kind [/]" in drawn or "kind [red]" in drawn


def test_without_a_terminal_each_ended_trial_is_told_once(study_folder: Path) -> None:
    view, file = make(study_folder, terminal=False)
    trial = SimpleNamespace(config={"number": 4})
    for _ in range(3):
        view.on_trial_result(0, [], trial, {"tiles_per_second": 30.0})
        view.on_trial_complete(0, [], trial)
    told = file.getvalue().splitlines()
    assert [line.split()[:3] for line in told] == [
        ["trial", "0", "complete"],
        ["trial", "1", "stopped"],
        ["trial", "2", "failed"],
    ]
    assert "best mAP 0.7500" in told[0] and "epochs 9" in told[0]


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(study_folder: Path) -> None:
    file = io.StringIO()
    console = Console(file=file, width=140, force_terminal=True, _environ={"TERM": "dumb"})
    with LiveView(console, load_study(study_folder), trials=6, epochs=9, time_budget=None) as view:
        view._told.clear()
        view.on_trial_complete(0, [], NOTHING)
    assert "complete  best mAP 0.7500" in file.getvalue()


def test_a_search_outlives_the_reader_of_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        console = Terminal()
        console.print("heard")
        assert os.read(reading, 100) == b"heard\n"
        os.close(reading)
        for _ in range(3):
            console.print("nobody hears it")


def test_a_new_session_does_not_tell_what_ended_before(study_folder: Path) -> None:
    view, file = make(study_folder, terminal=False)
    with view:
        view.on_trial_complete(0, [], SimpleNamespace(config={"number": 4}))
    assert file.getvalue() == ""


def test_nothing_yet(tmp_path: Path) -> None:
    create_study(Place(tmp_path))
    view, file = make(tmp_path, terminal=True)
    view._console.print(view._draw())
    assert "0 of 6 trials" in file.getvalue()
    assert "no result yet" in file.getvalue()


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00"), (61.9, "1:01"), (3725, "1:02:05"), (-3, "0:00")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_parameters_in_a_line() -> None:
    assert text({"filters": 16, "rate": 0.00123456, "kind": "a"}) == "filters 16  rate 0.00123  kind a"
