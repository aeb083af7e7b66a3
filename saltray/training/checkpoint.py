"""A checkpoint: one folder that alone rebuilds its model.

`weights.safetensors` holds the weights that are kept, the best so far or the last (`TrialConfig.keep`);
`config.json` the trial's configuration, `metrics.json` the scores; `training.pt`, present while the trial is
unfinished, the rest of what training goes on from; `snapshot-1.safetensors` .. the weights at the end of each
cycle of the learning rate, where asked for.
Nothing in it is run when it is read: safetensors and JSON hold no code, and the training state is loaded
with `weights_only=True`.
"""

import json
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from saltray.config import TrialConfig, UserError
from saltray.network.model import EncoderDecoder, build_model

WEIGHTS, CONFIG, METRICS, TRAINING = "weights.safetensors", "config.json", "metrics.json", "training.pt"
SNAPSHOT = "snapshot-{}.safetensors"


class CheckpointError(UserError):
    """The folder is no complete checkpoint; the message names the file."""


def save(
    folder: Path,
    weights: dict[str, Tensor],
    config: TrialConfig,
    metrics: dict[str, Any],
    training: dict[str, Any] | None = None,
    snapshots: Sequence[dict[str, Tensor]] = (),
) -> None:
    """Write a checkpoint into an existing folder.

    Args:
        folder: where to write; files of the same names are replaced.
        weights: the model's state dict.
        config: the trial's configuration.
        metrics: plain values.
        training: the loop's state, of tensors and plain values; None when the trial is finished.
        snapshots: further state dicts, oldest first.
    """
    _write_weights(folder / WEIGHTS, weights)
    for number, snapshot in enumerate(snapshots, start=1):
        _write_weights(folder / SNAPSHOT.format(number), snapshot)
    (folder / CONFIG).write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    (folder / METRICS).write_text(json.dumps(metrics, indent=2) + "\n")
    if training is not None:
        torch.save(training, folder / TRAINING)
    else:
        (folder / TRAINING).unlink(missing_ok=True)


def load_config(folder: Path) -> TrialConfig:
    """Read the trial's configuration; raises CheckpointError."""
    try:
        return TrialConfig.from_dict(_read_json(folder / CONFIG))
    except CheckpointError:
        raise
    except UserError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None


def load_metrics(folder: Path) -> dict[str, Any]:
    """Read the scores; raises CheckpointError."""
    return _read_json(folder / METRICS)


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights that are kept; raises CheckpointError."""
    return _read_weights(folder / WEIGHTS)


def load_snapshots(folder: Path) -> list[dict[str, Tensor]]:
    """Read the snapshots, oldest first; an empty list where there are none. Raises CheckpointError."""
    files = (folder / SNAPSHOT.format(number) for number in count(1))
    return [_read_weights(file) for file in takewhile(Path.is_file, files)]


def load_training(folder: Path) -> dict[str, Any]:
    """Read the state from which training goes on; raises CheckpointError."""
    _expect(folder / TRAINING)
    try:
        return dict(torch.load(folder / TRAINING, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(f"{folder / TRAINING}: damaged: {error}") from None


def check(folder: Path) -> None:
    """Raise a CheckpointError unless a whole checkpoint can be read: its writer may have been killed."""
    load_config(folder)
    metrics = load_metrics(folder)
    load_weights(folder)
    # Without the state a trial counts as finished.
    if (folder / TRAINING).exists() or not metrics.get("finished", True):
        load_training(folder)
    if len(load_snapshots(folder)) < metrics.get("snapshots", 0):
        raise CheckpointError(f"{folder}: lacks a snapshot; not a complete checkpoint")


def load_model(folder: Path) -> EncoderDecoder:
    """Rebuild the model with the kept weights, in evaluation mode, on the CPU; raises CheckpointError."""
    model, weights = build_model(load_config(folder).model), load_weights(folder)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {error}") from None
    return model.eval()


def _write_weights(file: Path, weights: dict[str, Tensor]) -> None:
    # A copy in the plain memory layout: safetensors stores no strides.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    # Not save_file: it would make the file unreadable for all but its owner.
    file.write_bytes(safetensors.torch.save(plain))


def _read_weights(file: Path) -> dict[str, Tensor]:
    _expect(file)
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: damaged: {error}") from None


def _expect(file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; not a complete checkpoint")


def _read_json(file: Path) -> dict[str, Any]:
    _expect(file)
    try:
        content = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: damaged: expected a JSON object")
    return content
