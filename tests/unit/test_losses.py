from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from saltray.config import TrialConfig
from saltray.losses import LOSSES, bce


def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 7, 5), generator=generator) * 2
    return logits, (torch.rand((3, 7, 5), generator=generator) < 0.3).float()


def test_config_allows_exactly_the_losses_there_are() -> None:
    assert set(get_args(TrialConfig.model_fields["loss"].annotation)) == set(LOSSES)


def test_bce_agrees_with_scikit_learn() -> None:
    logits, masks = example()
    salt = torch.sigmoid(logits.double()).numpy().ravel()
    assert float(bce(logits, masks)) == pytest.approx(log_loss(masks.numpy().ravel(), salt), rel=1e-6)


def test_bce_of_an_undecided_network_is_log_two() -> None:
    masks = example()[1]
    assert float(bce(torch.zeros_like(masks), masks)) == pytest.approx(np.log(2))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_a_finite_scalar_even_for_extreme_logits(name: str) -> None:
    _, masks = example()
    for logits in (torch.full_like(masks, 1e4), torch.full_like(masks, -1e4)):
        for truth in (masks, torch.zeros_like(masks), torch.ones_like(masks)):
            loss = LOSSES[name](logits.requires_grad_(), truth)
            assert loss.shape == ()
            (gradient,) = torch.autograd.grad(loss, logits)
            assert torch.isfinite(loss)
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_loss_falls_towards_the_truth_and_its_gradient_points_there(name: str) -> None:
    logits, masks = example()
    right, wrong = (2 * masks - 1) * 8, (1 - 2 * masks) * 8
    loss = LOSSES[name]
    assert 0 <= loss(right, masks) < loss(logits, masks) < loss(wrong, masks)
    start = torch.zeros_like(masks).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(start, masks), start)
    assert loss(start - 0.1 * gradient / gradient.norm(), masks) < loss(start, masks)
