"""Batch inference on Ray Data: calibrate a threshold on validation tiles, segment the test tiles."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import torch

from saltray import checkpoint, metrics, rle
from saltray.augment import Batch
from saltray.config import TrialConfig
from saltray.model import build_model
from saltray.training import autocast_dtype, to_input

BATCH = 128


class Predictor:
    """One actor's model: maps a batch of tiles to logits; the subclasses say what becomes of them."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor], threads: int) -> None:
        """Build the model on this actor's GPU, or on the CPU."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        trial = TrialConfig.from_dict(config)
        self.amp = autocast_dtype(trial.precision, self.device)
        model = build_model(trial.model)
        model.load_state_dict(weights)
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def logits(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Map uint8 images (tiles, h, w) to float32 logits of the same shape."""
        # A copy: blocks of the object store are read-only, which torch does not know of.
        x = to_input(torch.from_numpy(images.copy()), self.device)
        with torch.autocast(self.device.type, self.amp or torch.bfloat16, enabled=self.amp is not None):
            y = self.model(x)
        return np.asarray(y.float().cpu().numpy(), np.float32)


class Calibrator(Predictor):
    """Counts overlaps at every candidate threshold, so that no prediction has to travel."""

    def __call__(self, batch: Batch) -> Batch:
        """Map `image` and `mask` to `intersection` and `union`, int64 (tiles, thresholds)."""
        counts = metrics.overlap_by_threshold(self.logits(batch["image"]), batch["mask"] > 0)
        return {"intersection": counts[0], "union": counts[1]}


class Segmenter(Predictor):
    """Writes each tile's mask as run-length code."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, torch.Tensor], threads: int, threshold: float
    ) -> None:
        """Keep the threshold on the probability."""
        super().__init__(config, weights, threads)
        self.cut = np.float32(metrics.logit(threshold))

    def __call__(self, batch: Batch) -> Batch:
        """Map `id` and `image` to `id` and `rle`."""
        masks = self.logits(batch["image"]) > self.cut
        return {"id": batch["id"], "rle": np.array([rle.encode(m) for m in masks], dtype=object)}


def calibrate(folder: Path, tiles: ray.data.Dataset) -> tuple[float, dict[str, float]]:
    """Choose the threshold of a checkpoint's model on validation tiles.

    Returns:
        The threshold on the probability, and the score at every candidate.
    """
    counts = _map(Calibrator, folder, tiles, {})
    return metrics.choose_threshold(
        np.concatenate([c["intersection"] for c in counts]), np.concatenate([c["union"] for c in counts])
    )


def segment(folder: Path, tiles: ray.data.Dataset, threshold: float) -> dict[str, str]:
    """Segment tiles with a checkpoint's model: run-length codes by id."""
    codes: dict[str, str] = {}
    for batch in _map(Segmenter, folder, tiles, {"threshold": threshold}):
        codes |= dict(zip(map(str, batch["id"]), map(str, batch["rle"]), strict=True))
    return codes


def _map(
    predictor: type[Predictor], folder: Path, tiles: ray.data.Dataset, more: dict[str, Any]
) -> list[Batch]:
    """Map a predictor over the tiles on a pool of actors that fills the cluster; return all batches."""
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = int(resources.get("GPU", 0))
    actors = gpus or max(1, int(resources.get("CPU", 1)))
    # No more actors than they have batches to do.
    actors = max(1, min(actors, tiles.count() // BATCH))
    model = {"config": checkpoint.load_config(folder).to_dict(), "weights": checkpoint.load_weights(folder)}
    mapped = tiles.map_batches(
        predictor,
        batch_size=BATCH,
        fn_constructor_kwargs={**model, "threads": 1, **more},
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=None if gpus else 1,
        num_gpus=1 if gpus else None,
    )
    return [cast(Batch, batch) for batch in mapped.iter_batches(batch_size=None)]
