"""The optimizer, and its schedule as pure functions of the validation history.

Nothing here holds state: a trial that resumes from its last epoch needs only its history to go on exactly
as it would have.
"""

from collections.abc import Iterable, Sequence

import torch

from saltray.config import OptimConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Return Adam (Kingma and Ba 2015, arXiv:1412.6980) in its fused form."""
    return torch.optim.Adam(parameters, lr=config.learning_rate, fused=True)


def learning_rate(config: OptimConfig, history: Sequence[float]) -> float:
    """Return the next epoch's learning rate: reduced each time the validation mAP stays on a plateau.

    As Keras' `ReduceLROnPlateau`: after `plateau_patience` epochs without a new best the rate is multiplied
    by `plateau_factor`, and the count starts anew; it never falls below `min_learning_rate`.

    Args:
        config: base rate, patience, factor and floor.
        history: validation mAP of every epoch so far, oldest first.
    """
    rate, best, waited = config.learning_rate, -1.0, 0
    for score in history:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited >= config.plateau_patience:
            rate, waited = min(rate, max(rate * config.plateau_factor, config.min_learning_rate)), 0
    return rate


def epochs_since_best(history: Sequence[float]) -> int:
    """Return how many epochs lie behind the first epoch with the best score; 0 for an empty history."""
    return len(history) - 1 - history.index(max(history)) if history else 0
