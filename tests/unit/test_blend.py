import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from saltray import connection
from saltray.config import DEBUG
from saltray.ensembles import refits
from saltray.ensembles.candidates import kept
from saltray.ensembles.outoffold import Candidate, Source
from saltray.network.model import build_model
from saltray.records.settings import Settings
from saltray.records.storage import Home, Mirror
from saltray.records.study import Place, create_study
from saltray.search import search
from saltray.search.plan import Plan
from saltray.sessions import blend
from saltray.training import checkpoint
from saltray.training.trial import Tiles, WorkerResources
from tests.runs import make_trial

NOTHING: Any = None


def make_job(folder: Path, scores: list[float], **settings: Any) -> blend.Job:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = create_study(Place(folder))
    for number, score in enumerate(scores):
        place = folder / f"trial{number}"
        place.mkdir()
        weights = build_model(DEBUG.model).state_dict()
        checkpoint.save(place, weights, DEBUG, {}, snapshots=[weights] * (2 if number == 1 else 0))
        study.add_trial(
            make_trial(TrialState.COMPLETE, [score], checkpoint=str(place), hardware={"gpus": 1.0})
        )
    given = Settings(**{"data": "DIR", "space": "space.py", "trials": 3, **settings})
    (folder / "logs").mkdir()
    chosen = Plan(1, WorkerResources(1, 1, 1))
    return blend.Job(NOTHING, Mirror(Home(folder)), given, study, NOTHING, chosen, time.monotonic())


def test_without_folds_the_best_trials_and_their_snapshots_are_candidates(tmp_path: Path) -> None:
    job = make_job(tmp_path, [0.4, 0.6, 0.5], ensemble=2)
    first, second = str(tmp_path / "trial1"), str(tmp_path / "trial2")
    assert kept(job.study, 2) == [
        Candidate(1, "trial 1", (Source(first),)),
        Candidate(1, "trial 1, snapshot 1", (Source(first, 0),)),
        Candidate(1, "trial 1, snapshot 2", (Source(first, 1),)),
        Candidate(2, "trial 2", (Source(second),)),
    ]


@pytest.mark.parametrize(
    ("scores", "settings", "over"),
    [
        ([0.4, 0.6, 0.5], {}, True),
        ([0.4, 0.6], {}, False),  # cut off, by Ctrl-C or a budget
        ([0.6, 0.4], {"patience": 1}, True),
        ([0.4, 0.6], {"patience": 1}, False),
    ],
)
def test_refits_wait_until_the_search_is_over(
    tmp_path: Path, scores: list[float], settings: dict[str, Any], over: bool
) -> None:
    job = make_job(tmp_path, scores, folds=2, **settings)
    assert blend.is_over(job) == over
    job.study.enqueue_trial({})  # as one that Ctrl-C cut off; a lower --trials goes on without it
    assert blend.is_over(job) == (over and "patience" not in settings)


def run_refits(job: blend.Job, monkeypatch: pytest.MonkeyPatch, gone: float = 0) -> list[Any]:
    """Run the refits, `gone` seconds after the search began; return the settings of those that were begun."""
    begun: list[Any] = []
    study = refits.beside(job.study, "folds-2")
    refits.enqueue(study, [1], 2)
    monkeypatch.setattr(search, "run_search", lambda *arguments, **_: begun.append(arguments[5]))
    monkeypatch.setattr(Tiles, "share", lambda *_: None)
    monkeypatch.setattr(connection, "nodes", lambda: [{"CPU": 2.0, "GPU": 1.0}])
    later = replace(job, console=Console(quiet=True), started=time.monotonic() - gone)
    blend._run(later, study, "folds-2", [NOTHING] * 2, [NOTHING] * 2)
    return begun


def test_refits_have_the_time_that_the_search_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, [0.4, 0.6, 0.5], folds=2, time_budget=100, patience=1)
    (begun,) = run_refits(job, monkeypatch, gone=30)
    assert 60 < begun.time_budget < 70.1
    assert (begun.trials, begun.scheduler, begun.patience) == (2, "none", None)
    assert run_refits(job, monkeypatch, gone=101) == []


def test_refits_have_the_gpu_hours_that_the_search_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three trials of one epoch, 30 seconds on a GPU each.
    less, more = 89 / 3600, 91 / 3600
    for hours in (less, more):
        folder = tmp_path / f"{hours:g}"
        folder.mkdir()
        job = make_job(folder, [0.4, 0.6, 0.5], folds=2, gpu_hours=hours)
        assert bool(run_refits(job, monkeypatch)) == (hours == more)


def test_the_end_table_tells_of_the_ensemble() -> None:
    assert blend.in_words({}) == {}
    assert "3 waiting, 1 failed" in blend.in_words({"waiting": 3, "failed": 1})["refits"]
    facts: dict[str, Any] = {"models": 4, "folds": 2, "by_fold": [0.7, 0.8], "cross_fitted": 0.75}
    facts |= {"spread": 0.0707, "in_sample": 0.77, "waiting": 0}
    facts["candidates"] = [{"name": "trial 3", "weight": 1.0}, {"name": "trial 1", "weight": 0.0}]
    facts |= {"threshold": 0.52, "tta": True, "min_area": 40}
    tried = {"finished": True, "tiles": [3, 0], "with": 0.74, "without": 0.75, "used": False}
    told = blend.in_words(facts | {"pseudo_labels": tried})
    assert told["ensemble"] == "4 models, by weight of trial 3 (1.00)"
    assert "0.7500[/] ± 0.0707 cross-fitted on 2 folds, out of fold (0.7000, 0.8000)" in told["its mAP"]
    assert "at probability 0.52, in the mean with the mirrored tile" in told["its mAP"]
    assert "on lone tiles" not in told
    alone = blend.in_words(facts | {"lone": {"tiles": 2951, "map": 0.74321}})["on lone tiles"]
    assert alone == "0.7432 likewise, on those 2,951 without a neighbour in training"
    assert told["pseudo-labels"] == "not used: cross-fitted 0.7400 with them, 0.7500 without"
    unsure = {"finished": True, "tiles": [0, 0], "used": False}
    assert blend.in_words(facts | {"pseudo_labels": unsure})["pseudo-labels"].startswith("none")
    assert "12 more trials" in blend.in_words({"trials_left": 12})["refits"]
