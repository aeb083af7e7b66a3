from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from ray.exceptions import WorkerCrashedError

from saltray.search import gpus


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_the_reason_is_told() -> None:
    assert gpus.problem()


def cluster(answer: str | None) -> MagicMock:
    """Return a Ray of three machines, of which one has GPUs; they answer so, or not."""

    def node(name: str, alive: bool, **resources: float) -> dict[str, Any]:
        facts = {"NodeID": f"{len(name):056x}", "NodeManagerHostname": name, "NodeManagerAddress": "10.0.0.1"}
        return {**facts, "Alive": alive, "Resources": resources}

    ray = MagicMock()
    ray.nodes.return_value = [
        node("head", True, CPU=4),
        node("gone", False, GPU=8),
        node("gpu-1", True, CPU=4, GPU=2),
    ]
    ray.wait.side_effect = lambda tasks, **_: (tasks, []) if answer is not None else ([], tasks)
    ray.get.return_value = answer
    return ray


@pytest.mark.parametrize("answer", ["", None])
def test_gpus_that_compute_are_taken_and_so_are_those_that_others_hold(
    monkeypatch: pytest.MonkeyPatch, answer: str | None
) -> None:
    ray = cluster(answer)
    monkeypatch.setattr(gpus, "ray", ray)
    monkeypatch.delenv(gpus.SIMULATED, raising=False)
    gpus.check()
    (asked,) = ray.remote.return_value.return_value.options.call_args_list
    assert asked.kwargs["scheduling_strategy"].node_id == f"{5:056x}"
    assert ray.cancel.call_count == (answer is None)


def test_a_machine_whose_gpus_pytorch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "ray", cluster("PyTorch 2: The NVIDIA driver on your system is too old"))
    monkeypatch.delenv(gpus.SIMULATED, raising=False)
    with pytest.raises(gpus.GpuError, match=r"gpu-1 \(10\.0\.0\.1\): 2 GPUs .* too old.*--gpus-per-trial 0"):
        gpus.check()
    ray = cluster(None)
    ray.wait.side_effect = lambda tasks, **_: (tasks, [])
    ray.get.side_effect = WorkerCrashedError()
    monkeypatch.setattr(gpus, "ray", ray)
    with pytest.raises(gpus.GpuError, match=r"gpu-1 .* task there died"):
        gpus.check()
    monkeypatch.setenv(gpus.SIMULATED, "1")
    gpus.check()
