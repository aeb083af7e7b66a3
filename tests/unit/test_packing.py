from collections.abc import Callable
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError

from saltray.config import DEBUG
from saltray.search import packing
from saltray.search.packing import best_count, gpu_share, most_side_by_side
from saltray.search.plan import PlanError, plan
from saltray.training.trial import WorkerResources


def measured(*rates: float) -> tuple[Callable[[int], float], list[int]]:
    """Return a GPU with these rates for 1, 2, .. trials (the last for all further), and what was asked."""
    asked: list[int] = []

    def rate(count: int) -> float:
        asked.append(count)
        return rates[min(count, len(rates)) - 1]

    return rate, asked


def test_trials_are_added_until_they_no_longer_help() -> None:
    rate, asked = measured(100, 190, 270, 300, 305, 306)
    assert best_count(rate, most=16) == 4
    assert asked == [1, 2, 3, 4, 6]  # nothing larger than what did not help


def test_a_network_that_fills_the_gpu_keeps_it() -> None:
    assert best_count(measured(100, 101)[0], most=16) == 1


def test_trials_that_do_not_fit_its_memory_are_not_taken() -> None:
    assert best_count(measured(100, 200, 0)[0], most=16) == 2


def test_a_network_that_never_fits_is_refused() -> None:
    with pytest.raises(PlanError, match="too large for a GPU's memory"):
        best_count(measured(0)[0], most=16)


def test_the_cpus_bound_the_trials_of_a_gpu() -> None:
    rate, asked = measured(1, 2, 3, 4, 5, 6, 7, 8)
    most = most_side_by_side([{"CPU": 16, "GPU": 1}, {"CPU": 8, "GPU": 2}, {"CPU": 64}])
    assert most == 4 and best_count(rate, most) == 4 and max(asked) == 4
    assert most_side_by_side([{"CPU": 16, "GPU": 1}], cpus=3) == 5


@pytest.mark.parametrize("count", range(1, 17))
def test_what_is_found_can_be_planned(count: int) -> None:
    assert plan([{"CPU": 16, "GPU": 1}], trials=99, gpus=1 / count).concurrency == count


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(PlanError, match=r"--gpus-per-trial auto.*the cluster has none"):
        gpu_share(DEBUG, [{"CPU": 64}])
    with pytest.raises(PlanError, match="fewer than 1 CPUs for each GPU"):
        gpu_share(DEBUG, [{"CPU": 1, "GPU": 2}])


class _NoRay:
    """A Ray whose networks all end in one error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self

    def get(self, _: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        ActorDiedError(),
        OutOfMemoryError("Task was killed due to the node running low on memory."),  # type: ignore[no-untyped-call]
    ],
)
def test_a_gpu_without_room_is_no_error_whatever_says_so(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(packing, "ray", _NoRay(error))
    assert packing.together({}, WorkerResources(1, 1.0, 0.5), 2) == 0.0
    monkeypatch.setattr(packing, "ray", _NoRay(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape"):
        packing.together({}, WorkerResources(1, 1.0, 0.5), 2)
