"""The optimizer, and its schedules as pure functions of the step and the validation history.

The schedules hold no state: a trial that resumes from its last epoch needs only its history to go on exactly
as it would have.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from saltray.config import OptimConfig

ONE_CYCLE_RISE, ONE_CYCLE_START, ONE_CYCLE_END = 0.3, 25.0, 1e4
"""PyTorch's one-cycle: share of the steps on which the rate rises, what the highest rate is divided by at
the start, and what that is divided by at the end."""


def _eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return the same optimizer without what PyTorch's compiler hangs around its methods.

    The first call of one of those imports the compiler, a second and 72 MB a process, to tell it that it is
    not to compile them (torch 2.13, `torch._disable_dynamo`). Nothing here is compiled.
    """
    wrapped = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    # The wrapper around this one turned the gradients off as well.
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods)


_OPTIMIZERS = {
    "adam": _eager(torch.optim.Adam),
    "adamw": _eager(torch.optim.AdamW),
    "sgd": _eager(torch.optim.SGD),
}


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer in its fused form.

    Adam (Kingma and Ba 2015, arXiv:1412.6980), AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), or SGD
    with Nesterov's momentum (Sutskever et al. 2013). Biases, and a normalisation's scales, do not decay
    (He et al. 2019, arXiv:1812.01187).
    """
    rate, decay, known = config.learning_rate, config.weight_decay, list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in known if p.ndim > 1]},
        {"params": [p for p in known if p.ndim <= 1], "weight_decay": 0.0},
    ]
    numbers: dict[str, Any] = {"lr": rate, "weight_decay": decay, "fused": True}
    if config.optimizer == "sgd":
        numbers |= {"momentum": config.momentum, "nesterov": config.momentum > 0}
    optimizer: torch.optim.Optimizer = _OPTIMIZERS[config.optimizer](groups, **numbers)
    if config.optimizer == "sgd" and config.momentum > 0:
        # PyTorch allocates it within the first step, without zeros; float16 may leave that step out, and what
        # lay in the memory would be the momentum of the next (torch 2.13, `torch.optim.sgd._fused_sgd`).
        for parameter in known:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(config: OptimConfig, history: Sequence[float], step: int, steps: int) -> float:
    """Return a step's learning rate.

    Args:
        config: the schedule and its numbers.
        history: validation mAP of every epoch so far, oldest first; the plateau alone reads it.
        step: of the whole trial, counted from 0.
        steps: of the whole trial; a step beyond them has the last one's rate.
    """
    step = min(step, steps - 1)
    if config.schedule == "plateau":
        return plateau(config, history)
    return cosine(config, step, steps) if config.schedule == "cosine" else one_cycle(config, step, steps)


def plateau(config: OptimConfig, history: Sequence[float]) -> float:
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


def cosine(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of a cosine from the full to the lowest rate, `cycles` times over.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983 (SGDR), with cycles of one length.
    """
    done = (step * config.cycles % steps) / steps  # whole numbers: a restart comes at its very step
    lowest = min(config.min_learning_rate, config.learning_rate)
    return _anneal(config.learning_rate, lowest, done)


def one_cycle(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate that rises to the full one and then falls to nearly zero.

    Source: Smith and Topin 2019, arXiv:1708.07120. Both ways along a cosine, as PyTorch's `OneCycleLR` by
    default; momentum stays.
    """
    peak, first = ONE_CYCLE_RISE * steps - 1, config.learning_rate / ONE_CYCLE_START
    if step <= peak:
        return _anneal(first, config.learning_rate, step / peak)
    return _anneal(config.learning_rate, first / ONE_CYCLE_END, (step - peak) / (steps - 1 - peak))


def _anneal(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def cycle_ends(config: OptimConfig, epochs: int) -> set[int]:
    """Return the epochs, counted from 1, at whose end a snapshot is due."""
    if not config.snapshots:
        return set()
    # Whole epochs before the restart: an epoch that it falls into ends at nearly the full rate.
    return {i * epochs // config.cycles for i in range(1, config.cycles + 1)} - {0}


def ema_share(config: OptimConfig, step: int) -> float:
    """Return the weight of the newest weights in their exponential average after a step, counted from 0.

    The decay rises to `ema_decay` as (1 + step) / (10 + step): else the first epochs would be judged by the
    random start. 0 where no such average is wanted.
    """
    return 1 - min(config.ema_decay, (1 + step) / (10 + step)) if config.average == "ema" else 0.0


def swa_share(config: OptimConfig, epoch: int, epochs: int) -> float:
    """Return the weight of an epoch's last weights in the plain mean over the epochs after `swa_from`.

    Source: Izmailov et al. 2018, arXiv:1803.05407. 0 where no such average is wanted yet; the last epoch is
    always in it.
    """
    averaged = epoch - min(round(config.swa_from * epochs), epochs - 1)
    return 1 / averaged if config.average == "swa" and averaged > 0 else 0.0


def averaged_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return a model's weights and statistics, of which averages are made; no counts of batches."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


@torch.no_grad()
def move_average(average: list[torch.Tensor], newest: list[torch.Tensor], share: float) -> None:
    """Move the `averaged_tensors` of one model towards those of another, by this share of the way."""
    get_ema_multi_avg_fn(1 - share)(average, newest, 0)  # type: ignore[no-untyped-call]


def epochs_since_best(history: Sequence[float]) -> int:
    """Return how many epochs lie behind the first epoch with the best score; 0 for an empty history."""
    return len(history) - 1 - history.index(max(history)) if history else 0
