"""The ensemble's bundle: `ensemble/`, made as `best/` (`saltray.prediction.bundle`); `members` reads it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saltray.config import TrialConfig
from saltray.prediction import members
from saltray.prediction.bundle import CARD, LIMITS, METRIC, ORIGIN, begin, origin_of
from saltray.prediction.inference import Model, stored_postprocessing
from saltray.prediction.postprocessing import Postprocessing
from saltray.records.storage import ENSEMBLE
from saltray.training import checkpoint


def stage(
    folder: Path, models: Sequence[tuple[Model, int]], chosen: Postprocessing, facts: dict[str, Any]
) -> Path:
    """Write the members of an ensemble, and what is known of it, into the run's `ensemble.new/`.

    Args:
        folder: the run's.
        models: the members with their shares, and the number of the trial that each comes from.
        chosen: what makes masks of their mean.
        facts: its scores, for `metrics.json`.

    Returns:
        `ensemble.new/`.
    """
    fresh = begin(folder, ENSEMBLE)
    weights = {}
    for number, (model, trial) in enumerate(models):
        name = f"members/{number:02d}"
        (fresh / name).mkdir(parents=True)
        config = TrialConfig.from_dict(model.config)
        checkpoint.save(fresh / name, model.weights, config, {"trial": trial})
        weights[name] = model.share
    members.write(fresh, weights)
    (fresh / checkpoint.METRICS).write_text(json.dumps(asdict(chosen) | facts, indent=2) + "\n")
    return fresh


def write_card(bundle: Path) -> None:
    """Write the model card of an ensemble.

    Args:
        bundle: `ensemble.new/` in a run's folder, as `stage` leaves it.
    """
    facts, chosen = checkpoint.load_metrics(bundle), stored_postprocessing(bundle)
    rows = [
        f"| {c['name']} | {c['weight']:.3f} | {sum(c['by_fold']) / len(c['by_fold']):.4f} |"
        for c in facts["candidates"]
        if c["weight"]
    ]
    text = _CARD.format(
        **origin_of(bundle),
        models=facts["models"],
        rows="\n".join(rows),
        judged=_OUT_OF_FOLD.format(folds=facts["folds"]) if facts["folds"] else _ON_VALIDATION,
        in_sample=facts["in_sample"],
        cross_fitted=facts["cross_fitted"],
        spread=facts["spread"],
        lone=_LONE.format(**facts["lone"]) if "lone" in facts else "",
        chosen=chosen,
        pseudo=_PSEUDO if facts.get("pseudo_labels", {}).get("used") else "",
    )
    (bundle / CARD).write_text(text)


_OUT_OF_FOLD = """Each configuration was trained {folds} times, every time without one of {folds} folds of the
labelled tiles, and each tile is judged by the models that never saw it. What the mean over a configuration's
{folds} models is worth beyond one of them, no labelled tile can tell: each has been seen by all but one."""

_ON_VALIDATION = """The models are those that the search kept, judged on its validation tiles. Their epochs
were chosen on these tiles as well, so that even the cross-fitted score is too high."""

_LONE = """\
| likewise, on those {tiles:,} that lie beside no tile of their models' training | {map:.4f} |
"""

_PSEUDO = """\
- Pseudo-labelled test tiles were learnt too: by the configurations that were chosen without them, and
  because that scored better here, which flatters as well.
"""

_CARD = (
    """---
library_name: saltray
pipeline_tag: image-segmentation
tags: [seismic, salt, segmentation, pytorch, u-net, ensemble]
---

# {name}: salt in seismic tiles, by an ensemble

The weighted mean of the probabilities of {models} networks marks salt in 101x101 tiles of seismic images.
Found by a search with saltray; the members were selected greedily, with replacement, from the best
configurations (Caruana et al. 2004).

| member | weight | mAP alone, at probability 0.50 |
|---|---|---|
{rows}

## Score

"""
    + METRIC
    + """ {judged}

| as this ensemble is used: {chosen} | score |
|---|---|
| cross-fitted, mean and standard deviation over the folds | {cross_fitted:.4f} ± {spread:.4f} |
{lone}| on the tiles that members and postprocessing were chosen on | {in_sample:.4f} |

Cross-fitted: each fold is scored with the members and the postprocessing that the other folds chose.

How far to trust it:

- The search itself chose its configurations on one split of these tiles, which flatters a little.
{pseudo}"""
    + LIMITS
    + """
## Data and training

- tiles: `{data}`; first digits of the SHA-256 of labels and split: `{fingerprint}`; seed {seed}
- configurations: `config.json` in each folder of `members/`
"""
    + ORIGIN
)
