"""Rows that need a GPU: training against a loop whose data lies in its memory, and trials that share it."""

import time
from typing import Any

import ray
import torch
from torch import nn

from benchmarks.peers import Arrays, seed_config, synthetic
from benchmarks.rows import Row, at_least, interleaved, median
from benchmarks.training import dataset, train_on_ray
from saltray import connection
from saltray.config import TrialConfig
from saltray.network.model import build_model
from saltray.search import packing
from saltray.training.trial import WorkerResources

TILES, VALIDATION = 3200, 64
EPOCHS, RUNS = 4, 3
WARMUP = 3  # steps before a CUDA graph is captured, on a stream of their own, as PyTorch's guide asks


def measure() -> list[Row]:
    """Measure where there is a GPU."""
    names = {"unet": "U-Net", "resunet": "ResUNet"}
    if not torch.cuda.is_available():
        shared = "n trials sharing one GPU over one alone"
        whats = [*(f"training the baseline {name}, GPU" for name in names.values()), shared]
        return [Row(what, None, "x", None, None, "no GPU here") for what in whats]
    tiles = synthetic(TILES + VALIDATION)
    training, validation = tiles.part(0, TILES), tiles.part(TILES, len(tiles))
    connection.connect(None)
    held = dataset(training), dataset(validation)
    # A process for each run: by `.options` alone it would stay, and hold its memory while the other is timed.
    ours: Any = ray.remote(num_gpus=1, max_calls=1)(train_on_ray)
    peer: Any = ray.remote(num_gpus=1, max_calls=1)(train_graphed)
    rows = []
    for architecture, name in names.items():
        config = seed_config(architecture, epochs=2 + EPOCHS)
        a, b = interleaved(
            lambda config=config: _rate(ray.get(ours.remote(config, *held, "cuda", 1.0, 1 + EPOCHS)).times),  # type: ignore[misc]
            lambda config=config: ray.get(peer.remote(config, training)),  # type: ignore[misc]
            RUNS,
        )
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        rates = f"{sorted(a)[RUNS // 2]:,.0f} tiles/s against {sorted(b)[RUNS // 2]:,.0f}"
        note = f"{rates} of a bf16 loop as CUDA graphs"
        rows.append(
            median(f"training the baseline {name}, GPU", ratios, "x", at_least(0.95), note, ours=a, peer=b)
        )
    rows.append(_shared())
    connection.disconnect()
    return rows


def _rate(times: list[float]) -> float:
    # A trial's last epoch has no stream after it, and its checkpoint no state: it never comes to that.
    return EPOCHS * TILES / (times[EPOCHS] - times[0])


def train_graphed(config: TrialConfig, training: Arrays) -> float:
    """Train without validation from GPU memory, channels-last, bf16, each step one CUDA graph."""
    cuda = torch.device("cuda")
    torch.manual_seed(0)
    images = torch.from_numpy(training.image).to(cuda)
    masks = torch.from_numpy(training.mask).to(cuda).float()
    model = build_model(config.model).to(cuda)
    optimizer = torch.optim.Adam(model.parameters(), config.optim.learning_rate, fused=True, capturable=True)
    loss_function = nn.BCEWithLogitsLoss()
    which = torch.zeros(config.batch_size, dtype=torch.int64, device=cuda)

    def step() -> None:
        x = images[which].unsqueeze(1).float().div_(255).contiguous(memory_format=torch.channels_last)
        flip = torch.rand(len(which), device=cuda) < config.augment.flip
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
        y = torch.where(flip[:, None, None], masks[which].flip(2), masks[which])
        # The cache of casts must not outlive a capture.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            logits = model(x)
        loss = loss_function(logits.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARMUP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for batch in torch.split(torch.randperm(TILES, device=cuda), config.batch_size):
            which.copy_(batch)
            graph.replay()
    torch.cuda.synchronize()
    return EPOCHS * TILES / (time.perf_counter() - started)


def _shared() -> Row:
    """Find how many trials of the baseline U-Net a GPU takes, as `--gpus-per-trial auto` does."""
    config = seed_config("unet").to_dict()
    most = packing.most_side_by_side(connection.nodes())
    rates: dict[int, float] = {}

    def rate(count: int) -> float:
        rates[count] = packing.together(config, WorkerResources(1, 1.0, 1 / count), count)
        return rates[count]

    best = packing.best_count(rate, most)
    found = ", ".join(f"{n}: {value:,.0f}" for n, value in rates.items())
    note = f"tiles/s together by number of trials: {found}; `--gpus-per-trial auto` takes {best}"
    return Row(
        "n trials sharing one GPU over one alone", rates[best] / rates[1], "x", at_least(1.0), None, note
    )
