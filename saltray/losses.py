"""Losses: `(logits, masks) -> scalar`, both float of shape (tiles, height, width), masks in {0, 1}."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

Loss = Callable[[Tensor, Tensor], Tensor]


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over all pixels."""
    return functional.binary_cross_entropy_with_logits(logits, masks)


LOSSES: dict[str, Loss] = {"bce": bce}
"""Every loss by its name in `TrialConfig.loss`."""
