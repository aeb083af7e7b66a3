"""Pseudo-labels: test tiles with the mask that models are sure of, as further tiles to train on (Lee 2013,
"Pseudo-label: the simple and efficient semi-supervised learning method for deep neural networks").

Pixels that the models are not sure of are `IGNORED`: training learns nothing from them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import ray.data

from saltray.config import IGNORED
from saltray.data.augment import Batch
from saltray.prediction import inference, postprocessing
from saltray.prediction.inference import Model, Predictor

NO_SALT, SALT = 0.05, 0.95
"""The mean probability below which a pixel is labelled as no salt, and above which as salt."""

LEAST_SURE = 0.8
"""Share of a tile's pixels that must be labelled for the tile to be used."""

FIRST_ROW = 2**32
"""Added to a test tile's row: rows seed the augmentation, and no labelled tile shares one."""


class Labeller(Predictor):
    """One actor's models, the mean of which labels tiles."""

    def __call__(self, batch: Batch) -> Batch:
        """Map tiles to those that are labelled, in the columns of `folds.COLUMNS`."""
        mask = label(self.logits(batch, tta=True))
        use = (mask != IGNORED).mean(axis=(1, 2)) >= LEAST_SURE
        return {
            "row": batch["row"][use] + FIRST_ROW,
            **{name: batch[name][use] for name in ("id", "image", "z")},
            "mask": mask[use],
            "coverage": (mask[use] == 1).mean(axis=(1, 2)).astype(np.float32),
        }


def label(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Map logits of any shape to labels of that shape: 0 no salt, 1 salt, `IGNORED` not sure."""
    sure = [logits < postprocessing.logit(NO_SALT), logits > postprocessing.logit(SALT)]
    return np.select(sure, [0, 1], IGNORED).astype(np.uint8)


def label_tiles(
    test: ray.data.Dataset, models: Sequence[Model], most: int, *, gpus: bool
) -> ray.data.Dataset:
    """Label test tiles by the mean of models; tiles that they are not sure of are left out.

    Args:
        test: decoded tiles.
        models: with their shares of the mean. For a fold's training they must not have seen the fold.
        most: tiles to return, the first that are sure.
        gpus: as for `inference.map_tiles`.

    Returns:
        A materialized dataset of `folds.COLUMNS`, of 20 kB a tile in the object store.
    """
    labelled: ray.data.Dataset = inference.map_tiles(Labeller, models, test, {}, gpus=gpus).materialize()
    return labelled.limit(most).materialize() if labelled.count() > most else labelled
