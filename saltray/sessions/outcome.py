"""What a search comes to: the best model with its postprocessing, in `best/`, and its submission."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
import ray.data
from optuna.trial import FrozenTrial

from saltray.contest import submission
from saltray.data import folds, neighbours
from saltray.data.folds import Data
from saltray.prediction import bundle, inference, validation
from saltray.records.storage import BEST
from saltray.records.study import best_trial, best_trials, checkpoints_of, lost_trial, own_trials, score
from saltray.training import checkpoint

EXAMPLES = 6
"""Tiles of each group in the report's gallery."""


def publish_best(
    folder: Path, study: optuna.Study, data: Data, *, submit: bool, gpus: bool
) -> tuple[FrozenTrial, dict[str, Any]]:
    """Choose the best model's postprocessing, and write its bundle and its submission.

    Where the best trial's checkpoint is gone, its bundle of an earlier session stays, and the submission; and
    where that never was, the best of the others is taken. Either is told.

    Args:
        folder: the run's.
        study: the search's.
        data: the run's tiles.
        submit: whether to write `submission.csv`.
        gpus: whether to predict on GPUs, where there are any.

    Returns:
        The trial, and what is known of its model: the postprocessing, `validation_map` with it, `scores` by
        threshold, `lone` (see `lone_score`), and `lost` or `onnx_problem` in words.

    Raises:
        StudyError: no trial has a checkpoint.
        CheckpointError: none of them can be read.
    """
    lost, words = lost_trial(study), {}
    if lost is not None:
        gone = f"trial {lost.number} scored {score(lost):.4f}, but {lost.user_attrs['checkpoint']} is gone"
        if (known := _published(folder, lost)) is not None:
            return lost, known | {"lost": f"{gone}: its model stays in best/ as it is"}
        words["lost"] = f"{gone}: the best of the others is taken"
    best, model = _stage(folder, study)
    if "lost" not in words and (behind := _behind(study, best, model)):
        words["lost"] = behind
    chosen, scores, table = inference.calibrate(model, data.validation, gpus=gpus)
    gallery = inference.illustrate(
        model, data.validation, chosen, validation.choose_examples(table, EXAMPLES), gpus=gpus
    )
    facts = asdict(chosen) | {"validation_map": scores[f"{chosen.threshold:.2f}"], "scores": scores}
    by_tile = table.set_index("id")["precision"].loc[folds.gather(data.validation, "id")[0]]
    facts |= lone_score([data.validation, data.training], by_tile.to_numpy())
    tiles = bundle.describe_tiles(data.training.count(), table["coverage"])
    bundle.add_metrics(model, {"trial": best.number, "tiles": tiles} | facts)
    validation.write(folder, table, gallery)
    if submit:
        codes = inference.segment(model, data.test, chosen, gpus=gpus)
        submission.write(folder / "submission.csv", data.ids, codes)
    try:
        bundle.export_onnx(model)
    except bundle.ExportError as error:
        words["onnx_problem"] = str(error)
    bundle.write_card(model)
    bundle.publish(model)
    return best, facts | words


def lone_score(parts: Sequence[ray.data.Dataset], scores: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Score the tiles that have no neighbour in another part, whose scores nothing flatters.

    Args:
        parts: tiles; none of a part was seen by the models that it is judged by, all others may have been.
        scores: of the first of these tiles, in their order, float64 (tiles that are judged,).

    Returns:
        `lone`, their number `tiles` and their mean score `map`; nothing where all or none are so, or where
        there are more than `neighbours.MOST_COMPARED` tiles.
    """
    counts = [part.count() for part in parts]
    if sum(counts) > neighbours.MOST_COMPARED:
        return {}
    images = np.concatenate([folds.gather(part, "image")[0] for part in parts])
    beside = neighbours.beside_others(images, np.repeat(np.arange(len(parts)), counts))[: len(scores)]
    alone = scores[~beside]
    return {"lone": {"tiles": len(alone), "map": float(alone.mean())}} if 0 < len(alone) < len(scores) else {}


def _stage(folder: Path, study: optuna.Study) -> tuple[FrozenTrial, Path]:
    """Begin the bundle of the best checkpoint that can be read: a power loss may have left half of one."""
    damaged: list[checkpoint.CheckpointError] = []
    for trial in best_trials(study, len(own_trials(study))):
        for place in checkpoints_of(study, trial):
            try:
                return trial, bundle.stage(folder, place)
            except checkpoint.CheckpointError as error:
                damaged.append(error)
    raise damaged[0]


def _behind(study: optuna.Study, taken: FrozenTrial, model: Path) -> str:
    """Say where the weights that are taken are not those of the best score: these may be lost, or half."""
    top, kept = best_trial(study), checkpoint.load_metrics(model).get("best_map", score(taken))
    if kept >= score(top):
        return ""
    return (
        f"trial {top.number} scored {score(top):.4f}, but no checkpoint of that can be read: trial "
        f"{taken.number}'s of {kept:.4f} is taken"
    )


def _published(folder: Path, trial: FrozenTrial) -> dict[str, Any] | None:
    """Return the metrics of a trial's model in `best/`; None where that is not its model, as it is now."""
    try:
        known = checkpoint.load_metrics(folder / BEST)
    except checkpoint.CheckpointError:
        return None
    return known if (known.get("trial"), known.get("best_map")) == (trial.number, score(trial)) else None
