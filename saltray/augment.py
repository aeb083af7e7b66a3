"""Random changes of training tiles: NumPy batch -> NumPy batch, for Ray Data to map over the stream.

Each tile draws from its own counter-based random stream (Philox; Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), keyed by seed and epoch and counted by the tile's row. So a tile's change
does not depend on the batch, block, worker or machine that it meets, and the next epoch's is another.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from saltray.config import AugmentConfig

Batch = dict[str, npt.NDArray[Any]]


def generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    """Return the random stream of one tile in one epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, row]))


def augment(batch: Batch, config: AugmentConfig, seed: int, epoch: int) -> Batch:
    """Return the batch with its tiles changed at random; the input is left as it is.

    Args:
        batch: `row` int64 (tiles,), `image` and `mask` uint8 (tiles, height, width), and any other columns.
        config: the probabilities.
        seed: the trial's seed.
        epoch: counted from 1.
    """
    draws = np.array([generator(seed, epoch, int(row)).random() for row in batch["row"]])
    flipped = draws < config.flip
    return batch | {name: _flip(batch[name], flipped) for name in ("image", "mask")}


def _flip(tiles: npt.NDArray[np.uint8], which: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Mirror the chosen tiles left to right: the last axis of (tiles, height, width)."""
    return np.where(which[:, None, None], tiles[:, :, ::-1], tiles)
