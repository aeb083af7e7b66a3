import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, log_loss
from torch import Tensor

from saltray.config import IGNORED, LossConfig, LossName
from saltray.network.losses import (
    LOSSES,
    SURE,
    bce,
    bce_dice,
    deep_supervision,
    focal,
    loss_of_epoch,
    lovasz_extension,
)


def example() -> tuple[Tensor, Tensor]:
    """Logits, and masks of which one is empty and one full."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((5, 7, 5), generator=generator) * 2
    masks = (torch.rand((5, 7, 5), generator=generator) < 0.3).float()
    masks[1], masks[3] = 0, 1
    return logits, masks


def jaccard_loss(wrong: set[int], truth: set[int]) -> float:
    """Lose 1 - IoU of the prediction that is wrong at these pixels."""
    predicted = truth ^ wrong
    return 1 - len(predicted & truth) / len(predicted | truth) if predicted | truth else 0.0


def slow_extension(errors: list[float], truth: set[int]) -> float:
    """Sum the rises of the Jaccard loss, pixel after pixel in falling order of the errors."""
    total, wrong = 0.0, set[int]()
    for pixel in sorted(range(len(errors)), key=lambda i: -errors[i]):
        before = jaccard_loss(wrong, truth)
        wrong = wrong | {pixel}
        total += errors[pixel] * (jaccard_loss(wrong, truth) - before)
    return total


def slow_lovasz(logits: Tensor, masks: Tensor, elu: bool, symmetric: bool) -> float:
    losses = []
    for scores, mask in zip(logits.flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
        margins = [1 - s if m else 1 + s for s, m in zip(scores, mask, strict=True)]
        errors = [(x + 1 if x > 0 else math.exp(x)) if elu else max(x, 0) for x in margins]
        salt = {i for i, m in enumerate(mask) if m}
        loss = slow_extension(errors, salt)
        if symmetric:
            loss = (loss + slow_extension(errors, set(range(len(mask))) - salt)) / 2
        losses.append(loss)
    return float(np.mean(losses))


def test_config_allows_exactly_the_losses_there_are() -> None:
    assert set(get_args(LossName)) == set(LOSSES)


def test_bce_agrees_with_scikit_learn() -> None:
    logits, masks = example()
    salt = torch.sigmoid(logits.double()).numpy().ravel()
    assert float(bce(logits, masks)) == pytest.approx(log_loss(masks.numpy().ravel(), salt), rel=1e-6)


def test_bce_of_an_undecided_network_is_log_two() -> None:
    masks = example()[1]
    assert float(bce(torch.zeros_like(masks), masks)) == pytest.approx(np.log(2))


def test_dice_of_sure_predictions_agrees_with_scikit_learn() -> None:
    logits, masks = example()
    sure = torch.sign(logits) * 200  # probabilities of exactly 0 and 1
    expected = []
    for scores, mask in zip(sure.flatten(1), masks.flatten(1), strict=True):
        salt, truth = scores.numpy() > 0, mask.numpy() > 0
        # One pixel in both sides of the quotient is one more that all agree on, with half the weight.
        total = salt.sum() + truth.sum()
        f1 = f1_score(truth, salt, zero_division=1)
        expected.append(1 - (f1 * total + 1) / (total + 1))
    assert float(bce_dice(sure, masks) - bce(sure, masks)) == pytest.approx(np.mean(expected), rel=1e-4)


def test_dice_of_unsure_predictions_agrees_with_its_formula() -> None:
    """Where probabilities are 0 or 1, sums and sums of squares are one; here they are not."""
    logits, masks = example()
    losses = []
    for scores, mask in zip(logits.double().flatten(1).tolist(), masks.flatten(1).tolist(), strict=True):
        overlap = total = 0.0
        for score, truth in zip(scores, mask, strict=True):
            salt = 1 / (1 + np.exp(-score))
            overlap += salt * truth
            total += salt + truth
        losses.append(1 - (2 * overlap + 1) / (total + 1))
    assert float(bce_dice(logits, masks) - bce(logits, masks)) == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 2.0, 3.5])
def test_focal_agrees_with_its_formula(gamma: float) -> None:
    logits, masks = example()
    salt = 1 / (1 + np.exp(-logits.double().numpy()))
    p = np.where(masks.numpy() > 0, salt, 1 - salt)
    assert float(focal(logits, masks, gamma)) == pytest.approx(
        np.mean(-((1 - p) ** gamma) * np.log(p)), rel=1e-5
    )


@pytest.mark.parametrize("elu", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_lovasz_hinge_agrees_with_its_definition(elu: bool, symmetric: bool) -> None:
    logits, masks = example()
    name = "lovasz" + "_elu" * elu + "_symmetric" * symmetric
    expected = slow_lovasz(logits, masks, elu, symmetric)
    assert float(LOSSES[name](logits, masks)) == pytest.approx(expected, rel=1e-5)


def test_lovasz_extension_of_hard_errors_is_one_minus_iou() -> None:
    # Every prediction of every mask of four pixels, empty ones too.
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    for wrong in itertools.product([0.0, 1.0], repeat=4):
        errors = torch.tensor(wrong).expand_as(masks)
        losses = lovasz_extension(errors, masks)
        for loss, mask in zip(losses, masks.numpy(), strict=True):
            predicted = mask != np.array(wrong)
            # scikit-learn's IoU of two empty masks is what it is told.
            iou = jaccard_score(mask > 0, predicted, zero_division=1.0)
            assert float(loss) == pytest.approx(1 - iou, abs=1e-6)


def test_lovasz_of_a_tile_does_not_depend_on_the_batch() -> None:
    logits, masks = example()
    alone = [float(LOSSES["lovasz"](logits[i : i + 1], masks[i : i + 1])) for i in range(len(masks))]
    assert float(LOSSES["lovasz"](logits, masks)) == pytest.approx(np.mean(alone), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_agrees_with_differences(name: str) -> None:
    logits, masks = example()
    assert torch.autograd.gradcheck(LOSSES[name], (logits.double().requires_grad_(), masks.double()))


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


def test_second_loss_takes_over_at_its_share_of_the_epochs() -> None:
    config = LossConfig(name="bce", then="lovasz", switch_at=0.29)
    chosen = [loss_of_epoch(config, epoch, 100) for epoch in range(1, 101)]
    assert chosen == [LOSSES["bce"]] * 29 + [LOSSES["lovasz"]] * 71
    assert loss_of_epoch(LossConfig(name="focal"), 100, 100) is LOSSES["focal"]
    # In the shortest trials too each loss has an epoch.
    for share in (0.01, 0.4, 0.99):
        short = LossConfig(then="lovasz", switch_at=share)
        assert [loss_of_epoch(short, epoch, 2) for epoch in (1, 2)] == [LOSSES["bce"], LOSSES["lovasz"]]
        assert loss_of_epoch(short, 1, 1) is LOSSES["bce"]


def test_deep_supervision_by_hand() -> None:
    logits, masks = example()
    empty = torch.tensor([-1.0, 2.0, 0.5, -3.0, 0.0])
    config = LossConfig(auxiliary=0.3, empty=0.7)
    salt = [i for i in range(5) if masks[i].any()]
    assert salt == [0, 2, 3, 4]
    levels = (logits, logits * 0.5)
    expected = 0.3 * np.mean([float(bce(level[salt], masks[salt])) for level in levels])
    expected += 0.7 * log_loss([0, 1, 0, 0, 0], torch.sigmoid(empty).numpy())
    assert float(deep_supervision(bce, levels, empty, masks, config)) == pytest.approx(expected, rel=1e-5)


def test_deep_supervision_of_empty_tiles_alone_reaches_every_head() -> None:
    logits, masks = torch.ones(2, 3, 3, requires_grad=True), torch.zeros(2, 3, 3)
    empty = torch.zeros(2, requires_grad=True)
    deep_supervision(bce, (logits,), empty, masks, LossConfig()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and not logits.grad.any()
    assert empty.grad is not None and (empty.grad < 0).all()


def some_ignored() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, masks, and which pixels are ignored: some of each tile, all of one."""
    logits, masks = example()
    unknown = torch.rand(masks.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    unknown[2] = True
    return logits, masks.masked_fill(unknown, IGNORED), unknown


@pytest.mark.parametrize("name", LOSSES)
def test_an_ignored_pixel_has_no_say_and_no_gradient(name: str) -> None:
    logits, masks, unknown = some_ignored()
    others = torch.where(unknown, -50 * logits, logits).requires_grad_()
    logits.requires_grad_()
    loss = LOSSES[name](logits, masks)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == float(LOSSES[name](others, masks).detach())
    assert logits.grad is not None and (logits.grad[unknown] == 0).all()
    assert (logits.grad[~unknown] != 0).any()
    # What it adds is nothing: as a pixel that is rightly and surely no salt.
    right = LOSSES[name](torch.where(unknown, torch.tensor(-60.0), logits), masks.where(~unknown, 0.0))
    assert float(loss.detach()) == pytest.approx(float(right.detach()), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_tile_of_ignored_pixels_alone_has_no_loss(name: str) -> None:
    logits, _ = example()
    assert float(LOSSES[name](logits, torch.full_like(logits, IGNORED))) == 0


@pytest.mark.parametrize("name", ["bce", "bce_dice", "focal", "lovasz", "lovasz_elu"])
def test_without_the_ignored_pixels_the_sum_of_the_loss_is_the_same(name: str) -> None:
    """The known pixels by themselves, as tiles of one pixel less in each row."""
    logits, masks = example()
    unknown = torch.zeros_like(masks, dtype=torch.bool)
    unknown[:, :, 0] = True
    part = LOSSES[name](logits[:, :, 1:], masks[:, :, 1:])
    whole = LOSSES[name](logits, masks.masked_fill(unknown, IGNORED))
    if name == "bce_dice":  # the mean of one part is over all pixels, that of the other over the tiles
        dice = part - bce(logits[:, :, 1:], masks[:, :, 1:])
        assert float(whole - dice) == pytest.approx(0.8 * float(part - dice), rel=1e-5)
        return
    share = 0.8 if name in ("bce", "focal") else 1.0  # the others are means over tiles
    assert float(whole) == pytest.approx(share * float(part), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sure_logit_is_finite_in_every_precision_and_its_sigmoid_exact(dtype: torch.dtype) -> None:
    assert torch.tensor(SURE).to(dtype).isfinite()
    for sign, exact in ((1, 1), (-1, 0)):
        assert float(torch.sigmoid(torch.tensor(sign * SURE).to(dtype))) == exact
        assert float(torch.sigmoid(torch.tensor(sign * SURE))) == exact


def test_deep_supervision_ignores_pixels_and_tiles_of_which_nobody_knows_whether_they_are_empty() -> None:
    logits, masks, unknown = some_ignored()
    masks[1] = 0
    masks[1, 0, 0], masks[0, 0, 1] = IGNORED, 1  # perhaps empty; surely not
    masks[3] = 0  # surely empty
    unknown = masks == IGNORED
    level, empty = logits.clone().requires_grad_(), torch.linspace(-1, 1, 5).requires_grad_()
    config = LossConfig(auxiliary=1.0, empty=1.0)
    loss = deep_supervision(LOSSES["bce_dice"], (level,), empty, masks, config)
    loss.backward()  # type: ignore[no-untyped-call]
    assert level.grad is not None and empty.grad is not None
    assert (level.grad[unknown] == 0).all()
    salt = (masks == 1).any(dim=2).any(dim=1)
    assert salt.tolist() == [True, False, False, False, True]
    assert (empty.grad != 0).tolist() == [True, False, False, True, True]
    known = empty.detach()
    entropy = [math.log1p(math.exp(float(e))) for e in known[salt]] + [math.log1p(math.exp(-float(known[3])))]
    expected = sum(entropy) / 5 + float(LOSSES["bce_dice"](logits[salt], masks[salt]))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
