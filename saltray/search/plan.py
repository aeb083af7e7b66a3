"""How many trials run side by side on these machines, and what each of their workers gets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saltray.config import UserError, counted
from saltray.training.trial import WorkerResources


class PlanError(UserError):
    """The machines cannot run what was asked; the message has the numbers."""


@dataclass(frozen=True)
class Plan:
    """How many trials run side by side, and what each worker gets."""

    concurrency: int
    resources: WorkerResources

    def __str__(self) -> str:
        """Write it in words, in rich's markup: `2 side by side, 1 x 1 CPU each`."""
        share = self.resources
        gpus = f" and {counted(share.gpus, 'GPU')}" if share.gpus else ""
        each = f"{share.workers} x {counted(share.cpus, 'CPU')}{gpus} each"
        return f"[bold]{self.concurrency}[/] side by side, {each}"


def plan(
    nodes: Sequence[Mapping[str, float]],
    *,
    trials: int,
    workers: int = 1,
    cpus: float | None = None,
    gpus: float | None = None,
) -> Plan:
    """Compute the concurrency from the machines, with room for Ray Data.

    A worker of `cpus` CPUs takes nine tenths of them for training; Ray Data's tasks run in the rest.

    Args:
        nodes: `CPU` and `GPU` counts of each live machine.
        trials: number of trials to run.
        workers: workers a trial.
        cpus: CPUs of a worker. By default 1, or more where fewer trials than CPUs are wanted.
        gpus: GPUs of a worker: 0, 1 or a share 1/n. By default 1 where there are any.

    Raises:
        PlanError: not even one trial fits; the message has the numbers.
    """
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0) for node in nodes) else 0.0
    fraction = 1 / gpus if 0 < gpus < 1 else 1.0
    if trials < 1 or workers < 1 or gpus < 0 or (cpus is not None and cpus <= 0):
        raise PlanError(
            f"trials {trials}, workers per trial {workers}, CPUs {cpus}, GPUs {gpus}: must be positive"
        )
    if gpus > 1:
        raise PlanError(
            f"--gpus-per-trial {gpus:g}: a worker trains on one GPU; for a trial on more, --workers-per-trial"
        )
    if abs(fraction - round(fraction)) > 0.05 or gpus * round(fraction) > 1 + 1e-6:
        raise PlanError(f"--gpus-per-trial {gpus}: 0, 1, or one share of n, such as 0.5, 0.33 or 0.25")
    if workers > 1 and 0 < gpus < 1:
        # NCCL refuses two workers of one trial on the same GPU.
        raise PlanError(f"--gpus-per-trial {gpus}: each of {workers} workers a trial needs a GPU of its own")
    if not any(node.get("CPU") for node in nodes):
        raise PlanError(
            "the cluster has no machine with CPUs yet: bring its workers up first (min_workers in the "
            "cluster's file), since a search plans with the machines that are there"
        )
    if cpus is None:
        at_once = min(trials * workers, sum(int(node.get("CPU", 0)) for node in nodes))
        cpus = 1.0 if gpus else float(max(1, _most_threads(nodes, at_once)))
    slots = [_slots(node, cpus, gpus) for node in nodes]
    concurrency = min(sum(slots) // workers, trials)
    if concurrency < 1:
        have = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise PlanError(
            f"a trial needs {workers} x ({counted(cpus, 'CPU')} and {counted(gpus, 'GPU')}); "
            f"the cluster has: {have or 'nothing'}. "
            "Ask for less with --workers-per-trial, --cpus-per-trial or --gpus-per-trial, or add machines."
        )
    return Plan(concurrency, WorkerResources(workers, cpus, gpus))


def _slots(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    """Count the workers that fit on a machine."""
    by_cpu = math.floor(node.get("CPU", 0) / cpus + 1e-9)
    if not gpus:
        return by_cpu
    return min(by_cpu, int(node.get("GPU", 0)) * round(1 / gpus))


def _most_threads(nodes: Sequence[Mapping[str, float]], workers: int) -> int:
    """Return the largest whole number of CPUs a worker with which so many still run at once."""
    largest = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    fits = (c for c in range(largest, 0, -1) if sum(_slots(n, c, 0) for n in nodes) >= workers)
    return next(fits, 1)
