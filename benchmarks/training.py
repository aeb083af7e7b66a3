"""Training on CPU: saltray's loop on a Ray Data stream, against the plain loop with the set in memory."""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import ray
import torch
from ray.data.extensions import ArrowTensorArray

from benchmarks.peers import Arrays, PlainLoop, seed_config, synthetic
from benchmarks.rows import Goal, Row, at_least, interleaved, median
from saltray import connection
from saltray.config import TrialConfig
from saltray.data import stream
from saltray.data.dataset import TILES_PER_BLOCK
from saltray.network import cpu
from saltray.training.loop import fit
from saltray.training.trial import DATA_SHARE, EVALUATION_BATCH

TRAINING, VALIDATION = 128, 64
EPOCHS = 1
"""Timed ones, between a first that is not, and another that never comes: so each pays for the stream of the
one after it, and for a checkpoint to go on from."""
THREADS = 2
RUNS = 3
TOLERANCE = 0.005
SAME = {
    "model": {
        "architecture": "resunet",
        "filters": 4,
        "levels": 3,
        "dropout": 0.0,
        "residual_blocks": 1,
    },
    "optim": {"learning_rate": 2e-3, "schedule": "cosine"},
    "batch_size": 8,
    "epochs": 12,
}
"""What is trained to see that a faster saltray finds what it found before: long enough to learn something."""


def dataset(tiles: Arrays) -> ray.data.Dataset:
    """Put tiles into the object store as `saltray.data.dataset.decode` does."""
    blocks = [tiles.part(i, i + TILES_PER_BLOCK).columns(i) for i in range(0, len(tiles), TILES_PER_BLOCK)]
    tables = [
        pyarrow.table(
            {name: ArrowTensorArray.from_numpy(c) if c.ndim > 1 else c for name, c in block.items()}
        )
        for block in blocks
    ]
    held: ray.data.Dataset = ray.data.from_arrow(tables).materialize()
    return held


class _Enough(Exception):
    """Training need not go on."""


class Trained(NamedTuple):
    """When each epoch was reported, in seconds, and its validation mAP."""

    times: list[float]
    scores: list[float]


def train_on_ray(
    config: TrialConfig,
    training: ray.data.Dataset,
    validation: ray.data.Dataset,
    device: str = "cpu",
    cpus: float = THREADS,
    stop_after: int | None = None,
) -> Trained:
    """Train as a one-worker trial does, checkpoints and all; as one that is stopped early, where asked to."""
    cpu.use(THREADS)
    done = Trained([], [])
    count = training.count()

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        done.times.append(time.perf_counter())
        done.scores.append(metrics["map"])
        if len(done.times) == stop_after:
            raise _Enough

    def start(epoch: int) -> Iterator[stream.Tensors]:
        return stream.epoch_stream(
            training, config.augment, seed=0, epoch=epoch, batch_size=config.batch_size,
            cpus_per_task=cpus * DATA_SHARE, device=device,
        )  # fmt: skip

    streams = stream.EpochStreams(start, epochs=config.epochs, tiles=count)
    with contextlib.suppress(_Enough), streams as training_batches:
        fit(
            config,
            training_batches,
            lambda: stream.plain_stream(validation, batch_size=EVALUATION_BATCH, device=device),
            report,
            steps=math.ceil(count / config.batch_size),
            device=torch.device(device),
        )
    return done


def train_plainly(config: TrialConfig, training: Arrays, validation: Arrays) -> list[float]:
    """Train as `train_on_ray` does, by the plain loop."""
    torch.set_num_threads(THREADS)
    loop = PlainLoop(config, training, validation)
    times = []
    for _ in range(1 + EPOCHS):
        loop.epoch()
        times.append(time.perf_counter())
    return times


def measure() -> list[Row]:
    """Measure tiles a second of the two baseline networks."""
    tiles = synthetic(TRAINING + VALIDATION)
    training, validation = tiles.part(0, TRAINING), tiles.part(TRAINING, len(tiles))
    connection.connect(None, cpus=THREADS)
    held = dataset(training), dataset(validation)
    share = THREADS * (1 - DATA_SHARE)
    rows = []
    for architecture, name in (("unet", "U-Net"), ("resunet", "ResUNet")):
        config = seed_config(architecture, epochs=2 + EPOCHS)
        a, b = interleaved(
            partial(_ours, share, config, *held), partial(_peer, share, config, training, validation), RUNS
        )
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        note = f"{sorted(a)[RUNS // 2]:.0f} tiles/s against {sorted(b)[RUNS // 2]:.0f}, {THREADS} threads"
        rows.append(
            median(f"training the baseline {name}, CPU", ratios, "x", at_least(1.2), note, ours=a, peer=b)
        )
    scores = _on_ray(share, train_on_ray, TrialConfig.from_dict(SAME), *held).scores
    note = f"{len(scores)} epochs: {', '.join(f'{s:.4f}' for s in scores)}"
    same = Goal("as before, within", TOLERANCE)
    # Its name tells the network and the size: rows of one name are compared.
    name = f"validation mAP of the same seed, a small ResUNet, {SAME['epochs']} epochs of {TRAINING} tiles"
    rows.append(Row(name, scores[-1], "mAP", same, None, note))
    connection.disconnect()
    return rows


def _on_ray(cpus: float, function: Any, *arguments: Any) -> Any:
    """Run in a process of Ray's, as a trial does; a new one, without what another run has set in it."""
    return ray.get(ray.remote(max_calls=1)(function).options(num_cpus=cpus).remote(*arguments))


def _rate(times: list[float]) -> float:
    return EPOCHS * TRAINING / (times[EPOCHS] - times[0])


def _ours(cpus: float, config: TrialConfig, *held: ray.data.Dataset) -> float:
    return _rate(_on_ray(cpus, train_on_ray, config, *held, "cpu", THREADS, 1 + EPOCHS).times)


def _peer(cpus: float, config: TrialConfig, *tiles: Arrays) -> float:
    return _rate(_on_ray(cpus, train_plainly, config, *tiles))
