"""One Tune trial: puts the training loop on Ray Train, and the tiles into it by Ray Data.

One worker runs in Ray Train's local mode, inside Tune's own actor, which is reused from trial to trial: a
trial then costs about 0.3 s beside its training. Several workers run under `TorchTrainer` with DDP.
"""

import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import ray
import torch
from ray import train, tune
from ray.train.torch import TorchTrainer, get_device
from ray.tune.integration.ray_train import TuneReportCallback

from saltray.config import TrialConfig, UserError
from saltray.data import stream
from saltray.data.augment import Batch
from saltray.network import cpu
from saltray.training import checkpoint, loop, samples

EVALUATION_BATCH = 64

DATA_SHARE = 0.1
"""Part of each worker's CPUs that is left to Ray Data's tasks; trials that take every CPU starve them."""

KEPT_TILES = 10_000
"""Validation tiles that stay in a GPU's memory from epoch to epoch: 20 KB each, as bytes."""

WORKER_FAILURES = 3
"""How often the workers of a trial are started again from its last epoch."""

NO_ROOM = ("out of memory", "ALLOC_FAILED", "NOT_INITIALIZED", "unable to find an engine")
"""What PyTorch, CUDA, cuBLAS and cuDNN say where a GPU's memory is too small."""

TOO_LARGE = (
    "too large for its share of the GPU's memory; fewer trials a GPU (--gpus-per-trial), smaller batches, or "
    "a space without such networks would help"
)


@dataclass(frozen=True)
class WorkerResources:
    """What one worker of a trial may use, Ray Data's share of the CPUs included."""

    workers: int
    cpus: float
    gpus: float
    elastic: bool = False
    """Begin, or go on, with as few as one worker where there is no room for all (`for_refits`)."""

    def training(self) -> dict[str, float]:
        """Return the resources of the training process itself."""
        resources = {"CPU": self.cpus * (1 - DATA_SHARE)}
        return resources | {"GPU": self.gpus} if self.gpus else resources

    def for_refits(self) -> "WorkerResources":
        """Return the same, elastic where that can be.

        A refit may change its number of workers, as nothing else depends on its speed; a search's trial may
        not, or unlike trials would be compared. Ray Train cannot count shares of a GPU for elastic workers.
        """
        return replace(self, elastic=self.workers > 1 and self.gpus == int(self.gpus))


class Share(NamedTuple):
    """One worker's tiles."""

    training: ray.data.Dataset
    validation: ray.data.Dataset


@dataclass(frozen=True)
class Tiles:
    """The decoded tiles, held once in the object store, and each worker's share of them.

    The training shares are of one length, so that every worker takes as many steps; the validation shares
    hold each tile exactly once.
    """

    shares: dict[int, list[Share]]
    """By the number of workers; of elastic trials, for every number that they may have."""
    shown: samples.Samples
    """A few of the validation tiles, to look at."""

    @classmethod
    def share(
        cls, training: ray.data.Dataset, validation: ray.data.Dataset, workers: int, elastic: bool = False
    ) -> "Tiles":
        """Share materialized datasets among the workers of a trial.

        Raises:
            UserError: there are more workers than training tiles.
        """
        if training.count() < workers:
            raise UserError(f"{training.count()} training tiles: too few for {workers} workers a trial")
        few = samples.choose(cast(Iterable[Batch], validation.iter_batches(batch_size=None)))
        shares = {}
        for number in range(1 if elastic else workers, workers + 1):
            if number == 1:
                shares[1] = [Share(training, validation)]
                continue
            count = validation.count()
            cuts = [count * i // number for i in range(1, number)]
            parts = training.split(number, equal=True), validation.split_at_indices(cuts)
            shares[number] = [Share(*share) for share in zip(*parts, strict=True)]
        return cls(shares, few)


def run_trial(spec: dict[str, Any], *, tiles: Tiles, resources: WorkerResources, storage: str) -> None:
    """Run one trial to its end; Tune's function trainable.

    Args:
        spec: `config` (nested dict of a TrialConfig), `number`, `resume` (checkpoints to go on from, the
            newest first; paths or URIs), and `parameters` (what the study drew).
        tiles: shared by all trials.
        resources: of each worker.
        storage: folder or URI below which the checkpoints of several workers go.
    """

    def worker() -> None:
        _train_worker(spec, tiles, resources)

    if resources.workers == 1:
        TorchTrainer(worker, scaling_config=train.ScalingConfig(num_workers=0)).fit()
        return
    trainer = TorchTrainer(
        worker,
        scaling_config=train.ScalingConfig(
            # A pair makes it elastic, which Ray's annotation does not know yet.
            num_workers=(1, resources.workers) if resources.elastic else resources.workers,  # type: ignore[arg-type]
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.training(),
        ),
        run_config=train.RunConfig(
            # The same name after a restart: Ray Train then goes on from its last checkpoint.
            name=f"{spec['number']:04d}-workers",
            storage_path=storage,
            callbacks=[TuneReportCallback()],  # type: ignore[no-untyped-call, list-item]
            failure_config=train.FailureConfig(max_failures=WORKER_FAILURES),
            # Reports wait in two queues before the study names their checkpoint.
            checkpoint_config=train.CheckpointConfig(num_to_keep=4),
        ),
    )
    try:
        trainer.fit()
    except train.WorkerGroupError as error:
        if not has_no_room(error):
            raise
        # Tune would start it `RETRIES` times more, each time with as many failures of its workers.
        tune.report(_failed(1, f"{TOO_LARGE}: {error}", crashed=True))


def has_no_room(error: Exception) -> bool:
    """Tell whether an error says that a GPU's memory is too small."""
    return any(words in str(error) for words in NO_ROOM)


def _failed(epoch: int, reason: str, crashed: bool = False) -> dict[str, Any]:
    """Return what a trial reports that must not be started again: it would end the same way."""
    score = {"epoch": epoch, "map": 0.0, "best_map": 0.0, "finished": True}
    return score | {"failed": reason, "crashed": crashed}


def _first_intact(checkpoints: Iterable[train.Checkpoint], stack: ExitStack) -> Path | None:
    """Return the first that is whole, in a folder that stays until the stack ends.

    A machine that dies while it writes may leave half a checkpoint. Without a whole one, the trial starts at
    its first epoch.
    """
    for place in checkpoints:
        try:
            folder = Path(stack.enter_context(place.as_directory()))
            checkpoint.check(folder)
        except (checkpoint.CheckpointError, OSError) as error:
            print(f"not going on from {place.path}: {error}", file=sys.stderr)
        else:
            return folder
    return None


def _device(resources: WorkerResources) -> torch.device:
    """Return this worker's device, a GPU with its share of the memory free.

    Without a GPU of its own a worker sees all of them, and must not take one.
    """
    if not resources.gpus or not torch.cuda.is_available():
        return torch.device("cpu")
    # Tune's process held an earlier trial, whose cached blocks those that share the GPU cannot use.
    gc.collect()
    torch.cuda.empty_cache()
    if resources.gpus < 1:  # more than its share would be out of memory for those that share the GPU
        torch.cuda.set_per_process_memory_fraction(resources.gpus)
    return torch.device("cuda") if resources.workers == 1 else get_device()


def _validation(tiles: ray.data.Dataset, device: torch.device) -> Callable[[], loop.Batches]:
    """Return what gives the validation tiles' batches, epoch for epoch."""

    def batches() -> loop.Batches:
        return stream.plain_stream(tiles, batch_size=EVALUATION_BATCH, device=str(device))

    if device.type != "cuda" or tiles.count() > KEPT_TILES:
        return batches
    # They stay on the GPU: a stream takes longer to start than it takes to judge them.
    return cache(lambda: list(batches()))


def _place_among_workers(resources: WorkerResources) -> tuple[int, int]:
    """Return this worker's rank and how many there are; of elastic ones, now."""
    if resources.workers == 1:  # inside Tune's actor, Ray Train's context is not to be asked
        return 0, 1
    context = train.get_context()
    return context.get_world_rank(), context.get_world_size()


def _train_worker(spec: dict[str, Any], tiles: Tiles, resources: WorkerResources) -> None:
    """Train on this worker's share of the tiles."""
    config = TrialConfig.from_dict(spec["config"])
    alone = resources.workers == 1
    rank, world = _place_among_workers(resources)
    share = tiles.shares[world][rank]
    cpu.use(resources.cpus)
    batch_size = max(1, config.batch_size // world)
    device = _device(resources)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.name()

    def start(epoch: int) -> Iterator[stream.Tensors]:
        return stream.epoch_stream(
            share.training,
            config.augment,
            seed=config.seed,
            epoch=epoch,
            batch_size=batch_size,
            cpus_per_task=resources.cpus * DATA_SHARE,
            device=str(device),
        )

    reached = 0

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        nonlocal reached
        reached = metrics["epoch"]
        if folder and metrics["map"] == metrics["best_map"]:
            samples.draw(folder, tiles.shown, device)
        checkpoint = train.Checkpoint.from_directory(folder) if folder else None
        (tune if alone else train).report(metrics | {"device": name, "workers": world}, checkpoint=checkpoint)

    last = tune.get_checkpoint() if alone else train.get_checkpoint()
    known = ([last] if last else []) + [train.Checkpoint(place) for place in spec["resume"]]
    count = share.training.count()
    with (
        ExitStack() as stack,
        stream.EpochStreams(start, epochs=config.epochs, tiles=count) as training_batches,
    ):
        try:
            loop.fit(
                config,
                training_batches,
                _validation(share.validation, device),
                report,
                steps=math.ceil(count / batch_size),
                device=device,
                resume=_first_intact(known, stack),
            )
        # Each is a result, not a crash: to start it again now would end the same way.
        except loop.Diverged as error:
            report(_failed(error.epoch, str(error)), None)
        except RuntimeError as error:
            if not alone or not has_no_room(error):
                raise  # of several workers, the others wait for this one until Ray Train ends them
            report(_failed(reached + 1, f"{TOO_LARGE}: {error}", crashed=True), None)
