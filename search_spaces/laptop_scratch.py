"""For two CPU cores and an hour, without any pretrained weights: a ResUNet of 8 to 16 filters.

    python -m saltray.tune --data DIR --space search_spaces/laptop_scratch.py --trials 1 --epochs 44

The first trial took 72 minutes on two cores of an AMD EPYC, tests beside some of its epochs. It reached a
validation mAP of 0.805, postprocessed 0.817, chosen on the same tiles, and 0.811 on those that lie beside no
training tile (`benchmarks/results/hour_scratch_cpu.json`).

It has what gained in `benchmarks/results/ablation_scratch.md` (padding, no dropout, BCE with
Dice, scSE, clipped gradients), but for group normalisation and the stochastic average, which further trials
draw, and what should pay in longer trainings: augmentation, Lovász at the end, decay, an exponential average.
"""

from typing import Any

import optuna

FIRST = {
    "filters": 16,
    "levels": 4,
    "dropout": 0.0,
    "normalisation": "batch",
    "activation": "relu",
    "scse": True,
    "depth": False,
    "padded_size": 112,
    "first_loss": "bce_dice",
    "second_loss": "lovasz_elu",
    "switch_at": 0.5,
    "learning_rate": 2e-3,
    "weight_decay": 2e-2,
    "schedule": "one_cycle",
    "average": "ema",
    "move": 0.5,
    "tone": 0.5,
    "batch_size": 16,
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw a network, its losses and how it is trained."""
    loss: dict[str, Any] = {"name": trial.suggest_categorical("first_loss", ["bce", "bce_dice"])}
    second = trial.suggest_categorical("second_loss", ["none", "lovasz_elu", "lovasz_elu_symmetric"])
    if second != "none":
        # ASHA compares after 3, 9 and 27 epochs: of 22 to 53, either all trials are past the switch or none.
        loss |= {"then": second, "switch_at": trial.suggest_float("switch_at", 0.4, 0.5, step=0.1)}
    return {
        "model": {
            "architecture": "resunet",
            "residual_blocks": 1,
            "filters": trial.suggest_categorical("filters", [8, 12, 16]),
            "max_filters": 128,
            "levels": trial.suggest_int("levels", 4, 5),
            "padded_size": trial.suggest_categorical("padded_size", [101, 112, 128]),
            "padding": "edge",
            "dropout": trial.suggest_float("dropout", 0.0, 0.3, step=0.05),
            "normalisation": trial.suggest_categorical("normalisation", ["batch", "group"]),
            "activation": trial.suggest_categorical("activation", ["relu", "silu"]),
            "scse": trial.suggest_categorical("scse", [False, True]),
            "hypercolumn": True,
            "deep_supervision": True,
            "depth": trial.suggest_categorical("depth", [False, True]),
        },
        "loss": loss,
        "optim": {
            "optimizer": "adamw",
            "learning_rate": trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 5e-1, log=True),
            "schedule": trial.suggest_categorical("schedule", ["cosine", "one_cycle"]),
            "average": trial.suggest_categorical("average", ["ema", "swa"]),
            "clip_norm": 1.0,
        },
        "augment": {
            "move": trial.suggest_categorical("move", [0.0, 0.5, 1.0]),
            "tone": trial.suggest_categorical("tone", [0.0, 0.5]),
        },
        "batch_size": trial.suggest_categorical("batch_size", [8, 16, 32]),
        # A falling rate brings its gain at the end.
        "patience": 1000,
    }
