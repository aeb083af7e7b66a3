"""Batch inference on Ray Data: choose the postprocessing on validation tiles, segment the test tiles."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import ray
import ray.data
import torch
from ray.data.expressions import col

from saltray.config import TrialConfig
from saltray.contest import rle
from saltray.data.augment import Batch
from saltray.network import cpu
from saltray.network.model import EncoderDecoder, autocast_dtype, build_model, to_input
from saltray.prediction import members, postprocessing, validation
from saltray.prediction.postprocessing import Postprocessing
from saltray.training import checkpoint

BATCH, CPU_BATCH = 128, 32
"""Tiles that an actor predicts at once, on a GPU and on a CPU, where more take memory and bring nothing."""

FEWEST = 128
"""Tiles for which one more actor is worth its start, of seconds."""


class Model(NamedTuple):
    """What an actor needs of one model."""

    config: dict[str, Any]
    """Nested dict of a TrialConfig."""
    weights: dict[str, torch.Tensor]
    share: float = 1.0
    """Its weight in the mean of all models' probabilities."""


Models = Sequence[Model] | ray.ObjectRef[list[Model]]
"""Models, or where they lie in the object store, for many actors to share."""


def fetch(models: Models) -> Sequence[Model]:
    """Return the models themselves."""
    if not isinstance(models, ray.ObjectRef):
        return models
    found: list[Model] = ray.get(models)
    return found


def load_models(folder: Path) -> list[Model]:
    """Read the models of a checkpoint or of an ensemble's folder; raises CheckpointError."""
    return [
        Model(checkpoint.load_config(m.folder).to_dict(), checkpoint.load_weights(m.folder), m.weight)
        for m in members.read(folder)
    ]


_View = tuple[torch.Tensor, torch.Tensor | None, float]
"""A model's logits, those of the mirrored tile (mirrored back) where there are any, and the model's share."""


class Predictor:
    """One actor's models: map a batch of tiles to logits; the subclasses say what becomes of them."""

    def __init__(self, models: Models, threads: int, gpu: bool = True) -> None:
        """Build the models on this actor's GPU, where it may use one and there is one, or on the CPU."""
        self.device = torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            cpu.use(threads)
        self.networks = [(*self._build(model), model.share) for model in fetch(models)]

    def _build(self, model: Model) -> tuple[EncoderDecoder, torch.dtype | None]:
        trial = TrialConfig.from_dict(model.config)
        network = build_model(trial.model)
        network.load_state_dict(model.weights)
        return network.to(self.device).eval(), autocast_dtype(trial.precision, self.device)

    def logits(self, batch: Batch, tta: bool = False) -> npt.NDArray[np.float32]:
        """Map `image`, uint8 (tiles, h, w), and the depth `z` to float32 logits (tiles, h, w).

        Several models, and the two views of test-time augmentation, are joined in the mean of their
        probabilities, not of their logits: logits have no bound, and one that is very sure would overrule the
        others.
        """
        return _joined(self._views(batch, tta))

    def logits_of_both(self, batch: Batch) -> list[npt.NDArray[np.float32]]:
        """Return `logits` without test-time augmentation and with it."""
        views = self._views(batch, tta=True)
        return [_joined([(plain, None, share) for plain, _, share in views]), _joined(views)]

    @torch.inference_mode()
    def _views(self, batch: Batch, tta: bool) -> list[_View]:
        # A copy: blocks of the object store are read-only, which torch does not know of.
        x = to_input(torch.from_numpy(batch["image"].copy()), self.device)
        depth = torch.from_numpy(batch["z"].copy()).to(self.device)
        views: list[_View] = []
        for network, amp, share in self.networks:
            with torch.autocast(self.device.type, amp or torch.bfloat16, enabled=amp is not None):
                plain = network(x, depth).float()
                mirrored = network(x.flip(3), depth).float().flip(2) if tta else None
            views.append((plain, mirrored, share))
        return views


@torch.inference_mode()
def _joined(views: list[_View]) -> npt.NDArray[np.float32]:
    """Return the logits of the mean probability of all models and views."""
    parts = []
    for plain, mirrored, share in views:
        if mirrored is None:
            parts.append((plain, share))
        else:
            parts += [(plain, share / 2), (mirrored, share / 2)]
    y = parts[0][0]
    if len(parts) > 1:
        y = torch.logit(sum((v.sigmoid() * share for v, share in parts), torch.zeros_like(y)), eps=1e-6)
    return np.asarray(y.cpu().numpy(), np.float32)


class Calibrator(Predictor):
    """Counts overlaps at every candidate threshold, so that no prediction has to travel."""

    def __call__(self, batch: Batch) -> Batch:
        """Map tiles to the arguments of `postprocessing.choose`; `id` and `z` are passed on."""
        truth = batch["mask"] > 0
        counts = [postprocessing.overlap_by_threshold(y, truth) for y in self.logits_of_both(batch)]
        return {
            "id": batch["id"],
            "z": batch["z"],
            "intersection": np.stack([c[0] for c in counts], axis=1),
            "union": np.stack([c[1] for c in counts], axis=1),
            "truth": truth.sum(axis=(1, 2)),
        }


class Segmenter(Predictor):
    """Writes each tile's mask as run-length code."""

    def __init__(self, models: Models, threads: int, chosen: Postprocessing, gpu: bool = True) -> None:
        """Keep what makes masks of logits."""
        super().__init__(models, threads, gpu)
        self.chosen = chosen
        self.cut = np.float32(postprocessing.logit(chosen.threshold))

    def masks(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Map logits to masks of the same shape (tiles, h, w)."""
        masks = logits > self.cut
        masks &= masks.sum(axis=(1, 2), keepdims=True) >= self.chosen.min_area
        return np.asarray(masks)

    def __call__(self, batch: Batch) -> Batch:
        """Map `id`, `image` and `z` to `id` and `rle`."""
        masks = self.masks(self.logits(batch, self.chosen.tta))
        return {"id": batch["id"], "rle": np.array([rle.encode(m) for m in masks], dtype=object)}


class Illustrator(Segmenter):
    """Keeps what is seen and what is predicted, for a few tiles to be looked at."""

    def __call__(self, batch: Batch) -> Batch:
        """Map tiles to the columns of `saltray.prediction.validation.Gallery`, but the group."""
        logits = self.logits(batch, self.chosen.tta)
        return {
            "id": batch["id"],
            "image": batch["image"],
            "truth": batch["mask"] > 0,
            "prediction": self.masks(logits),
            "probability": as_bytes(logits),
        }


def as_bytes(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Map logits to probabilities of one byte: 255 is 1."""
    # Beyond 50 the byte has long been 0 or 255, and far beyond `exp` would overflow.
    probability = 1 / (1 + np.exp(-logits.astype(np.float64).clip(-50, 50)))
    return np.asarray(np.rint(255 * probability), np.uint8)


class Calibration(NamedTuple):
    """What was chosen on validation tiles, and what came of it."""

    chosen: Postprocessing
    scores: dict[str, float]
    """At every candidate threshold, under the rest of the choice."""
    tiles: pd.DataFrame
    """Each tile's result under the choice, as `saltray.prediction.validation.tabulate` tells it."""


def calibrate(folder: Path, tiles: ray.data.Dataset, *, gpus: bool) -> Calibration:
    """Choose what makes masks of a checkpoint's output, on validation tiles; `gpus` as for `map_tiles`."""
    parts = _map(Calibrator, load_models(folder), tiles, {}, gpus=gpus)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    intersection, union, truth = (columns[name] for name in ("intersection", "union", "truth"))
    chosen, scores = postprocessing.choose(intersection, union, truth)
    counts = postprocessing.apply(chosen, intersection, union, truth)
    return Calibration(chosen, scores, validation.tabulate(columns["id"], truth, *counts, columns["z"]))


def illustrate(
    folder: Path,
    tiles: ray.data.Dataset,
    chosen: Postprocessing,
    examples: dict[str, list[str]],
    *,
    gpus: bool,
) -> validation.Gallery:
    """Predict the gallery's tiles once more, and keep their pictures; `examples` are ids by group."""
    group = {tile: name for name, ids in examples.items() for tile in ids}
    if not group:
        return validation.no_gallery()
    few = tiles.filter(expr=col("id").is_in(list(group))).materialize()
    parts = _map(Illustrator, load_models(folder), few, {"chosen": chosen}, gpus=gpus)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    place = {str(tile): i for i, tile in enumerate(columns["id"])}
    order = [place[tile] for tile in group]
    gallery = {name: column[order] for name, column in columns.items()}
    return gallery | {"id": np.array(list(group)), "group": np.array(list(group.values()))}


def stored_postprocessing(folder: Path) -> Postprocessing:
    """Return what was chosen for a checkpoint; of what is not stored with it, the default."""
    return Postprocessing.of(checkpoint.load_metrics(folder))


def segment(folder: Path, tiles: ray.data.Dataset, chosen: Postprocessing, *, gpus: bool) -> dict[str, str]:
    """Segment tiles with a checkpoint's model, or with an ensemble: run-length codes by id."""
    codes: dict[str, str] = {}
    for batch in _map(Segmenter, load_models(folder), tiles, {"chosen": chosen}, gpus=gpus):
        codes |= dict(zip(map(str, batch["id"]), map(str, batch["rle"]), strict=True))
    return codes


def _map(
    predictor: type[Predictor],
    models: Sequence[Model],
    tiles: ray.data.Dataset,
    more: dict[str, Any],
    *,
    gpus: bool,
) -> list[Batch]:
    """Map a predictor over the tiles; return all batches."""
    mapped = map_tiles(predictor, models, tiles, more, gpus=gpus)
    return [cast(Batch, batch) for batch in mapped.iter_batches(batch_size=None)]


def map_tiles(
    predictor: type,
    models: Sequence[Model],
    tiles: ray.data.Dataset,
    more: dict[str, Any],
    *,
    gpus: bool,
) -> ray.data.Dataset:
    """Map a predictor over the tiles on a pool of actors that fills the cluster.

    Args:
        predictor: a class of callables, batch -> batch, made with `models`, `threads`, `gpu` and `more`.
        models: all in each actor; the object store holds them once a machine.
        tiles: what to map.
        more: further arguments.
        gpus: whether the cluster's GPUs may be used, where there are any.
    """
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    count = int(resources.get("GPU", 0)) if gpus else 0
    actors = count or max(1, int(resources.get("CPU", 1)))
    # One that starts for fewer tiles takes longer to start than it saves.
    actors = max(1, min(actors, tiles.count() // FEWEST))
    return tiles.map_batches(
        predictor,
        batch_size=BATCH if count else CPU_BATCH,
        fn_constructor_kwargs={"models": ray.put(models), "threads": 1, "gpu": count > 0, **more},
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=None if count else 1,
        num_gpus=1 if count else None,
    )
