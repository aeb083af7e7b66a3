"""Sets of 10 and 100 times the tiles, the last of them ten times the object store's memory.

Read, checked and decoded from PNG files as a search does, then streamed through shuffle and augmentation for
one epoch. No training: what is asked is whether the stream keeps its pace and its memory.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from ray.cluster_utils import Cluster

from benchmarks import folders
from benchmarks.memory import own_memory
from benchmarks.rows import Row, at_most
from saltray import connection
from saltray.config import AugmentConfig
from saltray.data import dataset, stream

TILES = 800
TIMES = (1, 10, 100)
STORE = 160_000_000
"""Bytes of the object store; a tile takes 20 kB."""


def measure() -> list[Row]:
    """Measure each size in a Ray of its own store's size."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        sets = [folders.write(Path(name) / str(times), train=times * TILES, test=1) for times in TIMES]
        # Each in a driver of its own, which holds nothing of the Ray and the set before.
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as drivers:
            figures = list(drivers.map(_one, sets, [times * TILES for times in TIMES]))
    for times, figure in zip(TIMES, figures, strict=True):
        label = f"{times * TILES:,} tiles"
        for what in ("decoding", "streaming"):
            base, own = (1e6 * f[what] / f["tiles"] for f in (figures[0], figure))
            rows.append(
                Row(
                    f"{what} {label}, time a tile", own / base, "x of the small set's",
                    None if times == 1 else at_most(1.5), None, f"{own:.0f} us a tile", figure,
                )
            )  # fmt: skip
    peak = max(figure["driver"] for figure in figures)
    spilled = figures[-1]["spilled"]
    rows.append(
        Row(
            f"driver's peak memory at {TIMES[-1] * TILES:,} tiles over the small set's",
            figures[-1]["driver"] / figures[0]["driver"], "x", at_most(1.5), None,
            f"{peak:.0f} MB; the set has {figures[-1]['tiles'] * 2 * 101**2 / 1e6:.0f} MB, the store "
            f"{STORE / 1e6:.0f}, {spilled:.0f} MB lay on the disk",
        )
    )  # fmt: skip
    return rows


def _one(data: Path, tiles: int) -> dict[str, float]:
    """Decode and stream a set; return seconds, and MB."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": STORE, "include_dashboard": False},
    )
    connection.connect(cluster.address)
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            peak[0] = max(peak[0], own_memory(os.getpid()))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    table = dataset.read_train(dataset.open_folder(str(data)))
    # Uncounted: the first task of a Ray starts its workers.
    dataset.decode(table.where(np.arange(len(table.rows)) < 2 * dataset.TILES_PER_BLOCK))
    started = time.perf_counter()
    decoded, problems = dataset.decode(table)
    middle = time.perf_counter()
    assert not problems and not table.problems, (problems, table.problems)

    def epoch() -> int:
        batches = stream.epoch_stream(
            decoded, AugmentConfig(), seed=0, epoch=1, batch_size=64, cpus_per_task=0.2
        )
        return sum(len(batch["image"]) for batch in batches)

    if tiles == TILES:
        epoch()  # else what a stream's first tasks cost would be all that is seen of a small set
    streaming = time.perf_counter()
    seen = epoch()
    ended = time.perf_counter()
    assert seen == tiles, (seen, tiles)
    stop.set()
    watcher.join()
    assert cluster.head_node is not None
    session = Path(cluster.head_node.get_session_dir_path())
    spilled = sum(f.stat().st_size for f in session.rglob("ray_spilled_objects*/*") if f.is_file()) / 1e6
    connection.disconnect()
    cluster.shutdown()
    return {
        "tiles": tiles, "decoding": middle - started, "streaming": ended - streaming, "driver": peak[0],
        "spilled": spilled,
    }  # fmt: skip
