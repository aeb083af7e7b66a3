import math
import subprocess
import sys
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from saltray.config import OptimConfig
from saltray.network.optim import (
    averaged_tensors,
    build_optimizer,
    cycle_ends,
    ema_share,
    epochs_since_best,
    learning_rate,
    move_average,
    plateau,
    swa_share,
)

histories = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 1.0]), max_size=40)


def torch_learning_rate(config: OptimConfig, history: list[float]) -> float:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = ReduceLROnPlateau(
        optimizer,
        mode="max",
        factor=config.plateau_factor,
        patience=config.plateau_patience
        - 1,  # torch reduces after patience + 1 bad epochs, Keras after patience
        threshold=0,
        threshold_mode="abs",
        min_lr=config.min_learning_rate,
        eps=0,
    )
    for score in history:
        scheduler.step(score)
    return float(optimizer.param_groups[0]["lr"])


@given(
    histories, st.integers(1, 6), st.sampled_from([0.1, 0.5, 0.9]), st.sampled_from([0.0, 1e-5, 2e-4, 1e-3])
)
def test_plateau_agrees_with_torch(history: list[float], patience: int, factor: float, floor: float) -> None:
    config = OptimConfig(
        learning_rate=1e-3, plateau_patience=patience, plateau_factor=factor, min_learning_rate=floor
    )
    assert plateau(config, history) == pytest.approx(torch_learning_rate(config, history), rel=1e-12)


@given(histories)
def test_a_plateau_never_raises_a_rate_below_the_floor(history: list[float]) -> None:
    config = OptimConfig(learning_rate=1e-6, plateau_patience=2, min_learning_rate=1e-5)
    assert plateau(config, history) == torch_learning_rate(config, history)


def test_plateau_by_hand() -> None:
    config = OptimConfig(learning_rate=1.0, plateau_patience=3, plateau_factor=0.5, min_learning_rate=0.2)
    scores = [0.4, 0.4, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    rates = [plateau(config, scores[:epoch]) for epoch in range(len(scores) + 1)]
    # The third epoch without a new best halves it; a tie is no new best; the count starts anew; the floor.
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2]


def test_a_first_score_of_zero_is_a_best() -> None:
    config = OptimConfig(plateau_patience=1)
    assert plateau(config, [0.0]) == config.learning_rate
    assert plateau(config, [0.0, 0.0]) == pytest.approx(config.learning_rate * 0.1)


@pytest.mark.parametrize(
    ("history", "epochs"),
    [([], 0), ([0.0], 0), ([0.1, 0.2], 0), ([0.2, 0.1], 1), ([0.2, 0.2, 0.2], 2), ([0.1, 0.5, 0.3, 0.5], 2)],
)
def test_epochs_since_best(history: list[float], epochs: int) -> None:
    assert epochs_since_best(history) == epochs


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)


@pytest.mark.parametrize(("cycles", "steps"), [(1, 12), (3, 12), (4, 200), (7, 49)])
def test_cosine_agrees_with_torch_at_every_step(cycles: int, steps: int) -> None:
    config = OptimConfig(learning_rate=0.2, schedule="cosine", cycles=cycles, min_learning_rate=1e-3)
    optimizer = sgd()
    scheduler = CosineAnnealingWarmRestarts(optimizer, T_0=steps // cycles, eta_min=1e-3)
    for step in range(steps):
        assert learning_rate(config, [], step, steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_cycles_that_do_not_divide_the_steps_restart_once_each() -> None:
    config = OptimConfig(learning_rate=1.0, schedule="cosine", cycles=3, min_learning_rate=0)
    rates = [learning_rate(config, [], step, 100) for step in range(100)]
    assert [i for i in range(1, 100) if rates[i] > rates[i - 1]] == [34, 67]


@pytest.mark.parametrize("steps", [2, 5, 10, 137])
def test_one_cycle_agrees_with_torch_at_every_step(steps: int) -> None:
    config = OptimConfig(learning_rate=0.2, schedule="one_cycle")
    optimizer = sgd()
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        assert learning_rate(config, [], step, steps) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < steps - 1:
            scheduler.step()


@pytest.mark.parametrize("schedule", ["plateau", "cosine", "one_cycle"])
def test_steps_beyond_the_last_keep_its_rate(schedule: Literal["plateau", "cosine", "one_cycle"]) -> None:
    config = OptimConfig(schedule=schedule)
    assert learning_rate(config, [0.1], 12, 10) == learning_rate(config, [0.1], 9, 10)


@pytest.mark.parametrize(("epochs", "cycles"), [(50, 3), (50, 4), (64, 3), (15, 2)])
def test_snapshots_are_taken_at_low_rates(epochs: int, cycles: int) -> None:
    config = OptimConfig(schedule="cosine", cycles=cycles, snapshots=True, learning_rate=1.0)
    for epoch in cycle_ends(config, epochs):
        assert learning_rate(config, [], 10 * epoch - 1, 10 * epochs) < 0.05


@pytest.mark.parametrize(("epochs", "share"), [(1, 0.75), (2, 0.75), (50, 0.999)])
def test_a_stochastic_average_has_the_last_epoch_at_least(epochs: int, share: float) -> None:
    assert swa_share(OptimConfig(average="swa", swa_from=share), epochs, epochs) == 1


def test_snapshots_are_due_where_cycles_end() -> None:
    config = OptimConfig(schedule="cosine", cycles=3, snapshots=True)
    assert cycle_ends(config, 30) == {10, 20, 30}
    assert cycle_ends(config, 10) == {3, 6, 10}
    assert cycle_ends(config, 1) == {1}
    assert cycle_ends(OptimConfig(schedule="cosine", cycles=3), 30) == set()


@pytest.mark.parametrize(
    ("name", "shape", "decay"),
    [
        ("adam", (2, 5), 0.0),
        ("adamw", (2, 5), 0.1),
        ("sgd", (2, 5), 0.1),
        # Biases and scales do not decay.
        ("adam", (10,), 0.0),
        ("adamw", (10,), 0.0),
        ("sgd", (10,), 0.0),
    ],
)
def test_optimizers_agree_with_their_formulas(
    name: Literal["adam", "adamw", "sgd"], shape: tuple[int, ...], decay: float
) -> None:
    weight_decay = 0.0 if name == "adam" else 0.1
    config = OptimConfig(optimizer=name, learning_rate=0.01, weight_decay=weight_decay, momentum=0.8)
    expected = torch.linspace(-1, 1, 10).reshape(shape)
    parameter = nn.Parameter(expected.clone())
    optimizer = build_optimizer([parameter], config)
    mean, square = torch.zeros(shape), torch.zeros(shape)
    for step in range(1, 4):
        optimizer.zero_grad()
        (parameter**3).sum().backward()  # type: ignore[no-untyped-call]
        gradient = 3 * expected**2
        if name == "sgd":
            gradient = gradient + decay * expected
            mean = 0.8 * mean + gradient  # Nesterov looks ahead along it
            expected = expected - 0.01 * (gradient + 0.8 * mean)
        else:
            mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
            corrected = (square / (1 - 0.999**step)).sqrt() + 1e-8
            decayed = expected * (1 - 0.01 * decay)
            expected = decayed - 0.01 * mean / (1 - 0.9**step) / corrected
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_no_optimizer_loads_pytorchs_compiler(name: str) -> None:
    code = f"""
import sys, torch
from saltray.config import OptimConfig
from saltray.network.optim import build_optimizer
weight = torch.nn.Parameter(torch.ones(2, 2))
optimizer = build_optimizer([weight], OptimConfig(optimizer={name!r}))
optimizer.zero_grad()
weight.sum().backward()
optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
assert weight.requires_grad and not bool((weight == 1).any())
print(*sys.modules)"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.optim" in answer.stdout.split()
    assert "torch._dynamo" not in answer.stdout.split()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def wander(model: nn.Sequential) -> None:
    """Change weights and statistics as a training step would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(torch.randn(8, 3))


def test_exponential_average_agrees_with_torchs() -> None:
    model, average = network(), network()
    config = OptimConfig(average="ema", ema_decay=0.9)
    peer = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)  # type: ignore[no-untyped-call]
    late = 1000  # when the decay has long risen to its end
    for step in range(4):
        wander(model)
        share = ema_share(config, late + step)
        assert share == pytest.approx(0.1)
        weight = 1.0 if step == 0 else share
        move_average(averaged_tensors(average), averaged_tensors(model), weight)  # torch's begins as a copy
        peer.update_parameters(model)
    for name, value in peer.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(average.state_dict()[name], value)


def test_exponential_average_soon_forgets_the_start() -> None:
    config = OptimConfig(average="ema", ema_decay=0.999)
    left = 1.0
    for step in range(100):
        left *= 1 - ema_share(config, step)
    assert left < 1e-12  # 0.999 ** 100 would be 0.9
    assert ema_share(config, 10**6) == pytest.approx(1e-3)
    assert ema_share(OptimConfig(), 5) == 0


def test_stochastic_average_is_the_mean_of_the_last_epochs() -> None:
    model, average = network(), network()
    config = OptimConfig(average="swa", swa_from=0.6)
    seen = []
    for epoch in range(1, 11):
        wander(model)
        share = swa_share(config, epoch, 10)
        assert (share > 0) == (epoch > 6)
        if share:
            move_average(averaged_tensors(average), averaged_tensors(model), share)
            seen.append([p.detach().clone() for p in model.parameters()])
    for parameter, values in zip(average.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(parameter.detach(), torch.stack(values).mean(dim=0))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_first_step_that_float16_leaves_out_leaves_nothing_behind(
    optimizer: Literal["adam", "adamw", "sgd"],
) -> None:
    config = OptimConfig(optimizer=optimizer, learning_rate=0.1, weight_decay=0.0)
    gradients = [torch.full((64, 64), value) for value in (math.inf, 0.5, -0.25, 1.0)]
    # Fresh memory is often zeros: what freed tensors leave there is not.
    del [torch.full((64, 64), 1e30) for _ in range(64)][:]
    ended = []
    for steps in (gradients, gradients[1:]):
        weight = nn.Parameter(torch.ones(64, 64))
        taken, scaler = build_optimizer([weight], config), torch.amp.GradScaler("cpu", init_scale=1.0)
        for gradient in steps:
            weight.grad = gradient.clone()
            scaler.scale(torch.zeros(()))  # it makes its scale when it is first asked
            scaler.step(taken)
            scaler.update(1.0)
        ended.append(weight.detach())
    assert torch.equal(*ended)
