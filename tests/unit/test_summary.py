import io
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from saltray import connection
from saltray.records import run, storage
from saltray.records.study import load_study
from saltray.sessions import summary
from tests.runs import make_run, make_trial

FACTS: dict[str, Any] = {
    "validation_map": 0.7,
    "threshold": 0.5,
    "tta": True,
    "min_area": 0,
    "report": "r.html",
}


@pytest.fixture
def console() -> Console:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return Console(file=io.StringIO(), width=80)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_cpus_that_other_work_holds_are_told(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "cpus", lambda: (16.0, 16.0))
    summary.tell_busy(console)
    assert said(console) == ""
    monkeypatch.setattr(connection, "cpus", lambda: (2.5, 16.0))
    summary.tell_busy(console)
    assert "Other work holds 13.5 of this cluster's 16 CPUs" in said(console)


@pytest.mark.parametrize(("trials", "goes_on"), [(2, True), (1, False)])
def test_the_end_tells_to_go_on_where_that_does_something(
    tmp_path: Path, console: Console, trials: int, goes_on: bool
) -> None:
    parent = tmp_path / "[salt] runs"  # which rich would take for a style
    parent.mkdir()
    waiting = [make_trial(TrialState.WAITING, [0.5]), make_trial(TrialState.WAITING, [])]
    folder = make_run(parent, [make_trial(TrialState.COMPLETE, [0.6]), *waiting])
    study = load_study(folder)
    settings = run.read_settings(folder).model_copy(update={"trials": trials})
    summary.tell_end(console, storage.Home(folder), settings, study, study.trials[0], FACTS, "")
    told = said(console).splitlines()
    lines = dict(line.split(maxsplit=1) for line in told if line.startswith(("go", "repeat")))
    assert "1 complete, 0 stopped early, 0 failed, 1 cut off, 1 not begun" in said(console)
    assert ("go" in lines) == goes_on
    if goes_on:
        assert lines["go"].endswith(f"python -m saltray.tune --resume '{folder}'")
    assert f"'{folder}/space.py'" in lines["repeat"]
