"""A run's tiles as Ray Datasets, in the search's split and in K folds: decoded once, shared by all trials."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import ray.data

from saltray.data.augment import Batch
from saltray.data.dataset import TILES_PER_BLOCK

COLUMNS = ("row", "id", "image", "z", "mask", "coverage")
"""Of a labelled tile, as `dataset.decode` gives them; the same for all that are joined."""


class Data(NamedTuple):
    """The decoded tiles, and what is known of them."""

    training: ray.data.Dataset
    validation: ray.data.Dataset
    test: ray.data.Dataset
    ids: list[str]
    """Of the submission, in its order."""
    fingerprint: str
    """A hash of the labels and the split."""
    fold: pd.Series | None = None
    """Each labelled tile's fold, by its row, where the run has folds."""


def split(labelled: ray.data.Dataset, fold: pd.Series) -> list[ray.data.Dataset]:
    """Split labelled tiles into folds: materialized datasets of `COLUMNS`.

    The tiles are copied once in the object store (80 MB for 4,000), because a block of the whole holds tiles
    of every fold.

    Args:
        labelled: materialized, of decoded tiles.
        fold: of each tile, from 0, by its row (`splitting.stratified_folds`).
    """
    parts = []
    for number in range(int(fold.max()) + 1):
        rows = fold.index[fold == number].to_numpy()
        taken = labelled.map_batches(partial(_take, rows=rows), batch_size=None, zero_copy_batch=True)
        parts.append(taken.repartition(-(-len(rows) // TILES_PER_BLOCK)).materialize())
    return parts


def join(parts: Sequence[ray.data.Dataset]) -> ray.data.Dataset:
    """Join materialized datasets of the same columns into one; their blocks stay where they are."""
    joined: ray.data.Dataset = parts[0].union(*parts[1:]).materialize() if len(parts) > 1 else parts[0]
    return joined


def others(parts: Sequence[ray.data.Dataset], fold: int) -> ray.data.Dataset:
    """Join all folds but one: what the models of that fold train on."""
    return join([part for number, part in enumerate(parts) if number != fold])


def gather(tiles: ray.data.Dataset, *names: str) -> list[npt.NDArray[Any]]:
    """Return columns of a dataset whole, each in an array of this process."""
    parts = list(tiles.select_columns([*names]).iter_batches(batch_size=None))
    return [np.concatenate([part[name] for part in parts]) for name in names]


def _take(batch: Batch, rows: npt.NDArray[np.int64]) -> Batch:
    chosen = np.isin(batch["row"], rows)
    return {name: batch[name][chosen] for name in COLUMNS}
