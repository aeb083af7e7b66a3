"""Losses: `(logits, masks) -> scalar`, both float of shape (tiles, height, width), masks in {0, 1}.

Those of `LOSSES` take masks with `IGNORED` pixels as well, of which nothing is known.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from saltray.config import IGNORED, LossConfig

Loss = Callable[[Tensor, Tensor], Tensor]

SURE = 1e4
"""A logit at which the sigmoid is 0 or 1 exactly, and which float16 and bfloat16 hold as well."""


def ignoring(loss: Loss) -> Loss:
    """Return a loss that takes masks in {0, 1, IGNORED}; ignored pixels add nothing, and get no gradient.

    They count as rightly and surely predicted to be without salt, where each of these losses is zero. (The
    means over all pixels, and the background's overlap in the symmetric Lovász losses, have them in their
    denominators.)
    """

    def known_only(logits: Tensor, masks: Tensor) -> Tensor:
        unknown = masks == IGNORED
        return loss(logits.masked_fill(unknown, -SURE), masks.masked_fill(unknown, 0))

    return known_only


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over all pixels."""
    return functional.binary_cross_entropy_with_logits(logits, masks)


def bce_dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy plus the soft Dice loss.

    The sums themselves are in Dice's denominator (Drozdzal et al. 2016, arXiv:1608.04117), not those of
    squares (Milletari et al. 2016, arXiv:1606.04797). It is taken tile by tile, with one pixel added to both
    sides of its quotient, so that an empty tile counts as right where nothing is predicted.
    """
    salt = torch.sigmoid(logits)
    overlap, total = (salt * masks).sum(dim=(1, 2)), (salt + masks).sum(dim=(1, 2))
    return bce(logits, masks) + (1 - (2 * overlap + 1) / (total + 1)).mean()


def focal(logits: Tensor, masks: Tensor, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy weighted by (1 - p)^gamma, p the probability of the truth.

    Source: Lin et al. 2017, arXiv:1708.02002, without its class weights; gamma as there.
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    wrong = torch.sigmoid(logits * (1 - 2 * masks))
    return (wrong**gamma * entropy).mean()


def lovasz_extension(errors: Tensor, masks: Tensor) -> Tensor:
    """Interpolate the Jaccard loss, known for sets of wrong pixels, to real errors: its Lovász extension.

    With the pixels in falling order of their errors, the sum of each error times the rise of the Jaccard
    loss when its pixel joins the wrong ones. Source: Berman et al. 2018, arXiv:1705.08790, equations 8 and 9.

    Args:
        errors: float (tiles, pixels); 0 is right, 1 is wrong.
        masks: float (tiles, pixels) in {0, 1}; a tile may be empty.

    Returns:
        The loss of each tile, (tiles,).
    """
    order = errors.detach().argsort(dim=1, descending=True)
    truth = masks.gather(1, order)
    # The Jaccard loss when the first k pixels are wrong: counts, exact in float32.
    intersection = truth.sum(dim=1, keepdim=True) - truth.cumsum(dim=1)
    union = truth.sum(dim=1, keepdim=True) + (1 - truth).cumsum(dim=1)
    jaccard = 1 - intersection / union
    rises = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], dim=1)
    return (errors.gather(1, order) * rises).sum(dim=1)


def lovasz(logits: Tensor, masks: Tensor, *, elu: bool = False, symmetric: bool = False) -> Tensor:
    """Lovász hinge, the mean over the tiles (Berman et al. 2018, arXiv:1705.08790).

    Args:
        logits: float (tiles, height, width).
        masks: of the same shape, in {0, 1}.
        elu: ELU + 1 in place of the hinge's ReLU: right pixels keep a gradient (a habit of the contest).
        symmetric: the mean with the loss of the background, so that both classes' overlap counts.
    """
    margins = (1 - logits * (2 * masks - 1)).flatten(1)
    errors = functional.elu(margins) + 1 if elu else functional.relu(margins)
    loss = lovasz_extension(errors, masks.flatten(1))
    if symmetric:
        # Swapping the classes leaves the margins as they are.
        loss = (loss + lovasz_extension(errors, 1 - masks.flatten(1))) / 2
    return loss.mean()


LOSSES: dict[str, Loss] = {
    "bce": ignoring(bce),
    "bce_dice": ignoring(bce_dice),
    "focal": ignoring(focal),
    "lovasz": ignoring(lovasz),
    "lovasz_elu": ignoring(partial(lovasz, elu=True)),
    "lovasz_symmetric": ignoring(partial(lovasz, symmetric=True)),
    "lovasz_elu_symmetric": ignoring(partial(lovasz, elu=True, symmetric=True)),
}
"""Every loss by its name in `LossConfig`."""


def loss_of_epoch(config: LossConfig, epoch: int, epochs: int) -> Loss:
    """Return the loss of an epoch, counted from 1: the first one, or from `switch_at` on the second.

    Each has at least one epoch, where there are two.
    """
    switch = max(1, min(round(config.switch_at * epochs), epochs - 1))
    if config.then is not None and epoch > switch:
        return LOSSES[config.then]
    return LOSSES[config.name]


def deep_supervision(
    loss: Loss, auxiliary: tuple[Tensor, ...], empty: Tensor, masks: Tensor, config: LossConfig
) -> Tensor:
    """Return the weighted loss of a network's auxiliary heads.

    The levels of the decoder learn from tiles with salt alone: telling whether there is any is the last
    head's work (as in the contest's winning solutions).

    Args:
        loss: of the trial.
        auxiliary: logits of each level, (tiles, height, width).
        empty: logits of "no salt in this tile", (tiles,).
        masks: float (tiles, height, width) in {0, 1, IGNORED}.
        config: the weights.
    """
    salt = (masks == 1).any(dim=2).any(dim=1)
    rows = salt.nonzero().squeeze(1)  # once for all heads: a GPU is waited for here
    # There may be salt in ignored pixels: of such a tile nobody knows whether it is empty.
    unsure = ~salt & (masks == IGNORED).any(dim=2).any(dim=1)
    sure = empty.masked_fill(unsure, SURE)
    total = config.empty * functional.binary_cross_entropy_with_logits(sure, (~salt).float())
    salty = masks[rows]
    for logits in auxiliary:
        # A batch without salt keeps the heads in the graph, where DDP looks for their gradients.
        level = loss(logits[rows], salty) if len(rows) else 0 * logits.sum()
        total = total + config.auxiliary / len(auxiliary) * level
    return total
