"""A run's folder made by hand: what a search leaves behind, without a search."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from saltray.config import DEBUG, Objective
from saltray.contest import metrics
from saltray.network.model import build_model
from saltray.prediction import postprocessing, validation
from saltray.records.study import Place, create_study
from saltray.training import checkpoint

START = datetime(2026, 11, 22, 8, tzinfo=UTC)
DOMAINS = {
    "architecture": CategoricalDistribution(["unet", "resunet"]),
    "blocks": IntDistribution(1, 4),
    "rate": FloatDistribution(1e-5, 1e-1, log=True),
}

HARDWARE = {"device": "a CPU", "workers": 1, "cpus": 1.0, "gpus": 0.0}


def make_trial(
    state: TrialState,
    scores: Sequence[float],
    *,
    rate: float = 1e-3,
    blocks: int | None = None,
    start: datetime = START,
    host: str = "node-a",
    values: Sequence[float] | None = None,
    **attributes: Any,
) -> FrozenTrial:
    """Make a trial of its state, its mAP by epoch, and whatever else differs."""
    parameters = {"architecture": "unet" if blocks is None else "resunet", "rate": rate}
    parameters |= {} if blocks is None else {"blocks": blocks}
    epochs = []
    for i, value in enumerate(scores, start=1):
        ended = (start + timedelta(seconds=30 * i)).isoformat()
        row = {"epoch": i, "loss": 1 / i, "map": value, "learning_rate": rate, "seconds": 30.0}
        row |= {"tiles_per_second": 100.0, "workers": 1, "gpus": attributes.get("hardware", HARDWARE)["gpus"]}
        epochs.append(row | {"host": host, "ended": ended})
    if values is None and state == TrialState.COMPLETE:
        values = [max(scores)]
    return create_trial(
        state=state,
        values=values,
        params=parameters,
        distributions={name: DOMAINS[name] for name in parameters},
        intermediate_values={i: max(scores[:i]) for i in range(1, len(scores) + 1)},
        user_attrs={"epochs": epochs, "host": host, "hardware": HARDWARE, "parameters": 4321} | attributes,
    )


def make_run(
    parent: Path, trials: Sequence[FrozenTrial], *, predicted: bool = False, objective: Objective = "map"
) -> Path:
    """Make a run's folder of some trials; `predicted` with what the end of a search writes."""
    folder = parent / "run"
    folder.mkdir()
    settings: dict[str, Any] = {"data": "s3://user:secret@bucket/tgs", "space": "space.py"}
    settings |= {"trials": 9, "epochs": 5, "seed": 7}
    session = {
        "started": "2026-11-22T08:00:00+00:00",
        "command": "python -m saltray.tune --study pg://u:pw@db",
        "python": "3.11.7",
        "versions": {"ray": "2.60.0"},
        "machine": "Linux",
        "commit": "abc123",
    }
    content = {"format": 1, "tiles": "0", "settings": settings, "sessions": [session]}
    (folder / "run.json").write_text(json.dumps(content))
    study = create_study(Place(folder), objective)
    study.add_trials(trials)
    if predicted:
        _predict(folder)
    return folder


def _predict(folder: Path) -> None:
    """Write what the search's end would, of a model that is often right."""
    rng = np.random.default_rng(0)
    salt = np.linspace(0, 1, 60)
    salt[:20] = 0
    truth = np.arange(101)[None, :, None] < np.round(101 * salt)[:, None, None]
    truth = np.broadcast_to(truth, (60, 101, 101))
    probability = np.clip(0.6 * truth + 0.25 + rng.normal(0, 0.12, (60, 1, 1)), 0, 1) * np.ones((1, 101, 101))
    chosen = probability > 0.5
    intersection, union = metrics.overlap(chosen, truth)
    ids = [f"tile{i:02d}" for i in range(60)]
    table = validation.tabulate(ids, truth.sum(axis=(1, 2)), intersection, union, rng.integers(50, 960, 60))
    examples = validation.choose_examples(table, 4)
    group = {tile: name for name, tiles in examples.items() for tile in tiles}
    rows = [ids.index(tile) for tile in group]
    gallery: validation.Gallery = {
        "group": np.array(list(group.values())),
        "id": np.array(list(group)),
        "image": rng.integers(0, 255, (len(rows), 101, 101), dtype=np.uint8),
        "truth": truth[rows],
        "prediction": chosen[rows],
        "probability": np.rint(255 * probability[rows]).astype(np.uint8),
    }
    validation.write(folder, table, gallery)
    (folder / "best").mkdir()
    scores = {f"{p:.2f}": 0.7 - abs(p - 0.5) for p in postprocessing.PROBABILITIES}
    facts = {"trial": 0, "threshold": 0.5, "validation_map": 0.7, "scores": scores, "best_map": 0.7}
    checkpoint.save(folder / "best", build_model(DEBUG.model).state_dict(), DEBUG, facts)
