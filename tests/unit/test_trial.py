import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import tune

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
