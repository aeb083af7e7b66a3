"""The baseline ResUNet: filters, dropout, residual blocks, learning rate and batch size.

    python -m saltray.tune --data DIR --space search_spaces/resunet.py --trials 30 --epochs 50

The first trial is the baseline; it trained 33 tiles a second on two cores of an AMD EPYC (60a86c3). The
command is for a GPU; its score is not measured. Four trials of up to twelve epochs reached a validation mAP
of 0.598, postprocessed 0.658, chosen on the same tiles, in 56 minutes of two crowded cores of an AMD EPYC
(`benchmarks/results/search_resunet_cpu.json`; with `--trials 6 --epochs 12 --time-budget 55m`); the baseline
was stopped early, at 0.465 after nine.
"""

from typing import Any

import optuna

FIRST = {"filters": 16, "dropout": 0.5, "residual_blocks": 2, "learning_rate": 1e-3, "batch_size": 32}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw a ResUNet."""
    return {
        "model": {
            "architecture": "resunet",
            "filters": trial.suggest_categorical("filters", [8, 16, 24, 32]),
            "dropout": trial.suggest_float("dropout", 0.0, 0.6, step=0.05),
            "residual_blocks": trial.suggest_int("residual_blocks", 1, 3),
        },
        "optim": {"learning_rate": trial.suggest_float("learning_rate", 2e-4, 5e-3, log=True)},
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
    }
