"""The best model's bundle: `best/`, a folder that segments tiles without the run that it comes from.

best/
  weights.safetensors, config.json, metrics.json   what `python -m saltray.predict` reads
  model.onnx                                       the same network for any ONNX runtime
  README.md                                        the model card

It is made in `best.new/` and takes the place of an earlier session's in whole.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch
from ray.train import Checkpoint

from saltray import checkpoint, run
from saltray.config import TILE, UserError
from saltray.metrics import logit
from saltray.model import count_parameters

ONNX, CARD = "model.onnx", "README.md"
INPUT, OUTPUT = "image", "logits"
"""The ONNX model's input and output."""


class ExportError(UserError):
    """The model cannot be written as ONNX; the bundle is whole without it."""


def stage(folder: Path, checkpoint_path: str) -> Path:
    """Copy the best checkpoint into the run's `best.new/`, without its training state.

    Args:
        folder: the run's.
        checkpoint_path: path or URI of a trial's checkpoint.

    Returns:
        `best.new/`.
    """
    fresh, best, old = (folder / name for name in ("best.new", "best", "best.old"))
    if old.exists() and not best.exists():
        old.rename(best)  # an earlier session was cut off inside `publish`
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    with Checkpoint(checkpoint_path).as_directory() as name:
        source = Path(name)
        weights, config = checkpoint.load_weights(source), checkpoint.load_config(source)
        snapshots = checkpoint.load_snapshots(source)
        checkpoint.save(fresh, weights, config, checkpoint.load_metrics(source), snapshots=snapshots)
    return fresh


def describe_tiles(training: ray.data.Dataset, validation: ray.data.Dataset) -> dict[str, Any]:
    """Return what the model card tells of the tiles: their counts, and an all-empty prediction's score."""
    coverage = np.concatenate([b["coverage"] for b in validation.iter_batches(batch_size=None)])
    empty_score = float((coverage == 0).mean())
    return {"training": training.count(), "validation": len(coverage), "empty_score": empty_score}


def add_metrics(bundle: Path, facts: dict[str, Any]) -> None:
    """Add facts to a bundle's metrics."""
    known = checkpoint.load_metrics(bundle)
    (bundle / checkpoint.METRICS).write_text(json.dumps(known | facts, indent=2) + "\n")


def publish(fresh: Path) -> Path:
    """Make `best.new/` the run's `best/`; an earlier one goes when the new one is in its place."""
    best, old = fresh.with_name("best"), fresh.with_name("best.old")
    if best.exists():
        shutil.rmtree(old, ignore_errors=True)
        best.rename(old)
    fresh.rename(best)
    shutil.rmtree(old, ignore_errors=True)
    return best


def export_onnx(bundle: Path) -> None:
    """Write the bundle's model as `model.onnx`, in float32.

    Its input `image` is float32 (n, 1, 101, 101) in [0, 1] with any n, its output `logits` float32
    (n, 101, 101). The threshold, where the metrics have one, is in the file's metadata. See
    https://docs.pytorch.org/docs/stable/onnx_export.html.

    Raises:
        ExportError: the exporter failed; no `model.onnx` is left.
    """
    model = checkpoint.load_model(bundle).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # Two tiles: the exporter takes a batch of one for a fixed size.
    example = torch.zeros(2, 1, TILE, TILE)
    try:
        with warnings.catch_warnings():
            # The exporter's own use of PyTorch, not ours.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)", FutureWarning)
            program = torch.onnx.export(
                model,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("tiles")},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        threshold = checkpoint.load_metrics(bundle).get("threshold")
        if threshold is not None:
            program.model.metadata_props["saltray.threshold"] = f"{threshold:.2f}"
        program.save(bundle / ONNX)
    except Exception as error:  # it runs through three packages, which raise many kinds
        (bundle / ONNX).unlink(missing_ok=True)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ExportError(f"{bundle / ONNX}: not written: {type(error).__name__}: {reason}") from error


def write_card(bundle: Path) -> None:
    """Write the model card, a README.md as the Hugging Face Hub reads it.

    Args:
        bundle: `best.new/` in a run's folder, with `threshold`, `scores`, `trial` and `tiles`
            (`describe_tiles`) among its metrics.
    """
    config, metrics = checkpoint.load_config(bundle), checkpoint.load_metrics(bundle)
    known = run.read(bundle.parent)
    threshold, settings, session = metrics["threshold"], known["settings"], known["sessions"][-1]
    facts = {
        "name": bundle.parent.name,
        "architecture": config.model.architecture,
        "parameters": f"{count_parameters(checkpoint.load_model(bundle)):,}",
        "data": Path(settings["data"].rstrip("/")).name,
        "fingerprint": known["tiles"],
        "training": f"{metrics['tiles']['training']:,}",
        "validation": f"{metrics['tiles']['validation']:,}",
        "seed": settings["seed"],
        "threshold": f"{threshold:.2f}",
        "logit": f"{logit(threshold):.6f}",
        "plain_score": f"{metrics['scores']['0.50']:.4f}",
        "score": f"{metrics['scores'][f'{threshold:.2f}']:.4f}",
        "empty_score": f"{metrics['tiles']['empty_score']:.4f}",
        "trial": metrics["trial"],
        "epoch": metrics["best_epoch"],
        "config": json.dumps(config.to_dict(), indent=2),
        "command": session["command"],
        "machine": session["machine"],
        "versions": ", ".join([f"Python {session['python']}", *map(" ".join, session["versions"].items())]),
        "commit": session["commit"] or "unknown",
    }
    text = _CARD.format_map(facts)
    if (bundle / ONNX).is_file():
        text += _ONNX_USE.format_map(facts)
    (bundle / CARD).write_text(text)


_CARD = """---
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
      value: {plain_score}
---

# {name}: salt in seismic tiles

A network (`{architecture}`, {parameters} parameters) that marks salt in 101x101 tiles of seismic images.
Found by a search with saltray: the weights of epoch {epoch} of trial {trial}, the best of the search on the
validation tiles.

## Score

The metric is that of Kaggle's TGS Salt Identification Challenge: per tile the share of the IoU thresholds
0.50, 0.55 .. 0.95 that the prediction passes, 1 where truth and prediction are both empty, 0 where only one
is; then the mean over the tiles.

| on the {validation} validation tiles | score |
|---|---|
| at probability 0.50 | {plain_score} |
| at probability {threshold}, the threshold of this model | {score} |
| all tiles predicted empty, for comparison | {empty_score} |

How far to trust it:

- The threshold, the epoch and the trial were chosen on these same validation tiles, so both scores are a
  little too high for new tiles.
- The contest's own tiles were cut from shared mosaics. Neighbours of a validation tile may be among the
  training tiles, which flatters as well; other surveys were not seen at all.
- Not to be used alone where a wrong salt boundary costs money or safety.

## Data

{training} training and {validation} validation tiles of `{data}`: fold 0 of five folds stratified by salt
coverage, seed {seed}. First digits of the SHA-256 of labels and split: `{fingerprint}`.

## Training

```json
{config}
```

- command: `{command}`
- machine of the search: {machine}
- versions: {versions}
- saltray's commit: {commit}

## Use

With saltray, this folder alone segments a folder of tiles in the contest's layout:

    python -m saltray.predict THIS_FOLDER --data DIR --out submission.csv
"""

_ONNX_USE = """
With [ONNX Runtime](https://onnxruntime.ai), `model.onnx` takes float32 images (n, 1, 101, 101), grey values
divided by 255, and gives logits (n, 101, 101), which are compared with the logit of the threshold
{threshold}:

```python
import numpy as np
import onnxruntime
from PIL import Image

tile = np.asarray(Image.open("tile.png").convert("L"), np.float32) / 255
session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {{"image": tile[None, None]}})
salt = logits[0] > {logit}
```
"""
