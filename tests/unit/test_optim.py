import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau

from saltray.config import OptimConfig
from saltray.optim import build_optimizer, epochs_since_best, learning_rate

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
    assert learning_rate(config, history) == pytest.approx(torch_learning_rate(config, history), rel=1e-12)


@given(histories)
def test_a_plateau_never_raises_a_rate_below_the_floor(history: list[float]) -> None:
    config = OptimConfig(learning_rate=1e-6, plateau_patience=2, min_learning_rate=1e-5)
    assert learning_rate(config, history) == torch_learning_rate(config, history)


def test_plateau_by_hand() -> None:
    config = OptimConfig(learning_rate=1.0, plateau_patience=3, plateau_factor=0.5, min_learning_rate=0.2)
    scores = [0.4, 0.4, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    rates = [learning_rate(config, scores[:epoch]) for epoch in range(len(scores) + 1)]
    # The third epoch without a new best halves it; a tie is no new best; the count starts anew; the floor.
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2]


def test_a_first_score_of_zero_is_a_best() -> None:
    config = OptimConfig(plateau_patience=1)
    assert learning_rate(config, [0.0]) == config.learning_rate
    assert learning_rate(config, [0.0, 0.0]) == pytest.approx(config.learning_rate * 0.1)


@pytest.mark.parametrize(
    ("history", "epochs"),
    [([], 0), ([0.0], 0), ([0.1, 0.2], 0), ([0.2, 0.1], 1), ([0.2, 0.2, 0.2], 2), ([0.1, 0.5, 0.3, 0.5], 2)],
)
def test_epochs_since_best(history: list[float], epochs: int) -> None:
    assert epochs_since_best(history) == epochs


def test_the_optimizer_is_adam() -> None:
    start = torch.linspace(-1, 1, 10)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer([parameter], OptimConfig(learning_rate=0.01))
    mean, square = torch.zeros(10), torch.zeros(10)
    expected = start.clone()
    for step in range(1, 4):
        optimizer.zero_grad()
        (parameter**3).sum().backward()  # type: ignore[no-untyped-call]
        gradient = 3 * expected**2
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        corrected = (square / (1 - 0.999**step)).sqrt() + 1e-8
        expected = expected - 0.01 * mean / (1 - 0.9**step) / corrected
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected)
