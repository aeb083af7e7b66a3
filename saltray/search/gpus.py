"""Whether PyTorch can use the GPUs that Ray counts: its CUDA has to fit their driver."""

import os
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saltray.config import UserError, counted

SIMULATED = "SALTRAY_SIMULATED_GPUS"
"""Environment variable: where it is set, GPUs that are none are taken for such, and trials train on CPUs."""

ANSWER_SECONDS = 60.0
"""How long a machine may take to answer; one whose GPUs are all held by others does not."""

LEAST = 0.001
"""The share of a GPU that is asked for: without any, Ray may hide all."""


class GpuError(UserError):
    """A machine's GPUs cannot be used."""


def check() -> None:
    """Make sure that PyTorch can compute on the GPUs of every live machine that has any for Ray.

    Otherwise every trial there would train on one CPU, with a GPU held for nothing.

    Raises:
        GpuError: naming the machine, its PyTorch and what CUDA says.
    """
    if os.environ.get(SIMULATED):
        return
    # Its process ends with the task: else its context would stay in the GPU's memory.
    trying: Any = ray.remote(num_gpus=LEAST, max_calls=1)(problem)
    asked: dict[Any, str] = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if not node["Alive"] or node["Resources"].get("GPU", 0) < 1:
            continue
        place = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
        task = trying.options(num_cpus=0, scheduling_strategy=place, max_retries=0)
        number = counted(node["Resources"]["GPU"], "GPU")
        asked[task.remote()] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {number}"
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    for waiting in silent:
        ray.cancel(waiting)
    for answer in answered:
        try:
            found = ray.get(answer)
        except RayError as error:
            found = f"saltray's task there died: {str(error).strip().splitlines()[-1]}. Is saltray installed?"
        if found:
            raise GpuError(
                f"{asked[answer]} by Ray's count, and none that can be used. {found.rstrip('.?')}. Install a "
                "PyTorch that fits the machine's driver, or train on CPUs: --gpus-per-trial 0"
            )


def problem() -> str:
    """Compute something on this machine's GPU; return what CUDA says where it cannot."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.ones(8, device="cuda").sum().item()
    except Exception as error:  # CUDA's own kinds are no RuntimeErrors
        return f"PyTorch {torch.__version__}: {str(error).strip().partition(chr(10))[0]}"
    return ""
