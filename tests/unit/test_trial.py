import contextlib
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import train, tune

from saltray.config import DEBUG
from saltray.training import loop, trial
from saltray.training.trial import Share, Tiles, WorkerResources


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."), "--gpus-per-trial.*20 MiB"),
        (loop.Diverged(3, float("nan")), "the loss is nan in epoch 3"),
    ],
)
def test_what_would_fail_again_is_a_result_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    reports: list[dict[str, Any]] = []

    def fit(config: Any, start: Any, validate: Any, report: Any, **_: Any) -> None:
        for epoch in (1, 2):
            report({"epoch": epoch, "map": 0.5, "best_map": 0.5, "finished": False}, None)
        raise error

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.setattr(tune, "report", lambda metrics, checkpoint: reports.append(metrics))
    monkeypatch.setattr(tune, "get_checkpoint", lambda: None)
    tiles: Any = SimpleNamespace(count=lambda: 30)
    spec = {"config": DEBUG.to_dict(), "resume": []}
    trial._train_worker(spec, Tiles({1: [Share(tiles, tiles)]}, None), WorkerResources(1, 1.0, 0.0))  # type: ignore[arg-type]
    assert [r["epoch"] for r in reports] == [1, 2, 3]
    assert "failed" not in reports[1] and reports[2]["finished"]
    assert reports[2]["crashed"] == isinstance(error, torch.OutOfMemoryError)
    assert re.search(words, reports[2]["failed"])


@pytest.mark.parametrize("room", [False, True])
def test_several_workers_without_room_are_not_started_again_by_tune(
    monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    reports: list[dict[str, Any]] = []
    error = train.WorkerGroupError("NCCL: unhandled" if room else "CUDA out of memory. Tried 20 MiB.", {})

    class Trainer:
        def __init__(self, worker: Any, **_: Any) -> None:
            pass

        def fit(self) -> None:
            raise error

    monkeypatch.setattr(trial, "TorchTrainer", Trainer)
    monkeypatch.setattr(trial, "TuneReportCallback", train.UserCallback)
    monkeypatch.setattr(tune, "report", reports.append)
    spec = {"config": DEBUG.to_dict(), "number": 0, "resume": []}
    expected = pytest.raises(train.WorkerGroupError) if room else contextlib.nullcontext()
    with expected:
        trial.run_trial(spec, tiles=None, resources=WorkerResources(2, 1.0, 0.0), storage="/tmp")  # type: ignore[arg-type]
    assert [r["finished"] and r["crashed"] for r in reports] == [True] * (not room)
    assert all(re.search("--gpus-per-trial.*20 MiB", r["failed"], re.DOTALL) for r in reports)
