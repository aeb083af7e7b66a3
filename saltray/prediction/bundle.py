"""The best model's bundle: `best/`, a folder that segments tiles without the run that it comes from.

best/
  weights.safetensors, config.json, metrics.json   what `python -m saltray.predict` reads
  model.onnx                                       the same network for any ONNX runtime
  README.md                                        the model card

It is made in `best.new/` and takes the place of an earlier session's in whole.
"""

import json
import shutil
import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from ray.train import Checkpoint

from saltray.config import NEIGHBOURS, TILE, TrialConfig, UserError
from saltray.network.model import count_parameters
from saltray.prediction.inference import stored_postprocessing
from saltray.prediction.postprocessing import Postprocessing, logit
from saltray.records import run
from saltray.records.settings import Settings
from saltray.records.storage import BEST
from saltray.training import checkpoint

ONNX, CARD = "model.onnx", "README.md"


class ExportError(UserError):
    """The model cannot be written as ONNX; the bundle is whole without it."""


def stage(folder: Path, checkpoint_path: str) -> Path:
    """Copy the best checkpoint into the run's `best.new/`, without its training state.

    Args:
        folder: the run's.
        checkpoint_path: path or URI of a trial's checkpoint.

    Returns:
        `best.new/`.

    Raises:
        CheckpointError: it is damaged, or gone.
    """
    fresh = begin(folder, BEST)
    try:
        with Checkpoint(checkpoint_path).as_directory() as name:
            source = Path(name)
            weights, config = checkpoint.load_weights(source), checkpoint.load_config(source)
            snapshots = checkpoint.load_snapshots(source)
            checkpoint.save(fresh, weights, config, checkpoint.load_metrics(source), snapshots=snapshots)
    except FileNotFoundError:  # behind a URI, where nobody looks before
        raise checkpoint.CheckpointError(f"{checkpoint_path}: no such folder") from None
    return fresh


def begin(folder: Path, name: str) -> Path:
    """Make an empty `NAME.new/`; where a session was cut off inside `publish`, put the older bundle back."""
    fresh, place, old = (folder / f"{name}{end}" for end in (".new", "", ".old"))
    if old.exists() and not place.exists():
        old.rename(place)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    return fresh


def describe_tiles(training: int, coverage: pd.Series) -> dict[str, Any]:
    """Return what the model card tells of the tiles: their counts, and an all-empty prediction's score.

    Args:
        training: how many training tiles there are.
        coverage: of each validation tile, in [0, 1].
    """
    empty_score = float((coverage == 0).mean())
    return {"training": training, "validation": len(coverage), "empty_score": empty_score}


def add_metrics(bundle: Path, facts: dict[str, Any]) -> None:
    """Add facts to a bundle's metrics."""
    known = checkpoint.load_metrics(bundle)
    (bundle / checkpoint.METRICS).write_text(json.dumps(known | facts, indent=2) + "\n")


def publish(fresh: Path) -> Path:
    """Make `NAME.new/` the run's `NAME/`; an earlier one goes when the new one is in its place."""
    place, old = fresh.with_suffix(""), fresh.with_suffix(".old")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    fresh.rename(place)
    shutil.rmtree(old, ignore_errors=True)
    return place


def export_onnx(bundle: Path) -> None:
    """Write the bundle's model as `model.onnx`, in float32.

    Its input `image` is float32 (n, 1, 101, 101) in [0, 1] with any n, its output `logits` float32
    (n, 101, 101). A network that takes the depth z has the further input `depth`, float32 (n,). What was
    chosen to make masks of the logits is in the file's metadata. See
    https://docs.pytorch.org/docs/stable/onnx_export.html.

    Raises:
        ExportError: the exporter failed; no `model.onnx` is left.
    """
    model = checkpoint.load_model(bundle).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # Two tiles: the exporter takes a batch of one for a fixed size.
    example = {"image": torch.zeros(2, 1, TILE, TILE)}
    if checkpoint.load_config(bundle).model.depth:
        example["depth"] = torch.zeros(2)
    try:
        with warnings.catch_warnings():
            # The exporter's own use of PyTorch, not ours.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)", FutureWarning)
            warnings.filterwarnings("ignore", "# The axis name: tiles will not be used", UserWarning)
            program = torch.onnx.export(
                model,
                tuple(example.values()),
                input_names=list(example),
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("tiles")},) * len(example),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        chosen = asdict(stored_postprocessing(bundle))
        program.model.metadata_props.update({f"saltray.{name}": str(v) for name, v in chosen.items()})
        program.save(bundle / ONNX)
    except Exception as error:  # it runs through three packages, which raise many kinds
        (bundle / ONNX).unlink(missing_ok=True)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"{bundle / ONNX}: not written: {type(error).__name__}: {reason}") from error


_LONE = """\
| the same, on those {tiles:,} that lie beside no training tile, as far as edges tell | {map:.4f} |
"""


def origin_of(bundle: Path) -> dict[str, str]:
    """Return what a model card tells of the run that a bundle in its folder comes from."""
    known = run.read(bundle.parent)
    settings, sessions = Settings.model_validate(known["settings"]), known["sessions"]
    return {
        "name": bundle.parent.name,
        "data": Path(settings.data.rstrip("/")).name,
        "fingerprint": known["tiles"],
        "seed": settings.seed,
        "together": " and keeping neighbours together" if settings.split == "neighbours" else "",
        "neighbours": textwrap.fill(
            NEIGHBOURS[settings.split], 105, initial_indent="- ", subsequent_indent="  "
        ),
        # Of several sessions each may have trained a part of it.
        "commands": _of_sessions(f"`{session['command']}`" for session in sessions),
        "machines": _of_sessions(session["machine"] for session in sessions),
        "versions": _of_sessions(
            ", ".join([f"Python {session['python']}", *map(" ".join, session["versions"].items())])
            for session in sessions
        ),
        "commits": _of_sessions(session["commit"] or "unknown" for session in sessions),
    }


def _of_sessions(facts: Iterable[str]) -> str:
    """Write what was so in a run's sessions, in their order; what stayed the same once."""
    return "; then ".join(dict.fromkeys(facts))


def write_card(bundle: Path) -> None:
    """Write the model card, a README.md as the Hugging Face Hub reads it.

    Args:
        bundle: `best.new/` in a run's folder, with the postprocessing, its `validation_map`, `trial` and
            `tiles` (`describe_tiles`) among its metrics.
    """
    config, metrics = checkpoint.load_config(bundle), checkpoint.load_metrics(bundle)
    chosen = stored_postprocessing(bundle)
    text = _CARD.format(
        **origin_of(bundle),
        architecture=config.model.architecture,
        parameters=count_parameters(checkpoint.load_model(bundle)),
        lone=_LONE.format(**metrics["lone"]) if "lone" in metrics else "",
        chosen=chosen,
        trial=metrics["trial"],
        epoch=metrics["best_epoch"],
        plain_score=metrics["best_map"],
        score=metrics["validation_map"],
        **metrics["tiles"],
        config=json.dumps(config.to_dict(), indent=2),
    )
    if (bundle / ONNX).is_file():
        text += _ONNX_USE.format(
            threshold=chosen.threshold,
            logit=logit(chosen.threshold),
            depth=", and their depth z as float32 (n,)" if config.model.depth else "",
            program=_program(config, chosen),
        )
    (bundle / CARD).write_text(text)


def _program(config: TrialConfig, chosen: Postprocessing) -> str:
    """Write the Python lines that segment one tile with ONNX Runtime."""
    depth = ', "depth": np.array([z], np.float32)' if config.model.depth else ""
    lines = [
        "import numpy as np",
        "import onnxruntime",
        "from PIL import Image",
        "",
        *["z = 500  # the tile's depth, from depths.csv"] * config.model.depth,
        'tile = np.asarray(Image.open("tile.png").convert("L"), np.float32) / 255',
        'session = onnxruntime.InferenceSession("model.onnx")',
        "",
        "",
        "def probability(tile):",
        f'    inputs = {{"image": tile[None, None]{depth}}}',
        '    (logits,) = session.run(["logits"], inputs)',
        "    return 1 / (1 + np.exp(-logits[0]))",
        "",
        "",
    ]
    if chosen.tta:
        lines += ["mirrored = probability(tile[:, ::-1])[:, ::-1]"]
        lines += [f"salt = (probability(tile) + mirrored) / 2 > {chosen.threshold:.2f}"]
    else:
        lines += [f"salt = probability(tile) > {chosen.threshold:.2f}"]
    if chosen.min_area:
        lines += [f"salt &= salt.sum() >= {chosen.min_area}"]
    return "\n".join(lines)


METRIC = """\
The metric is that of Kaggle's TGS Salt Identification Challenge: per tile the share of the IoU thresholds
0.50, 0.55 .. 0.95 that the prediction passes, 1 where truth and prediction are both empty, 0 where only one
is; then the mean over the tiles."""

LIMITS = """\
{neighbours}
- Other surveys were not seen at all.
- Not to be used alone where a wrong salt boundary costs money or safety.
"""

ORIGIN = """\
- command: {commands}
- machine of the search: {machines}
- versions: {versions}
- saltray's commit: {commits}

## Use

With saltray, this folder alone segments a folder of tiles in the contest's layout:

    python -m saltray.predict THIS_FOLDER --data DIR --out submission.csv
"""
"""What every model card says of the metric, of its limits, and of where it comes from (`origin_of`)."""

_CARD = (
    """---
library_name: saltray
pipeline_tag: image-segmentation
tags: [seismic, salt, segmentation, pytorch, u-net]
model-index:
- name: "{name}"
  results:
  - task:
      type: image-segmentation
    dataset:
      type: tgs-salt-layout
      name: "{data}"
      split: validation
    metrics:
    - type: mean-precision-over-iou-thresholds
      name: mean precision over IoU 0.50 to 0.95, at probability 0.50
      value: {plain_score:.4f}
---

# {name}: salt in seismic tiles

A network (`{architecture}`, {parameters:,} parameters) that marks salt in 101x101 tiles of seismic images.
Found by a search with saltray: the weights of epoch {epoch} of trial {trial}, the best of the search on the
validation tiles.

## Score

"""
    + METRIC
    + """

| on the {validation:,} validation tiles | score |
|---|---|
| at probability 0.50 | {plain_score:.4f} |
| as this model is used: {chosen} | {score:.4f} |
{lone}| all tiles predicted empty, for comparison | {empty_score:.4f} |

How far to trust it:

- The epoch, the trial and what is done to the prediction were chosen on these same validation tiles, so
  both scores are a little too high for new tiles.
"""
    + LIMITS
    + """
## Data

{training:,} training and {validation:,} validation tiles of `{data}`: fold 0 of five folds stratified by salt
coverage{together}, seed {seed}. First digits of the SHA-256 of labels and split: `{fingerprint}`.

## Training

```json
{config}
```

"""
    + ORIGIN
)

_ONNX_USE = """
With [ONNX Runtime](https://onnxruntime.ai), `model.onnx` takes float32 images (n, 1, 101, 101), grey values
divided by 255{depth}, and gives logits of salt (n, 101, 101) in float32. Probability {threshold:.2f} is the
logit {logit:.4f}. One tile:

```python
{program}
```
"""
