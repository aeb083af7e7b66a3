"""How many trials share a GPU best: small networks leave most of one idle."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saltray.config import TILE, TrialConfig
from saltray.network import cpu
from saltray.search.plan import PlanError
from saltray.training.loop import Learner, train_epoch
from saltray.training.trial import WorkerResources, has_no_room

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Trials on one GPU that are tried, in this order."""

GAIN = 1.05
"""How many times as fast one more step in `COUNTS` must be: less is noise, and every trial takes memory."""

TIMED_SECONDS = 1.0
"""How long a network trains to be timed, after two steps that are not counted."""


def tiles_per_second(config: dict[str, Any], resources: WorkerResources) -> float:
    """Train a network on noise for a moment, as a worker of a trial would."""
    trial = TrialConfig.from_dict(config)
    device = torch.device("cuda" if resources.gpus and torch.cuda.is_available() else "cpu")
    cpu.use(resources.cpus)
    learner = Learner.new(trial, device, steps=1)
    size = max(1, trial.batch_size // resources.workers)
    noise = torch.randint(0, 256, (2, size, TILE, TILE), dtype=torch.uint8)
    batch = {"image": noise[0], "mask": noise[1] > 127, "z": torch.full((size,), 500.0)}

    batch = {name: tensor.to(device) for name, tensor in batch.items()}  # where a trial's stream puts them

    def train(steps: int) -> float:
        started = time.perf_counter()
        train_epoch(learner, learner.model, [batch] * steps, epoch=1, history=[])
        return time.perf_counter() - started

    train(1)
    # Many at once: an epoch waits for the GPU at its end, and one of a single step would at each.
    steps = max(1, round(TIMED_SECONDS / train(1)))
    return steps * size / train(steps)


def gpu_share(config: TrialConfig, nodes: Sequence[Mapping[str, float]], cpus: float = 1.0) -> float:
    """Measure which share of a GPU, 1/n, gives the most tiles a second of n trials together.

    Args:
        config: of the trials that are timed.
        nodes: `CPU` and `GPU` counts of each live machine.
        cpus: of each trial.

    Raises:
        PlanError: there is no GPU, or none with the CPUs for one trial.
    """
    most = most_side_by_side(nodes, cpus)

    def rate(count: int) -> float:
        return together(config.to_dict(), WorkerResources(1, cpus, 1 / count), count)

    return 1 / best_count(rate, most)


def most_side_by_side(nodes: Sequence[Mapping[str, float]], cpus: float = 1.0) -> int:
    """Return how many trials a GPU can have at most, by the CPUs of the machine that has fewest for each.

    Raises:
        PlanError: there is no GPU, or none with the CPUs for one trial.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if not with_gpu:
        raise PlanError("--gpus-per-trial auto: measures how many trials share a GPU; the cluster has none")
    most = min(int(node.get("CPU", 0) / node["GPU"] / cpus + 1e-9) for node in with_gpu)
    if most < 1:
        raise PlanError(f"--gpus-per-trial auto: a machine has fewer than {cpus:g} CPUs for each GPU")
    return most


def best_count(rate: Callable[[int], float], most: int) -> int:
    """Return the number of trials with the highest rate together; stops where more no longer helps.

    Args:
        rate: number of trials -> tiles a second of all of them; 0 where they do not fit.
        most: trials at most.

    Raises:
        PlanError: not even one fits.
    """
    best, highest = 1, rate(1)
    if not highest:
        raise PlanError(
            "--gpus-per-trial auto: the first configuration alone is too large for a GPU's memory, or the "
            "machine's, or its process died"
        )
    for count in COUNTS[1:]:
        if count > most:
            break
        together = rate(count)
        if together < GAIN * highest:
            break
        best, highest = count, together
    return best


def together(config: dict[str, Any], resources: WorkerResources, count: int) -> float:
    """Train so many networks at once on one GPU; return their tiles a second, 0 if they do not fit.

    Args:
        config: of the trials.
        resources: of each worker.
        count: how many workers.
    """
    share = resources.training()
    timed: Any = ray.remote(_Timed)
    # Actors: Ray starts a process anew for each task on a GPU, and the start would be timed. The first takes
    # any machine, the others that one: Ray would put some on another's GPU, where they share nothing.
    options: dict[str, Any] = {"num_cpus": share["CPU"], "num_gpus": share.get("GPU", 0.0)}
    workers = [timed.options(**options).remote(config, resources)]
    try:
        if count > 1:
            here = NodeAffinitySchedulingStrategy(ray.get(workers[0].node.remote()), soft=False)
            more = timed.options(**options, scheduling_strategy=here)
            workers += [more.remote(config, resources) for _ in range(count - 1)]
        ray.get([worker.rate.remote() for worker in workers])  # until all are up, they do not share it
        return float(sum(ray.get([worker.rate.remote() for worker in workers])))
    except (RayActorError, OutOfMemoryError):
        return 0.0  # by the kernel or Ray, most likely, where so many processes have no room in memory
    except RuntimeError as error:
        if has_no_room(error):
            return 0.0
        raise
    finally:
        for worker in workers:
            ray.kill(worker)


class _Timed:
    def __init__(self, config: dict[str, Any], resources: WorkerResources) -> None:
        self._config, self._resources = config, resources

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def rate(self) -> float:
        return tiles_per_second(self._config, self._resources)
