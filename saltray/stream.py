"""An epoch's stream of tiles: shuffled and augmented by Ray Data, taken in batches by torch."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import ray.data
import torch

from saltray.augment import Batch, augment
from saltray.config import AugmentConfig

COLUMNS = ("image", "mask", "z")
"""What training needs of a tile."""

SHUFFLE_BUFFER = 2000
"""Tiles in the local shuffle buffer, on top of the shuffled order of the blocks."""


def epoch_stream(
    tiles: ray.data.Dataset,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    cpus_per_task: float,
) -> Iterator[dict[str, torch.Tensor]]:
    """Stream one epoch of training tiles: newly shuffled and augmented, the same for the same seed.

    Yields batches of torch tensors, `image` and `mask` uint8 (batch, 101, 101), and the depth `z` float32
    (batch,); the last may be smaller.
    """
    order = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    stream = tiles.randomize_block_order(seed=order).map_batches(
        partial(_augment_tiles, config=config, seed=seed, epoch=epoch),
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=cpus_per_task,
    )
    batches = stream.iter_torch_batches(
        batch_size=batch_size,
        collate_fn=_collate,
        local_shuffle_buffer_size=SHUFFLE_BUFFER,
        local_shuffle_seed=order,
        prefetch_batches=2,
    )
    return iter(batches)


def plain_stream(tiles: ray.data.Dataset, *, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Stream tiles as they are, each once, in their order: for validation."""
    batches = tiles.iter_torch_batches(batch_size=batch_size, collate_fn=_collate, prefetch_batches=2)
    return iter(batches)


# Columns are chosen in these two functions: `Dataset.select_columns` would be a task of its own, and ask for
# a whole CPU that the trials do not leave.


def _augment_tiles(batch: Batch, config: AugmentConfig, seed: int, epoch: int) -> Batch:
    """Augment, and keep only what training needs."""
    changed = augment({name: batch[name] for name in ("row", *COLUMNS)}, config, seed, epoch)
    return {name: changed[name] for name in COLUMNS}


def _collate(batch: Batch) -> dict[str, torch.Tensor]:
    """Make tensors of what training needs; a copy, because blocks of the object store are read-only."""
    return {name: torch.from_numpy(batch[name].copy()) for name in COLUMNS}
