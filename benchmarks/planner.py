"""`python -m benchmarks.planner`: what a search on 1, 8 and 64 GPU machines would do.

For who has to plan one. SIMULATED: no GPU is used. The real driver (study in SQLite, TPE, Tune, live table,
TensorBoard) runs trials that report at once and train nothing, on a local Ray that is told of so many GPUs.
The driver is one process, so the CPU seconds that it spends per epoch and per trial say how many it can
serve. Trials per hour follow from them and from the seconds that an epoch is assumed to take.
"""

import io
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import optuna
import ray
import torch
import typer
from rich.console import Console

from benchmarks import trivial
from saltray.cli import run_program
from saltray.config import TILE, SearchConfig, TrialConfig
from saltray.network.model import EncoderDecoder
from saltray.quiet import quiet
from saltray.records import environment
from saltray.records.study import Place, create_study
from saltray.search import search
from saltray.search.plan import Plan
from saltray.search.space import Space
from saltray.sessions import tracking
from saltray.sessions.view import LiveView
from saltray.training import checkpoint
from saltray.training.loop import Learner

TILES, EPOCHS = 4000, 50
"""Of the contest's training set, and of a full trial."""
EPOCH_SECONDS = (5.0, 20.0)
"""Assumed: an epoch of 3,200 tiles on one GPU of the L4's kind, small U-Net and large ResUNet."""
START_SECONDS = 2.0
"""Assumed: between a trial's end and the next one's first step on the same GPU."""
GPU_PRICE, HEAD_PRICE = 0.35, 0.10
"""Dollars an hour of a spot L4 machine and of the head, as in cluster/README.md."""
NFS_MB, S3_MB = 110.0, 1000.0
"""Assumed: what an NFS server on 1 Gbit/s takes a second, and what S3 takes from one prefix."""


def space(trial: optuna.trial.BaseTrial) -> dict[str, Any]:
    """Draw four parameters, as the search spaces do."""
    return {
        "model": {
            "filters": trial.suggest_int("filters", 8, 32),
            "dropout": trial.suggest_float("dropout", 0.0, 0.6),
            "residual_blocks": trial.suggest_int("residual_blocks", 1, 3),
        },
        "optim": {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True)},
    }


def measure(nodes: int, trials: int, epochs: int) -> dict[str, float]:
    """Run trivial trials, one on each GPU; return the driver's CPU seconds and the seconds gone."""
    config = SearchConfig(trials=trials, epochs=epochs, scheduler="none")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = create_study(Place(folder), "map", "")
        console = Console(file=io.StringIO(), force_terminal=True)
        with (
            LiveView(console, study, trials=trials, epochs=epochs, time_budget=None) as view,
            tracking.TensorBoard(folder / "tensorboard", study) as board,
            quiet(folder / "log"),
        ):
            before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
            search.run_search(
                Space(space, (), Path("planner")), None, Plan(nodes, trivial.Resources(gpus=1.0)),  # type: ignore[arg-type]
                str(folder / "trials"), study, config, [view, board], trivial.run_trial,
            )  # fmt: skip
            after, wall = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - started
        done = sum(t.state == optuna.trial.TrialState.COMPLETE for t in study.get_trials(deepcopy=False))
        assert done == trials, f"{done} of {trials} trials completed"
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"trials": trials, "epochs": epochs, "cpu seconds": round(cpu, 2), "seconds": round(wall, 1)}


def driver(nodes: int) -> dict[str, Any]:
    """Measure the driver's CPU seconds per epoch and per trial: two searches, of short and of long trials."""
    trials = max(2 * nodes, 8)
    runs = [measure(nodes, trials, epochs) for epochs in (2, 22)]
    short, long = (r["cpu seconds"] / trials for r in runs)
    per_epoch = (long - short) / 20
    return {
        "runs": runs,
        "cpu ms per epoch": round(1e3 * per_epoch, 2),
        "cpu ms per trial": 1e3 * (short - 2 * per_epoch),
    }


def checkpoint_mb() -> float:
    """Return the size of what one epoch of the baseline U-Net writes: weights and training state."""
    config = TrialConfig()
    learner = Learner.new(config, torch.device("cpu"), steps=1)
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    assert isinstance(learner.model, EncoderDecoder)
    with tempfile.TemporaryDirectory() as folder:
        weights = learner.model.state_dict()
        checkpoint.save(Path(folder), weights, config, {}, learner.state(learner.model) | {"history": []})
        return sum(f.stat().st_size for f in Path(folder).iterdir()) / 1e6


def predict(nodes: int, seconds: float, cost: dict[str, Any], megabytes: float) -> dict[str, Any]:
    """Compute trials per hour, their cost, and how busy the driver and the storage are."""
    wanted = nodes * 3600 / (EPOCHS * seconds + START_SECONDS)
    cpu = (EPOCHS * cost["cpu ms per epoch"] + cost["cpu ms per trial"]) / 1e3
    writes = wanted / 3600 * EPOCHS * megabytes
    busy = {
        "driver": wanted * cpu / 3600,
        "NFS of 1 Gbit/s": writes / NFS_MB,
        "S3": writes / S3_MB,
    }
    # Behind S3 the driver alone can hold the trials up; NFS is told beside it.
    rate = wanted / max(1.0, busy["driver"])
    return {
        "nodes": nodes,
        "epoch seconds": seconds,
        "trials per hour": round(rate, 1),
        "dollars per 100 trials": round(100 / rate * (nodes * GPU_PRICE + HEAD_PRICE), 2),
        "busy": {name: round(share, 4) for name, share in busy.items()},
        "saturates first": max(busy, key=lambda name: busy[name]),
        "checkpoints MB/s": round(writes, 1),
        "object store of a machine, MB": round(TILES * TILE * TILE * 2 / 1e6),
    }


def main(
    nodes: Annotated[list[int] | None, typer.Option(help="GPU machines; 1, 8 and 64 by default.")] = None,
    measured: Annotated[int, typer.Option(help="Simulate the driver up to this many machines.")] = 64,
    out: Annotated[Path, typer.Option(help="Where to write.")] = Path("benchmarks/results/planner.json"),
) -> None:
    """Measure the driver, predict, print a table and write all figures."""
    megabytes, costs, rows = checkpoint_mb(), {}, []
    for count in nodes or [1, 8, 64]:
        if count <= measured:
            ray.init(num_cpus=2 * count, num_gpus=count, include_dashboard=False, log_to_driver=False)
            costs[count] = driver(count)
            ray.shutdown()
        nearest = max(c for c in costs if c <= count)
        for seconds in EPOCH_SECONDS:
            row = predict(count, seconds, costs[nearest], megabytes)
            rows.append(row | {"driver measured with": nearest})
            typer.echo(json.dumps(rows[-1]))
    content = {
        "simulated": True,
        "checkpoint MB": round(megabytes, 1),
        "assumed": {
            "epochs of a trial": EPOCHS, "seconds between trials": START_SECONDS, "GPU $/h": GPU_PRICE,
            "head $/h": HEAD_PRICE, "NFS MB/s": NFS_MB, "S3 MB/s": S3_MB,
        },
        "driver": costs,
        "rows": rows,
        "environment": environment.describe(),
    }  # fmt: skip
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    run_program(main)
