"""What models predict for labelled tiles that they never saw, on a pool of Ray Data actors."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import ray.data
from ray.train import Checkpoint

from saltray.data.augment import Batch
from saltray.data.splitting import stratified_folds
from saltray.ensembles.ensemble import OutOfFold
from saltray.prediction import inference
from saltray.prediction.inference import Model, Models, Predictor
from saltray.training import checkpoint

PARTS = 5
"""In how many parts the tiles are cross-fitted where the models have no folds of their own."""


class Source(NamedTuple):
    """Where a model's weights lie."""

    path: str
    """Path or URI of a checkpoint."""
    snapshot: int | None = None
    """Which of its snapshots, counted from 0; None for its kept weights."""


class Candidate(NamedTuple):
    """What an ensemble may take: a configuration."""

    trial: int
    """Number of the search's trial that it comes from."""
    name: str
    sources: tuple[Source, ...]
    """A model for each fold, which never saw the fold; one alone where there are no folds."""


def load(source: Source, share: float = 1.0) -> Model:
    """Read a model; raises CheckpointError."""
    with Checkpoint(source.path).as_directory() as name:
        folder = Path(name)
        if source.snapshot is None:
            weights = checkpoint.load_weights(folder)
        else:
            weights = checkpoint.load_snapshots(folder)[source.snapshot]
        return Model(checkpoint.load_config(folder).to_dict(), weights, share)


def readable(places: Iterable[str]) -> str | None:
    """Return the first checkpoint whose model can be read: a machine that died may have left half of one."""
    for place in places:
        try:
            load(Source(place))
        except (checkpoint.CheckpointError, OSError) as error:
            print(f"left out: {place}: {error}", file=sys.stderr)
        else:
            return place
    return None


def count_snapshots(path: str) -> int:
    """Return how many snapshots a checkpoint holds."""
    with Checkpoint(path).as_directory() as folder:
        return len(checkpoint.load_snapshots(Path(folder)))


class Prober:
    """One actor's models, each by itself."""

    def __init__(self, models: Models, threads: int, gpu: bool = True) -> None:
        """Build the models."""
        self.predictors = [Predictor([model], threads, gpu) for model in inference.fetch(models)]

    def __call__(self, batch: Batch) -> Batch:
        """Map labelled tiles to `probability`, uint8 (tiles, models, 2, h, w) without and with the mirrored
        tile, `truth`, bool (tiles, h, w), and `coverage`.
        """
        views = [[inference.as_bytes(y) for y in p.logits_of_both(batch)] for p in self.predictors]
        probability = np.array(views).transpose(2, 0, 1, 3, 4)
        return {"probability": probability, "truth": batch["mask"] > 0, "coverage": batch["coverage"]}


def predict(
    parts: Sequence[ray.data.Dataset], candidates: Sequence[Candidate], seed: int, *, gpus: bool
) -> OutOfFold:
    """Let every candidate predict every part, by its model that never saw it.

    Args:
        parts: the labelled tiles by fold; one part alone is cross-fitted in `PARTS` of like coverage.
        candidates: with a source for each part.
        seed: of the cut of one part.
        gpus: as for `inference.map_tiles`.
    """
    counts = [part.count() for part in parts]
    tiles = sum(counts)
    probability = truth = None
    coverage = np.zeros(tiles, np.float32)
    done = 0
    for fold, part in enumerate(parts):
        models = [load(candidate.sources[fold]) for candidate in candidates]
        for batch in inference.map_tiles(Prober, models, part, {}, gpus=gpus).iter_batches(batch_size=None):
            given = cast(Batch, batch)
            if probability is None or truth is None:
                shape = given["truth"].shape[1:]
                probability = np.zeros((len(candidates), 2, tiles, *shape), np.uint8)
                truth = np.zeros((tiles, *shape), bool)
            here = slice(done, done + len(given["truth"]))
            probability[:, :, here] = given["probability"].transpose(1, 2, 0, 3, 4)
            truth[here], coverage[here] = given["truth"], given["coverage"]
            done = here.stop
    assert probability is not None and truth is not None
    return OutOfFold(probability, truth, _folds(counts, coverage, seed))


def _folds(counts: Sequence[int], coverage: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.int64]:
    if len(counts) > 1:
        return np.repeat(np.arange(len(counts)), counts)
    return stratified_folds(coverage, min(PARTS, len(coverage)), seed)
