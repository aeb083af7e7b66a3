import itertools
from typing import Any

import pytest

from saltray.search.plan import PlanError, plan


def test_two_trials_of_one_thread_on_two_cores() -> None:
    chosen = plan([{"CPU": 2}], trials=20)
    assert (chosen.concurrency, chosen.resources.cpus) == (2, 1)
    # Ray Data's tasks need what the trials leave.
    assert 2 * chosen.resources.training()["CPU"] <= 2 - 0.2 + 1e-9


def test_few_trials_get_more_threads() -> None:
    assert plan([{"CPU": 8}], trials=2).resources.cpus == 4
    assert plan([{"CPU": 8}], trials=1).resources.cpus == 8
    assert plan([{"CPU": 8}], trials=3).resources.cpus == 2
    assert plan([{"CPU": 4}, {"CPU": 4}], trials=1).resources.cpus == 4


def test_shares_of_gpus() -> None:
    nodes = [{"CPU": 16, "GPU": 1}, {"CPU": 16, "GPU": 2}]
    assert plan(nodes, trials=99, gpus=0.25).concurrency == 12
    assert plan(nodes, trials=99, gpus=1).concurrency == 3
    assert plan([{"CPU": 2, "GPU": 1}], trials=99, gpus=0.25).concurrency == 2  # the CPUs bound it


def test_a_third_of_a_gpu_may_be_written_short() -> None:
    assert plan([{"CPU": 16, "GPU": 1}], trials=99, gpus=0.33).concurrency == 3


def test_a_cluster_whose_workers_are_not_up_is_told_as_such() -> None:
    with pytest.raises(PlanError, match="bring its workers up first"):
        plan([{"CPU": 0, "memory": 1e9}], trials=9)


def test_gpus_are_taken_where_there_are_any() -> None:
    assert plan([{"CPU": 4, "GPU": 2}], trials=9).resources.gpus == 1
    assert plan([{"CPU": 4, "GPU": 2}], trials=9, gpus=0).resources.gpus == 0
    assert plan([{"CPU": 4}], trials=9).resources.gpus == 0


def test_workers_may_lie_on_several_machines() -> None:
    assert plan([{"CPU": 2}, {"CPU": 1}], trials=9, workers=3, cpus=1).concurrency == 1
    assert plan([{"CPU": 2}, {"CPU": 2}], trials=9, workers=2, cpus=1).concurrency == 2


def test_never_more_than_fit_by_brute_force() -> None:
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
        ({"gpus": 1.0}, "1 x (1 CPU and 1 GPU); the cluster has: 2 CPUs and 0 GPUs"),
        ({"workers": 3, "cpus": 1}, "3 x (1 CPU and 0 GPUs)"),
        ({"cpus": 4.0}, "4 CPUs"),
        ({"gpus": 0.3}, "one share of n"),
        ({"gpus": 0.501}, "one share of n"),
        ({"gpus": 0.334}, "one share of n"),
        ({"gpus": 2.0}, "--gpus-per-trial 2: a worker trains on one GPU"),
        ({"workers": 0}, "must be positive"),
        ({"trials": 0}, "must be positive"),
        ({"workers": 2, "gpus": 0.5}, "each of 2 workers a trial needs a GPU of its own"),
    ],
)
def test_refuses_with_the_numbers(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as error:
        plan([{"CPU": 2}], **{"trials": 5, **asked})
    assert words in str(error.value)
