"""Memory while four trials run side by side: the tiles are held once, nothing grows from trial to trial."""

import statistics
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune

from benchmarks.peers import synthetic
from benchmarks.rows import Row, at_most
from benchmarks.searches import run_here, share
from benchmarks.trials import space
from saltray import connection
from saltray.config import SearchConfig
from saltray.search.plan import Plan
from saltray.training.trial import WorkerResources

TRIALS, SIDE_BY_SIDE = 50, 4
TILES, VALIDATION = 1600, 64
EARLY = 10
"""Trials after which everything is warm; growth is counted from there."""
TICK = 0.5


def own_memory(pid: int) -> float:
    """Return a process's own memory, in MB: no file, and no page of the object store, which all look into.

    Its unique set size would count the store's pages that no other process happens to look into just now.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon")), 0.0)


class Watch(threading.Thread):
    """Samples memory, in MB, a few times a second; each sample with the number of trials that had ended."""

    def __init__(self) -> None:
        """Begin with nothing ended."""
        super().__init__(daemon=True)
        self.ended = 0
        self.stop = threading.Event()
        self.driver: list[tuple[int, float]] = []
        self.store: list[tuple[int, float]] = []
        self.trials: dict[int, list[tuple[int, float]]] = defaultdict(list)
        """By process id."""

    def run(self) -> None:
        """Sample until told to stop."""
        me = psutil.Process()
        whole = ray.cluster_resources()["object_store_memory"]  # type: ignore[no-untyped-call]
        while not self.stop.wait(TICK):
            self.driver.append((self.ended, own_memory(me.pid)))
            free = ray.available_resources().get("object_store_memory", whole)  # type: ignore[no-untyped-call]
            self.store.append((self.ended, (whole - free) / 1e6))
            for process in me.children(recursive=True):
                try:
                    if "ImplicitFunc" in " ".join(process.cmdline()):
                        self.trials[process.pid].append((self.ended, own_memory(process.pid)))
                except (psutil.Error, OSError):
                    continue


class Ended(tune.Callback):
    """Tells the watch of each trial's end."""

    def __init__(self, watch: Watch) -> None:
        """Keep the watch."""
        self._watch = watch

    def __getstate__(self) -> dict[str, Any]:
        """Leave the thread out of Tune's own snapshot of the search, which is never restored."""
        return {}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count it."""
        self._watch.ended += 1


def measure() -> list[Row]:
    """Run fifty trials, four at a time."""
    tiles = synthetic(TILES + VALIDATION)
    training, validation = tiles.part(0, TILES), tiles.part(TILES, len(tiles))
    pixels = (tiles.image.nbytes + tiles.mask.nbytes) / 1e6
    connection.connect(None, cpus=SIDE_BY_SIDE)
    held = share(training, validation)
    watch = Watch()
    watch.start()
    config = SearchConfig(trials=TRIALS, epochs=1, scheduler="none")
    run_here(space, held, Plan(SIDE_BY_SIDE, WorkerResources(1, 1, 0)), config, callbacks=[Ended(watch)])
    watch.stop.set()
    watch.join()
    time.sleep(2)  # for what is released after a search
    whole = ray.cluster_resources()["object_store_memory"]  # type: ignore[no-untyped-call]
    left = (whole - ray.available_resources()["object_store_memory"]) / 1e6  # type: ignore[no-untyped-call]
    connection.disconnect()
    peaks = [max(mb for _, mb in samples) for samples in watch.trials.values()]
    stored = max(mb for _, mb in watch.store)
    growth = max((_growth(samples) for samples in watch.trials.values()), default=0.0)
    beside = f"{SIDE_BY_SIDE} trials side by side, {TRIALS} in all"
    return [
        Row(
            "object store's peak over the tiles' own size", stored / pixels, "x", None, None,
            f"{stored:.0f} MB for {pixels:.0f} MB of pixels: held once, and each trial's stream; {beside}",
            {"after": left},
        ),
        Row(
            "object store after the trials over the tiles' own size", left / pixels, "x", at_most(1.2), None,
            f"{left:.0f} MB",
        ),
        Row(
            "driver's growth a trial", _growth(watch.driver) / (TRIALS - 2 * EARLY), "MB", at_most(0.5), None,
            f"{watch.driver[-1][1]:.0f} MB of its own at last; from the trials after {EARLY} on",
        ),
        Row(
            "trial process's growth over its trials", growth, "MB", at_most(25), None,
            f"the worst of {len(watch.trials)} processes, about {TRIALS // SIDE_BY_SIDE} trials each",
        ),
        Row(
            "trial process's peak", max(peaks, default=None), "MB", None, None,
            "its own: neither PyTorch's libraries nor the object store",
        ),
    ]  # fmt: skip


def _growth(samples: list[tuple[int, float]]) -> float:
    """Return how much more is held in the last trials than when all had become warm, in MB."""
    early = [mb for ended, mb in samples if EARLY <= ended < 2 * EARLY]
    late = [mb for ended, mb in samples if TRIALS - EARLY <= ended < TRIALS]
    return statistics.median(late) - statistics.median(early) if early and late else 0.0
