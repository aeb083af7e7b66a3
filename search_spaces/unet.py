"""The baseline U-Net: filters, dropout, learning rate and batch size.

    python -m saltray.tune --data DIR --space search_spaces/unet.py --trials 30 --epochs 50

The first trial is the baseline. The command is for a GPU; its score is not measured. On two cores of an AMD
EPYC four trials reached a validation mAP of 0.623 in 67 minutes (`benchmarks/results/search_unet_cpu.json`):

    python -m saltray.tune --data DIR --space search_spaces/unet.py --trials 6 --epochs 12 --time-budget 45m
    python -m saltray.tune --resume RUN --trials 4 --time-budget 22m
"""

from typing import Any

import optuna

FIRST = {"filters": 16, "dropout": 0.5, "learning_rate": 1e-3, "batch_size": 32}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw a U-Net."""
    return {
        "model": {
            "architecture": "unet",
            "filters": trial.suggest_categorical("filters", [8, 16, 24, 32]),
            "dropout": trial.suggest_float("dropout", 0.0, 0.6, step=0.05),
        },
        "optim": {"learning_rate": trial.suggest_float("learning_rate", 2e-4, 5e-3, log=True)},
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
    }
