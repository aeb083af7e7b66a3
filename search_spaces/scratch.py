"""A strong network without any pretrained weights: the techniques that need none.

    python -m saltray.tune --data DIR --space search_spaces/scratch.py --epochs 100 --time-budget 8h

Made for a GPU: two CPU cores would be busy for more than a day with one trial. For half an hour of one large
GPU, not yet tried: `--trials 12 --epochs 36 --time-budget 30m --gpus-per-trial auto --folds 5 --ensemble 2`.
Of its at most 800 epochs 360 are the refits', which no scheduler shortens; what the budget cuts off goes on
with `--resume`. Score and time are not yet measured.

What each technique is worth in a short training is in `benchmarks/results/ablation_scratch.md`: much dropout,
the focal loss, the plain U-Net, the vertical coordinate, warm restarts, cutout, residual branches that begin
at zero and normalising before the convolutions lost there, if not all by much, and are not drawn; what may
pay late, such as moved tiles and changed tones, is. The first trial is a guess, from what the contest's
published solutions have in common and what gained there. For CPUs: `laptop_scratch.py`.
"""

from typing import Any

import optuna

FIRST = {
    "filters": 32,
    "levels": 4,
    "dropout": 0.1,
    "normalisation": "batch",
    "activation": "relu",
    "residual_blocks": 1,
    "scse": True,
    "hypercolumn": True,
    "deep_supervision": True,
    "depth": False,
    "padded_size": 128,
    "padding": "reflect",
    "first_loss": "bce_dice",
    "second_loss": "lovasz_elu",
    "switch_at": 0.4,
    "optimizer": "adamw",
    "learning_rate_adamw": 1e-3,
    "weight_decay_adamw": 0.05,
    "schedule": "cosine",
    "clip_norm": True,
    "average": "ema",
    "move": 0.5,
    "tone": 0.5,
    "batch_size": 32,
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw a network, its losses, its optimisation and its augmentation."""
    return {
        "model": _model(trial),
        "loss": _loss(trial),
        "optim": _optim(trial),
        "augment": {
            "move": trial.suggest_categorical("move", [0.0, 0.5]),
            "tone": trial.suggest_categorical("tone", [0.0, 0.5]),
        },
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64]),
        # A falling rate brings its gain at the end: weak trials are ASHA's to stop.
        "patience": 1000,
    }


def _model(trial: optuna.Trial) -> dict[str, Any]:
    model: dict[str, Any] = {
        "architecture": "resunet",
        "residual_blocks": trial.suggest_int("residual_blocks", 1, 3),
        "filters": trial.suggest_categorical("filters", [16, 24, 32, 48]),
        "levels": trial.suggest_int("levels", 3, 5),
        # With 512 a network has up to 83 million weights, and each epoch's checkpoint 1.7 GB.
        "max_filters": 256,
        "dropout": trial.suggest_float("dropout", 0.0, 0.3, step=0.05),
        "normalisation": trial.suggest_categorical("normalisation", ["batch", "group"]),
        "activation": trial.suggest_categorical("activation", ["relu", "elu", "silu"]),
        "scse": trial.suggest_categorical("scse", [False, True]),
        "hypercolumn": trial.suggest_categorical("hypercolumn", [False, True]),
        "deep_supervision": trial.suggest_categorical("deep_supervision", [False, True]),
        "depth": trial.suggest_categorical("depth", [False, True]),
        "padded_size": trial.suggest_categorical("padded_size", [101, 112, 128]),
    }
    if model["padded_size"] > 101:
        model["padding"] = trial.suggest_categorical("padding", ["edge", "reflect"])
    return model


def _loss(trial: optuna.Trial) -> dict[str, Any]:
    loss: dict[str, Any] = {"name": trial.suggest_categorical("first_loss", ["bce", "bce_dice"])}
    lovasz = ["lovasz", "lovasz_elu", "lovasz_symmetric", "lovasz_elu_symmetric"]
    second = trial.suggest_categorical("second_loss", ["none", *lovasz])
    if second != "none":
        # ASHA compares after 3, 9 and 27 epochs: of 50 or 100, either all trials are past the switch or none.
        loss |= {"then": second, "switch_at": trial.suggest_float("switch_at", 0.3, 0.5, step=0.1)}
    return loss


def _optim(trial: optuna.Trial) -> dict[str, Any]:
    name = trial.suggest_categorical("optimizer", ["adamw", "sgd"])
    # Each optimizer has rates of its own order.
    low, high = {"adamw": (2e-4, 5e-3), "sgd": (5e-3, 2e-1)}[name]
    # AdamW multiplies its decay by the rate: what does anything lies between 0.01 and 0.5.
    least, most = {"adamw": (1e-3, 5e-1), "sgd": (1e-6, 1e-2)}[name]
    optim: dict[str, Any] = {
        "optimizer": name,
        "learning_rate": trial.suggest_float(f"learning_rate_{name}", low, high, log=True),
        "weight_decay": trial.suggest_float(f"weight_decay_{name}", least, most, log=True),
        "schedule": trial.suggest_categorical("schedule", ["cosine", "one_cycle"]),
        "clip_norm": 1.0 if trial.suggest_categorical("clip_norm", [False, True]) else None,
        "average": trial.suggest_categorical("average", ["none", "ema", "swa"]),
    }
    return optim
