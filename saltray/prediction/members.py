"""The members of what predicts: a checkpoint is its own only one, an ensemble's folder holds several.

ensemble/
  ensemble.json     each member's folder and its weight
  metrics.json      the postprocessing that was chosen for their mean, and its scores
  members/NN/       a checkpoint each: weights.safetensors, config.json, metrics.json
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from saltray.training.checkpoint import CheckpointError

ENSEMBLE = "ensemble.json"

FORMAT = 1
"""Of `ensemble.json`; a newer one is refused."""

_FOLDER = re.compile(r"members/[\w-]+")


class Member(NamedTuple):
    """One model of what predicts."""

    folder: Path
    """A checkpoint."""
    weight: float
    """Of its probability in the mean; all together are 1."""


def write(folder: Path, weights: Mapping[str, float]) -> None:
    """Write `ensemble.json`: the weight of each member by its folder, such as `members/00`."""
    rows = [{"folder": name, "weight": weight} for name, weight in weights.items()]
    (folder / ENSEMBLE).write_text(json.dumps({"format": FORMAT, "members": rows}, indent=2) + "\n")


def read(folder: Path) -> list[Member]:
    """Return the members of an ensemble's folder; a checkpoint's is that checkpoint, with weight 1.

    Raises:
        CheckpointError: `ensemble.json` is damaged, of a newer version, or names what is not below it.
    """
    file = folder / ENSEMBLE
    if not file.is_file():
        return [Member(folder, 1.0)]
    try:
        content = json.loads(file.read_text())
        version, rows = content["format"], content["members"]
        found = [Member(folder / row["folder"], float(row["weight"])) for row in rows]
        below = all(_FOLDER.fullmatch(row["folder"]) for row in rows)
        weights = [member.weight for member in found]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged: {error}") from None
    if version > FORMAT:
        raise CheckpointError(f"{file}: written by a newer saltray (format {version}); update saltray")
    if not below:
        raise CheckpointError(f"{file}: damaged: a member that is not in members/")
    if not all(weight > 0 for weight in weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise CheckpointError(f"{file}: damaged: the weights must be positive, and 1 together")
    return found
