"""`python -m saltray.predict` on as many tiles as the contest's test set, against a plain program."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import folders
from benchmarks.rows import Row, at_least, interleaved, median, seconds
from saltray.config import TrialConfig
from saltray.contest import submission
from saltray.network.model import build_model
from saltray.training import checkpoint

TILES = 18_000
FILTERS = 4
"""A quarter of the baseline's: with 16, the row would take five minutes on two cores."""
RUNS = 1
"""Both programs take a minute or more: long enough to even out."""


def measure() -> list[Row]:
    """Measure both programs, from the command to the submission."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folders.write(folder / "set", train=10, test=TILES)
        model = folder / "model"
        model.mkdir()
        config = TrialConfig.from_dict({"model": {"filters": FILTERS}})
        torch.manual_seed(0)
        weights = build_model(config.model).state_dict()
        # At random it would call nearly every pixel of some tiles salt: longer codes than a trained one's.
        checkpoint.save(model, weights, config, {"threshold": 0.5, "tta": False, "min_area": 0})
        written: list[list[Path]] = [[], []]

        def program(which: int, command: Callable[[Path], list[str]]) -> Callable[[], float]:
            def run() -> float:
                out = folder / f"{which}-{len(written[which])}.csv"
                written[which].append(out)
                whole = [sys.executable, "-m", *command(out)]
                return seconds(lambda: subprocess.run(whole, check=True, capture_output=True))

            return run

        ours, peer = interleaved(
            program(0, lambda out: ["saltray.predict", str(model), "--data", str(data), "--out", str(out)]),
            program(1, lambda out: ["benchmarks.plain_predict", str(model), str(data), str(out)]),
            RUNS,
        )
        agree = _agreement(written[0][0], written[1][0])
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    device = "a GPU" if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    note = f"{min(ours):.0f} s against {min(peer):.0f} for {TILES:,} tiles; {agree:.2%} of the codes equal"
    more = {"ours": ours, "peer": peer, "equal": agree}
    name = f"`python -m saltray.predict`, a U-Net of {FILTERS} filters, {device}"
    return [median(name, ratios, "x", at_least(1.0), note, **more)]


def _agreement(first: Path, second: Path) -> float:
    a, b = (submission.read(file) for file in (first, second))
    return float((a == b.loc[a.index]).mean())
