"""Synthetic seismic tiles in the contest's layout, for a first run with nothing at hand.

A tile is a stack of layers, folded, tilted and cut by faults, as reflection coefficients that are convolved
down each column with a Ricker wavelet (Ricker 1953). A salt body cuts the layers off: a bright reflection at
its top, chaotic and weaker inside. Bands of disturbed sediment look like salt, but are none. The share of
empty masks and the spread of coverage are near the real set's (39 % empty; the others' median is 0.36).
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image

from saltray.cli import local, run_program
from saltray.config import TILE, UserError
from saltray.contest import rle

EMPTY_SHARE = 0.39

Grid = npt.NDArray[np.float64]
_MARGIN = 40  # pixels of section above and below the tile, for the layers to move in


def ricker(frequency: float, length: int = 31) -> Grid:
    """Return a Ricker wavelet sampled once a pixel; `frequency` in cycles a pixel, peak 1 in the middle."""
    t = (np.arange(length) - length // 2) * np.pi * frequency
    return np.asarray((1 - 2 * t**2) * np.exp(-(t**2)))


def tile(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_], float]:
    """Make one tile: image uint8 (101, 101), mask bool (101, 101), depth z in [50, 959]."""
    depth = float(rng.integers(50, 960))
    reflectivity = _layers(rng)
    mask = _salt(rng) if rng.random() >= EMPTY_SHARE else np.zeros((TILE, TILE), bool)
    inside = mask & (np.cumsum(mask, axis=0) > 2)
    section = np.where(inside, rng.uniform(0.2, 0.5) * _chaos(rng), reflectivity)
    # The top of the salt: a strong positive coefficient where a column enters it.
    top = mask & ~np.vstack([np.zeros((1, TILE), bool), mask[:-1]])
    section = np.where(top, rng.uniform(1.0, 2.0), section)
    wavelet = ricker(rng.uniform(0.05, 0.1))
    image = np.apply_along_axis(lambda column: np.convolve(column, wavelet, mode="same"), 0, section)
    noise = rng.normal(0, 1, (TILE, TILE))
    noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3
    image = image / (image.std() + 1e-9) + rng.uniform(0.2, 0.6) * noise
    grey = np.clip(rng.uniform(105, 145) + rng.uniform(25, 45) * image, 0, 255)
    return grey.astype(np.uint8), mask, depth


def _layers(rng: np.random.Generator) -> Grid:
    """Return reflection coefficients of folded, faulted layers, float (101, 101)."""
    rows = TILE + 2 * _MARGIN
    log = np.where(rng.random(rows) < rng.uniform(0.12, 0.3), rng.normal(0, 1, rows), 0.0)
    x = np.arange(TILE)
    fold = rng.uniform(-0.3, 0.3) * (x - TILE / 2)
    fold = fold + rng.uniform(0, 8) * np.sin(2 * np.pi * x / rng.uniform(80, 300) + rng.uniform(0, 6.3))
    shift = np.broadcast_to(fold, (TILE, TILE)).copy()
    y = np.arange(TILE)[:, None]
    for _ in range(rng.integers(0, 3)):
        plane = rng.uniform(0, TILE) + rng.uniform(-0.6, 0.6) * y
        shift += np.where(x[None, :] > plane, rng.uniform(-12, 12), 0)
    index = np.clip(np.round(y + _MARGIN + shift), 0, rows - 1).astype(int)
    layers = np.asarray(log[index])
    if rng.random() < 0.1:
        # Disturbed sediment: chaotic as salt is, but a band of the layers, without a bright top.
        band = np.abs(y - rng.uniform(0, TILE) + fold[None, :]) < rng.uniform(8, 35)
        layers = np.where(band, rng.uniform(0.1, 0.4) * _chaos(rng), layers)
    return layers


def _chaos(rng: np.random.Generator) -> Grid:
    """Return coefficients without layers, of standard deviation 1, alike over a few pixels sideways."""
    width = int(rng.integers(1, 4))
    white = rng.normal(0, 1, (TILE, TILE + width - 1))
    windows = np.lib.stride_tricks.sliding_window_view(white, width, axis=1)
    return np.asarray(windows.mean(axis=2) * np.sqrt(width))


def _salt(rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return a salt body: below a wavy top, and often left or right of a flank; never the whole tile."""
    x, y = np.arange(TILE), np.arange(TILE)[:, None]
    while True:
        waves = sum(
            rng.uniform(0, 14 / k) * np.sin(2 * np.pi * k * x / (2 * TILE) + rng.uniform(0, 6.3))
            for k in (1, 2, 3)
        )
        body = y > rng.uniform(-25, TILE) + rng.uniform(-0.7, 0.7) * (x - TILE / 2) + waves
        if rng.random() < 0.5:
            flank = rng.uniform(0, TILE) + rng.uniform(-0.8, 0.8) * (y - TILE / 2)
            body &= (x < flank) if rng.random() < 0.5 else (x > flank)
        if 0.002 < body.mean() < 1:
            return np.asarray(body, bool)


def files(*, train: int, test: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Make a data set in the contest's layout, and the test tiles' truth beside it.

    Args:
        train: number of labelled tiles.
        test: number of test tiles.
        seed: the same seed gives the same files.

    Yields:
        Each file's place and what it holds: below `data/` what a contestant has, in `truth.csv` what only
        the judge has. About 15 kB a tile.
    """
    rng = np.random.default_rng(seed)
    depths, codes = [], {}
    for number in range(train + test):
        image, mask, z = tile(rng)
        part = "train" if number < train else "test"
        name = f"{part}{number:06d}"
        yield f"data/{part}/images/{name}.png", _png(np.repeat(image[:, :, None], 3, axis=2))
        if part == "train":
            # As in the contest: 16 bits, or 8 where the mask is empty.
            pixels = mask.astype(np.uint16) * 65535 if mask.any() else mask.astype(np.uint8)
            yield f"data/train/masks/{name}.png", _png(pixels)
        depths.append(f"{name},{z:.0f}")
        codes[name] = rle.encode(mask)
    train_ids = [name for name in codes if name.startswith("train")]
    test_ids = [name for name in codes if name.startswith("test")]
    yield "data/train.csv", _csv("id,rle_mask", [f"{i},{codes[i]}" for i in train_ids])
    yield "data/depths.csv", _csv("id,z", depths)
    yield "data/sample_submission.csv", _csv("id,rle_mask", [f"{i},1 1" for i in test_ids])
    yield "truth.csv", _csv("id,rle_mask", [f"{i},{codes[i]}" for i in test_ids])


def write(folder: Path, made: Iterable[tuple[str, bytes]]) -> Path:
    """Write a data set that `files` has made; return the folder of what a contestant has.

    Raises:
        UserError: the folder already holds such data, or cannot be written.
    """
    for path in (folder / "data", folder / "truth.csv"):
        if path.exists():
            raise UserError(f"{path}: already there; choose another folder")
    try:
        for part in ("train/images", "train/masks", "test/images"):
            (folder / "data" / part).mkdir(parents=True)
        for name, content in made:
            (folder / name).write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from None
    return folder / "data"


def _png(pixels: npt.NDArray[Any]) -> bytes:
    """Make a PNG. Of such noise zlib's first level makes smaller files than its usual one, and sooner."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _csv(header: str, lines: list[str]) -> bytes:
    return ("\n".join([header, *lines]) + "\n").encode()


def main(
    folder: Annotated[str, typer.Argument(help="A folder of this machine; gets data/ and truth.csv.")],
    train: Annotated[int, typer.Option(min=10, help="Labelled tiles.")] = 480,
    test: Annotated[int, typer.Option(min=1, help="Test tiles.")] = 240,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write synthetic seismic tiles in the contest's layout."""
    data = write(local(folder), files(train=train, test=test, seed=seed))
    typer.echo(
        f"{train} labelled and {test} test tiles in {data}; the test tiles' truth in {folder}/truth.csv"
    )


if __name__ == "__main__":
    run_program(main)
