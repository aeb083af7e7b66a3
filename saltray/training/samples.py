"""A few validation tiles, and the picture of what a model makes of them while it learns."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from saltray.network.model import to_input
from saltray.training import checkpoint

PICTURE = "samples.png"
"""The picture's name in a checkpoint's folder."""

COUNT = 8

_GAP = 3  # pixels between the tiles


class Samples(NamedTuple):
    """A few tiles."""

    image: npt.NDArray[np.uint8]
    """(tiles, height, width)."""
    mask: npt.NDArray[np.uint8]
    """The same shape, in {0, 1}."""
    depth: npt.NDArray[np.float32]
    """(tiles,)."""


def choose(batches: Iterable[Mapping[str, npt.NDArray[Any]]]) -> Samples:
    """Choose tiles of mixed coverage: one without salt, the others spread from the least salt to the most.

    Args:
        batches: of `image`, `mask`, `z` and `coverage`.

    Returns:
        At most `COUNT` tiles; the same ones for the same batches.
    """
    parts = list(batches)
    coverage = np.concatenate([part["coverage"] for part in parts])
    places = [(part, row) for part in parts for row in range(len(part["coverage"]))]
    order = np.argsort(coverage, kind="stable")
    salt = order[coverage[order] > 0]
    spread = np.linspace(0, len(salt) - 1, min(COUNT - 1, len(salt))).round().astype(int)
    chosen = np.concatenate([np.flatnonzero(coverage == 0)[:1], salt[spread]])
    # Only the chosen tiles' pixels are copied: there may be many thousands.
    image, mask, depth = (
        np.array([places[i][0][name][places[i][1]] for i in chosen]) for name in ("image", "mask", "z")
    )
    return Samples(image.astype(np.uint8), mask.astype(np.uint8), depth.astype(np.float32))


def draw(folder: Path, samples: Samples, device: torch.device) -> None:
    """Write `samples.png` into a checkpoint's folder: what its model makes of the samples."""
    model = checkpoint.load_model(folder).to(device)
    with torch.inference_mode():
        images = to_input(torch.from_numpy(samples.image), device)
        salt = torch.sigmoid(model(images, torch.from_numpy(samples.depth).to(device)))
    prediction = salt.mul(255).round().to(torch.uint8).cpu().numpy()
    picture = montage(samples.image, samples.mask * np.uint8(255), prediction)
    Image.fromarray(picture).save(folder / PICTURE)


def montage(*rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Put tiles side by side, a row for each array: grey uint8 (n, h, w) each -> one uint8 picture."""
    tiles = np.stack(rows)
    framed = np.pad(tiles, [(0, 0), (0, 0), (_GAP, 0), (_GAP, 0)], constant_values=128)
    picture = framed.transpose(0, 2, 1, 3).reshape(len(rows) * framed.shape[2], -1)
    return np.pad(picture, [(0, _GAP), (0, _GAP)], constant_values=128)
