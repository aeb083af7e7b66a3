"""One worker's training loop: an epoch, an evaluation, a report. It knows nothing of Ray.

The same loop serves one worker and, where `torch.distributed` is set up, one of several. Everything that is
random in an epoch is seeded by the epoch, so a resumed trial goes on exactly as an uninterrupted one.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from saltray import checkpoint, metrics
from saltray.config import TrialConfig
from saltray.losses import LOSSES, Loss
from saltray.model import build_model, count_parameters
from saltray.optim import build_optimizer, epochs_since_best, learning_rate

Batches = Iterable[dict[str, Tensor]]
"""Batches of `image` and `mask`, uint8 (tiles, height, width)."""


class Report(Protocol):
    """Receives an epoch's metrics, and on rank 0 the folder of a checkpoint, which goes away afterwards."""

    def __call__(self, metrics: dict[str, Any], folder: Path | None) -> None:
        """Take the report; may stop the trial by raising."""


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""

    def __init__(self, epoch: int, loss: float) -> None:
        """Name the epoch and the loss."""
        super().__init__(f"the loss is {loss} in epoch {epoch}")
        self.epoch = epoch


def fit(
    config: TrialConfig,
    training_batches: Callable[[int], Batches],
    validation_batches: Callable[[], Batches],
    report: Report,
    *,
    device: torch.device,
    resume: Path | None = None,
) -> None:
    """Train one trial to its end: the last epoch, or early when the validation mAP stops rising.

    Each epoch is reported with `epoch` (from 1), `loss`, `map` (this epoch's validation mAP), `best_map`
    (the best so far, of the weights in the checkpoint), `learning_rate`, `seconds`, `tiles_per_second`
    (in training), `validation_tiles_per_second`, `parameters` and `finished`.

    Args:
        config: the trial.
        training_batches: epoch -> this worker's batches; as many on every worker.
        validation_batches: this worker's share of the validation tiles, each once.
        report: receives each epoch's result.
        device: where to train.
        resume: a checkpoint with training state, to go on from.

    Raises:
        Diverged: the loss became NaN or infinite.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model).to(device)
    optimizer = build_optimizer(model.parameters(), config.optim)
    amp = autocast_dtype(config.precision, device)
    history: list[float] = []
    best_weights: dict[str, Tensor] = {}
    if resume is not None:
        if not (resume / checkpoint.TRAINING).exists():
            # It was cut off between its last report and its end: the report may not have arrived.
            history = checkpoint.load_metrics(resume)["history"]
            last = {"epoch": len(history), "map": history[-1], "best_map": max(history), "finished": True}
            report(last, None)
            return
        state = checkpoint.load_training(resume)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history, best_weights = list(state["history"]), checkpoint.load_weights(resume)
    network: nn.Module = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model

    for epoch in range(len(history) + 1, config.epochs + 1):
        started = time.perf_counter()
        rate = learning_rate(config.optim, history)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(_epoch_seed(config.seed, epoch))
        loss, tiles = train_epoch(
            network, training_batches(epoch), LOSSES[config.loss], optimizer, device, amp
        )
        trained = time.perf_counter()
        if not math.isfinite(loss):
            raise Diverged(epoch, loss)
        _broadcast_buffers(model)
        score, validated = evaluate(model, validation_batches(), device, amp)
        seconds = time.perf_counter() - trained
        history.append(score)
        if epochs_since_best(history) == 0:
            best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        finished = epoch == config.epochs or epochs_since_best(history) >= config.patience
        results: dict[str, Any] = {
            "epoch": epoch,
            "loss": loss,
            "map": score,
            "best_map": max(history),
            "learning_rate": rate,
            "seconds": time.perf_counter() - started,
            "tiles_per_second": tiles / (trained - started),
            "validation_tiles_per_second": validated / seconds,
            "parameters": count_parameters(model),
            "finished": finished,
        }
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
        _report(report, results, best_weights, config, history, None if finished else state)
        if finished:
            return


def train_epoch(
    network: nn.Module,
    batches: Batches,
    loss_function: Loss,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    amp: torch.dtype | None,
) -> tuple[float, int]:
    """Train on every batch once; return the mean loss a tile and the number of tiles, over all workers."""
    network.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tiles = 0
    for batch in batches:
        images, masks = _to_device(batch, device)
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            logits = network(images)
        loss = loss_function(logits.float(), masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(images)
        tiles += len(images)
    # The one synchronisation of the epoch.
    sums = torch.tensor([float(total), tiles], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[0] / sums[1].clamp(min=1)), int(sums[1])


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Batches, device: torch.device, amp: torch.dtype | None
) -> tuple[float, int]:
    """Return the contest's metric at probability 0.5 and the number of tiles, over all workers."""
    model.eval()
    intersections, unions = [], []
    for batch in batches:
        images, masks = _to_device(batch, device)
        with torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None):
            salt = model(images) > 0
        truth = masks > 0
        intersections.append((salt & truth).sum(dim=(1, 2)))
        unions.append((salt | truth).sum(dim=(1, 2)))
    precisions = np.zeros(0)
    if unions:
        precisions = metrics.precision(
            torch.cat(intersections).cpu().numpy(), torch.cat(unions).cpu().numpy()
        )
    sums = torch.tensor([precisions.sum(), len(precisions)], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[0] / sums[1]), int(sums[1])


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type for `TrialConfig.precision` on this device; None for plain float32."""
    if precision == "bfloat16":
        return torch.bfloat16
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "auto" and fast else None


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Map uint8 images (n, h, w) to the network's input, float32 (n, 1, h, w) in [0, 1]."""
    # As bytes over the bus: a quarter of what floats would take.
    pixels = images.to(device, non_blocking=True).unsqueeze(1).float().div_(255)
    return pixels.contiguous(memory_format=torch.channels_last)


def _to_device(batch: dict[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the network's input, and masks float32 (n, h, w) in {0, 1}."""
    return to_input(batch["image"], device), batch["mask"].to(device).float()


def _broadcast_buffers(model: nn.Module) -> None:
    """Give every worker rank 0's BatchNorm statistics, so that all evaluate the model that is saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _epoch_seed(seed: int, epoch: int) -> int:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _report(
    report: Report,
    results: dict[str, Any],
    best_weights: dict[str, Tensor],
    config: TrialConfig,
    history: list[float],
    state: dict[str, Any] | None,
) -> None:
    if dist.is_initialized() and dist.get_rank() > 0:
        report(results, None)
        return
    with tempfile.TemporaryDirectory(prefix="saltray-") as name:
        folder = Path(name)
        best = {"best_map": max(history), "best_epoch": len(history) - epochs_since_best(history)}
        checkpoint.save(folder, best_weights, config, best | {"history": history}, state)
        report(results, folder)
